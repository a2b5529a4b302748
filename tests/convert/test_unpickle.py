"""Pickled checkpoints: tensors come out as they went in, and nothing in a file runs."""

from __future__ import annotations

import copyreg
import functools
import importlib
import io
import operator
import os
import pickle
import struct
import subprocess
import sys
import time
import types
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusion_convert.checkpoint import unpickle
from diffusion_runtime.errors import CheckpointError

WEIGHTS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.arange(6, dtype=torch.float16).reshape(2, 3).t(),
    "c.bias": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "d.position_ids": torch.arange(5).unsqueeze(0),
    "e.mask": torch.tensor([True, False]),
    "f.scalar": torch.tensor(3.0, dtype=torch.float64),
    "g.empty": torch.empty(0, 4),
    "h.row": torch.arange(12, dtype=torch.float32).reshape(3, 4)[1],
}


def load_tensors(path: Path) -> Mapping[str, torch.Tensor]:
    return unpickle.load(path).tensors


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def write_zip(path: Path, program: bytes, **members: bytes) -> Path:
    """A file in torch's format around any pickle program."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return path


def with_weights(path: Path, hostile: bytes) -> Path:
    """A checkpoint whose state dict is sound and whose "callbacks" are the program ``hostile``, spliced in."""
    torch.save({"state_dict": WEIGHTS}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (program_name,) = (name for name in members if name.endswith("/data.pkl"))
    sound = members[program_name].removesuffix(b".")
    members[program_name] = sound + b"U\x09callbacks" + hostile.removesuffix(b".") + b"s."
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_tensors_come_out_as_torch_saved_them(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "model.ckpt")
    assert_equal(load_tensors(tmp_path / "model.ckpt"), WEIGHTS)


def test_module_state_parameters_and_nesting(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    attributed = torch.nn.Parameter(torch.ones(2))
    attributed.note = "kept by torch.save, dropped here"  # type: ignore[attr-defined]
    state = {**module.state_dict(keep_vars=True), "attributed": attributed}
    torch.save({"state_dict": {"state_dict": state}, "global_step": 7, "epoch": 2.5}, tmp_path / "model.pt")
    found = unpickle.load(tmp_path / "model.pt")
    assert_equal(found.tensors, {name: value.detach() for name, value in state.items()})
    assert found.scalars == {"global_step": 7, "epoch": 2.5}
    torch.save(module.state_dict(), tmp_path / "ordered.bin")  # an OrderedDict with _metadata as its state
    assert_equal(load_tensors(tmp_path / "ordered.bin"), module.state_dict())


WRAPPED: dict[str, Callable[[Any], dict[str, Any]]] = {
    "model": lambda weights: {"model": weights, "epoch": 3},
    "module, as DeepSpeed": lambda weights: {"module": weights, "optimizer": {"state": {0: weights}}, "lr": [0.1]},
    "model_state_dict": lambda weights: {"model_state_dict": weights, "loss": torch.tensor(0.5).item()},
    "in a state dict": lambda weights: {"state_dict": {"module": weights}},
    "the same twice": lambda weights: {"params": weights, "params_again": weights},
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_the_only_dict_of_tensors_is_taken(tmp_path: Path, kind: str) -> None:
    torch.save(WRAPPED[kind](WEIGHTS), tmp_path / "model.ckpt")
    assert_equal(load_tensors(tmp_path / "model.ckpt"), WEIGHTS)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_torch_writes(tmp_path: Path, protocol: int) -> None:
    torch.save({"state_dict": WEIGHTS}, tmp_path / "model.ckpt", pickle_protocol=protocol)
    assert_equal(load_tensors(tmp_path / "model.ckpt"), WEIGHTS)


@pytest.mark.parametrize("protocol", [2, 4])
def test_files_of_torch_before_1_6(tmp_path: Path, protocol: int) -> None:
    """Pickles one after the other, and the storages behind them."""
    path, shared = tmp_path / "model.bin", torch.randn(6, 4)
    state = {**WEIGHTS, "whole": shared, "part": shared[2:4, 1:3], "layer": torch.nn.Linear(3, 2).weight}
    torch.save(
        {"state_dict": state, "global_step": 7, "callbacks": [Call(os.system, shell(tmp_path / "ran"))]},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=False,
    )
    found = unpickle.load(path)
    assert_equal(found.tensors, {name: value.detach() for name, value in state.items()})
    assert found.scalars == {"global_step": 7}
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.bin"]


def test_shared_storages_stay_views(tmp_path: Path) -> None:
    table = torch.randn(6, 4)
    torch.save({"whole": table, "part": table[2:4, 1:3]}, tmp_path / "model.ckpt")
    found = load_tensors(tmp_path / "model.ckpt")
    assert torch.equal(found["part"], table[2:4, 1:3])
    assert found["part"].stride() == (4, 1)


def test_values_are_mapped_not_read(tmp_path: Path) -> None:
    path = tmp_path / "big.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(64 * 2**20, dtype=torch.float32)}}, path)
    code = (
        "import resource, sys, pathlib, torch\n"
        "from diffusion_convert.checkpoint.unpickle import load\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); found = load(pathlib.Path(sys.argv[1])).tensors\n"
        "assert found['w'].numel() == 64 * 2**20; print(peak() - before)"
    )
    grown = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(grown.stdout) * unit < 32 * 2**20, "a file of 256 MiB was read into memory"


class ModelCheckpoint(dict[str, Any]):
    """Stands for a callback of a training framework that is not installed."""

    def __init__(self) -> None:
        super().__init__(monitor="val/loss")
        self.best_model_score = torch.tensor(0.5)
        self.nested = [OmegaNode(), {OmegaNode: (OmegaNode(),)}]


class OmegaNode:
    def __init__(self) -> None:
        self.content = {"__class__": "system"}


class Growing(list[Any]):
    """Pickled by NEWOBJ, APPENDS and BUILD."""


def test_training_callbacks_load_as_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (ModelCheckpoint, OmegaNode, Growing):
        monkeypatch.setattr(kind, "__module__", "pytorch_lightning.callbacks.made_up")
    made_up = types.ModuleType("pytorch_lightning.callbacks.made_up")
    for kind in (ModelCheckpoint, OmegaNode, Growing):
        setattr(made_up, kind.__name__, kind)
    growing = Growing([1, 2, 3])
    growing.extra = True  # type: ignore[attr-defined]
    with monkeypatch.context() as context:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            context.setitem(sys.modules, name, types.ModuleType(name))
        context.setitem(sys.modules, made_up.__name__, made_up)
        callbacks = {ModelCheckpoint: ModelCheckpoint(), "list": growing, "path": Path("/tmp")}  # noqa: S108
        torch.save({"state_dict": WEIGHTS, "callbacks": callbacks, "global_step": 1}, tmp_path / "model.ckpt")
    assert "pytorch_lightning" not in sys.modules
    found = unpickle.load(tmp_path / "model.ckpt")
    assert_equal(found.tensors, WEIGHTS)
    assert found.scalars == {"global_step": 1}
    assert "pytorch_lightning" not in sys.modules
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "model.ckpt", weights_only=True)


class Call:
    """Pickles as a call of ``function``; with ``state``, ``items`` or ``pairs``, as filling what it returned."""

    def __init__(self, function: Callable[..., Any], *args: Any, **filling: Any) -> None:
        self.function, self.args, self.filling = function, args, filling

    def __call__(self) -> None:
        """A call may itself be what is called; pickle wants to see a callable."""

    def __reduce__(self) -> tuple[Any, ...]:
        state, items, pairs = (self.filling.get(key) for key in ("state", "items", "pairs"))
        return (self.function, self.args, state, items and iter(items), pairs and iter(pairs))


def python(sentinel: Path) -> str:
    return f"open({str(sentinel)!r}, 'w').close()"


def shell(sentinel: Path) -> str:
    return f"touch '{sentinel}'"


def instance(sentinel: Path) -> bytes:
    """INST, protocol 0's way to make an object."""
    return b"(S" + repr(shell(sentinel)).encode() + b"\nios\nsystem\n."


def object_opcode(sentinel: Path) -> bytes:
    """OBJ: the class lies on the stack."""
    return b"(cos\nsystem\nS" + repr(shell(sentinel)).encode() + b"\no."


def new_object(sentinel: Path) -> bytes:
    """NEWOBJ of subprocess.Popen."""
    return b"csubprocess\nPopen\n(S" + repr(shell(sentinel)).encode() + b"\nI1\nt\x81."


def stack_global(sentinel: Path) -> bytes:
    """STACK_GLOBAL with a dotted name."""
    text = shell(sentinel).encode()
    return b"\x80\x04\x8c\x08builtins\x8c\x11__import__.system\x93\x8c" + bytes([len(text)]) + text + b"\x85R."


def build_on_known_function(sentinel: Path) -> bytes:
    """BUILD on a known rebuilder: tries to exchange its function, then calls it."""
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(N}S'function'\ncos\nsystem\nstb"
        b"(S" + repr(shell(sentinel)).encode() + b"\ntR."
    )


def calls_in_items(sentinel: Path) -> bytes:
    """A real container whose item assignment gets calls as keys and values."""
    call = b"cbuiltins\nexec\n(S" + repr(python(sentinel)).encode() + b"\ntR"
    return b"ccollections\nOrderedDict\n(tR(" + b"S'x'\n" + call + b"u."


OS = Call(importlib.import_module, "os")
UNPICKLE = Call(importlib.import_module, unpickle.__name__)
HOSTILE: dict[str, Callable[[Path], Any]] = {
    "os.system": lambda s: Call(os.system, shell(s)),
    "eval": lambda s: Call(eval, python(s)),
    "exec": lambda s: Call(exec, python(s)),
    "nested": lambda s: {"a": [({"b": Call(list, [Call(os.system, shell(s))])},)]},
    "subprocess": lambda s: Call(subprocess.run, ["touch", str(s)]),
    "popen": lambda s: Call(subprocess.Popen, ["touch", str(s)]),
    "getattr chain": lambda s: Call(Call(getattr, OS, "system"), shell(s)),
    "partial": lambda s: Call(functools.partial(os.system, shell(s))),
    "partial state": lambda s: Call(Call(functools.partial, print, state=(os.system, (shell(s),), {}, None))),
    "methodcaller": lambda s: Call(operator.methodcaller("system", shell(s)), OS),
    "torch.load": lambda s: Call(functools.partial(torch.load, weights_only=False), pickled_stream(s)),
    "torch.storage": lambda s: Call(torch.storage._load_from_bytes, pickled_stream(s).getvalue()),
    "pickle.loads": lambda s: Call(pickle.loads, pickle.dumps(Call(os.system, shell(s)))),
    "copyreg": lambda _: Call(copyreg._reconstructor, subprocess.Popen, object, None),  # type: ignore[attr-defined]
    "copyreg, registered": lambda _: Call(copyreg.add_extension, "os", "system", 1),
    "defaultdict": lambda s: Call(Call(getattr, Call(defaultdict, factory(s)), "__getitem__"), 0),
    "build": lambda s: Call(types.SimpleNamespace, state={"f": Call(os.system, shell(s))}),
    "setitems": lambda s: Call(dict, pairs=[("x", Call(os.system, shell(s)))]),
    "append": lambda s: Call(list, items=[Call(os.system, shell(s))]),
    "map": lambda s: Call(list, Call(map, os.system, [shell(s)])),
    "setattr": lambda s: Call(setattr, UNPICKLE, "load", Call(eval, python(s))),
    "write": lambda s: Call(Path.write_text, s, "x"),
    "open": lambda s: Call(Call(getattr, Call(open, str(s), "w"), "close")),
    "inst": instance,
    "obj": object_opcode,
    "newobj": new_object,
    "stack_global": stack_global,
    "build on a known function": build_on_known_function,
    "items": calls_in_items,
}
NOT_LIVE = {"copyreg", "copyreg, registered", "newobj", "stack_global", "setattr", "build on a known function"}
"""Attempts that plain pickle refuses too, or that show themselves otherwise than by the sentinel."""


def pickled_stream(sentinel: Path) -> io.BytesIO:
    stream = io.BytesIO()
    torch.save(Call(os.system, shell(sentinel)), stream)
    stream.seek(0)
    return stream


def factory(sentinel: Path) -> Any:
    return functools.partial(os.system, shell(sentinel))


def program(attack: str, sentinel: Path) -> bytes:
    made = HOSTILE[attack](sentinel)
    return made if isinstance(made, bytes) else pickle.dumps(made, protocol=2)


@pytest.mark.parametrize("attack", sorted(HOSTILE.keys() - NOT_LIVE))
def test_the_attacks_are_real(tmp_path: Path, attack: str) -> None:
    sentinel = tmp_path / "sentinel"
    made = pickle.loads(program(attack, sentinel))  # noqa: S301
    if isinstance(made, subprocess.Popen):
        made.wait()
    assert sentinel.exists()


@pytest.mark.parametrize("attack", sorted(HOSTILE))
def test_nothing_in_a_file_runs(tmp_path: Path, attack: str) -> None:
    sentinel = tmp_path / "sentinel"
    hostile, original = program(attack, sentinel), unpickle.load
    rebuild = torch._utils._rebuild_tensor_v2
    for path in (
        with_weights(tmp_path / "beside.ckpt", hostile),
        write_zip(tmp_path / "alone.ckpt", hostile),
    ):
        try:
            found = original(path).tensors
        except CheckpointError:
            assert path.name == "alone.ckpt" or attack == "build on a known function"
        else:
            assert_equal(found, WEIGHTS)
    assert not sentinel.exists()
    assert unpickle.load is original
    assert torch._utils._rebuild_tensor_v2 is rebuild
    assert not copyreg._extension_registry  # type: ignore[attr-defined]


def test_as_a_weight_it_is_missing_not_run(tmp_path: Path) -> None:
    sentinel = tmp_path / "sentinel"
    torch.save({"state_dict": {**WEIGHTS, "evil": Call(os.system, shell(sentinel))}}, tmp_path / "model.ckpt")
    assert_equal(load_tensors(tmp_path / "model.ckpt"), WEIGHTS)
    assert not sentinel.exists()


def tensor_program(
    count: int = 4, offset: object = 0, size: object = (4,), stride: object = (1,), **pid: str
) -> bytes:
    """A state dict of one tensor; its storage has four float32."""
    reference = ("storage", torch.FloatStorage, pid.get("key", "0"), "cpu", count)

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            return reference if obj is Pickler else None

    stream = io.BytesIO()
    rebuilt = Call(torch._utils._rebuild_tensor_v2, Pickler, offset, size, stride, False, {})
    Pickler(stream, protocol=2).dump({"w": rebuilt})
    return stream.getvalue()


STORAGE = struct.pack("<4f", 1, 2, 3, 4)


@pytest.mark.parametrize("shift", range(4))
def test_data_at_any_place_of_the_file(tmp_path: Path, shift: int) -> None:
    """Only torch's own writer aligns the data; other tools put it anywhere."""
    path = write_zip(tmp_path / "model.ckpt", tensor_program() + b"." * shift, **{"data/0": STORAGE})
    assert load_tensors(path)["w"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 5},
        {"count": -1},
        {"offset": 1},
        {"offset": -1},
        {"size": (5,)},
        {"size": (2, 2), "stride": (1,)},
        {"size": (2, 2), "stride": (3, 1)},
        {"size": (-4,)},
        {"size": (2.0,)},
        {"size": (2**40,), "stride": (0,)},
        {"size": (8,), "stride": (0,)},
        {"size": (2, 2), "stride": (-1, 1)},
        {"size": (1,) * 9, "stride": (1,) * 9},
        {"offset": "0"},
        {"key": "1"},
        {"key": "../data.pkl"},
    ],
    ids=str,
)
def test_a_tensor_that_leaves_its_storage(tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = write_zip(tmp_path / "model.ckpt", tensor_program(**wrong), **{"data/0": STORAGE})
    with pytest.raises(CheckpointError, match=r"model\.ckpt: damaged checkpoint"):
        load_tensors(path)


def deflated(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 2**20)


def twice(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", tensor_program())
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("archive/data.pkl", tensor_program())


SHARED_TUPLES = b"K\x01\x85" + b"2\x86" * 100
"""A pair of twice the same pair, a hundred deep: 2^100 numbers for who looks at all of them."""


def ordered(pairs: bytes) -> bytes:
    """OrderedDict([[pairs, 1]]), as Python 2 pickled it."""
    return b"ccollections\nOrderedDict\n](](" + pairs + b"I1\nee\x85R."


def many_calls() -> bytes:
    """100,000 dicts, each of one list of a million entries; and as many calls with a million arguments."""
    head = b"](" + b"N" * 10**6 + b"eq\x000(" + b"N" * 10**6 + b"tq\x010ccollections\nOrderedDict\nq\x020"
    return head + b"h\x02h\x00\x85R0" * 10**5 + b"h\x02h\x01R0" * 10**5 + b"N."


def often() -> bytes:
    """A dict of 200,000 entries, as 200,000 entries of another: 4e10 for who looks through each."""
    inner = b"".join(b"J" + number.to_bytes(4, "little") + b"N" for number in range(200_000))
    outer = b"".join(b"J" + number.to_bytes(4, "little") + b"h\x00" for number in range(200_000))
    return b"}q\x00(" + inner + b"u0}(" + outer + b"u."


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no zip": (lambda path: path.write_bytes(b"\x80\x02}q\x00."), "not a checkpoint in one of torch's formats"),
    "a pickle": (lambda path: path.write_bytes(5 * pickle.dumps({"a": 1})), "a pickle, but not a checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "not a checkpoint in one of torch's formats"),
    "absent": (lambda _path: None, "cannot be read"),
    "deflated": (deflated, "compressed or encrypted"),
    "twice": (twice, "names a file twice"),
    "no program": (lambda path: zipfile.ZipFile(path, "w").close(), "expected one FOLDER/data.pkl"),
    "big-endian": (lambda path: write_zip(path, tensor_program(), byteorder=b"big"), "byte order"),
    "extension": (lambda path: write_zip(path, b"\x82\x01."), "damaged checkpoint"),
    "memo": (lambda path: write_zip(path, b"}r\xff\xff\xff\xff."), "holds no named tensors"),
    "a memo of nothing": (lambda path: write_zip(path, b"j\xff\xff\xff\xff."), "damaged checkpoint"),
    "a state dict in itself": (lambda path: write_zip(path, b"}q\x00U\x0astate_dicth\x00s."), "holds no named"),
    "a key of shared tuples": (lambda path: write_zip(path, b"}" + SHARED_TUPLES + b"I1\ns."), "holds no named"),
    "a set of shared tuples": (lambda path: write_zip(path, b"\x8f(" + SHARED_TUPLES + b"\x90."), "holds no named"),
    "a frozenset of them": (lambda path: write_zip(path, b"(" + SHARED_TUPLES + b"\x91."), "holds no named"),
    "a dict of them": (lambda path: write_zip(path, b"(" + SHARED_TUPLES + b"I1\nd."), "holds no named"),
    "an ordered dict of them": (lambda path: write_zip(path, ordered(SHARED_TUPLES)), "holds no named"),
    "as a state dict": (lambda path: write_zip(path, SHARED_TUPLES + b"."), "holds no named"),
    "as a storage": (lambda path: write_zip(path, SHARED_TUPLES + b"Q."), "damaged checkpoint"),
    "as arguments": (
        lambda path: write_zip(path, b"ctorch._utils\n_rebuild_tensor_v2\n" + SHARED_TUPLES + b"R."),
        "damaged checkpoint",
    ),
    "many calls of much": (lambda path: write_zip(path, many_calls()), "holds no named"),
    "much memory at once": (lambda path: write_zip(path, b"\x96" + b"\xff" * 7 + b"\x00."), "damaged checkpoint"),
    "many objects": (lambda path: write_zip(path, b"]" * (4 * 2**20) + b"."), "holds no named"),
    "a long program": (lambda path: write_zip(path, b"]" * (8 * 2**20) + b"."), "expected at most"),
    "deep lists": (lambda path: write_zip(path, b"]" * 10**6 + b"a" * (10**6 - 1) + b"."), "holds no named"),
    "huge lengths without elements": (
        lambda path: write_zip(path, tensor_program(size=(0, 2**47, 2**47), stride=(1, 1, 1))),
        "damaged checkpoint",
    ),
    "huge strides without elements": (
        lambda path: write_zip(path, tensor_program(size=(0, 4), stride=(2**70, 2**70))),
        "damaged checkpoint",
    ),
    "cut program": (lambda path: write_zip(path, tensor_program()[:-9]), "damaged checkpoint"),
    "missing data": (lambda path: write_zip(path, tensor_program()), "damaged checkpoint"),
    "no tensors": (lambda path: torch.save({"global_step": 3}, path), "holds no named tensors"),
    "two state dicts": (lambda path: torch.save({"params": WEIGHTS, "ema": dict(WEIGHTS)}, path), "holds no named"),
    "one large dict, often": (lambda path: write_zip(path, often()), "holds no named"),
    "a list": (lambda path: torch.save([torch.ones(2)], path), "holds no named tensors"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_that_is_no_checkpoint(tmp_path: Path, kind: str) -> None:
    """Each ends within seconds, however much work the program asks for."""
    write, message = BAD_FILES[kind]
    write(tmp_path / "model.ckpt")
    started = time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tensors(tmp_path / "model.ckpt")
    assert time.process_time() - started < 20
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_short(tmp_path: Path, zipped: bool) -> None:
    torch.save(WEIGHTS, tmp_path / "whole.ckpt", _use_new_zipfile_serialization=zipped)
    data = (tmp_path / "whole.ckpt").read_bytes()
    for length in range(0, len(data), 97):
        (tmp_path / "cut.ckpt").write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            load_tensors(tmp_path / "cut.ckpt")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_program_is_an_error_or_sound(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(tensor_program())
    for place, value in changes:
        damaged[place % len(damaged)] = value
    path = write_zip(tmp_path / "model.ckpt", bytes(damaged), **{"data/0": STORAGE})
    try:
        found = load_tensors(path)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert all(value.numel() <= len(STORAGE) for value in found.values())
