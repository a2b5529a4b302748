"""Reading torch's pickled checkpoints (.ckpt, .bin, .pt) without running anything that is in them.

A pickle is a program: it names importable objects and calls them. Here nothing is imported, and the only calls are
those of the few functions of this file that rebuild tensors and dicts; all else becomes `INERT`. So the training
callbacks and configuration objects of the official files load, as nothing, and an ``os.system`` in a file is only a
name.

Why not ``torch.load(weights_only=True)`` (2.13): it refuses a file for a callback that is never needed (modules on
its block list, subclasses of dict, whatever stand-in is registered), knows only protocols 2 and 3, and is not
bounded: ``bytearray(10**12)`` is allocated, and a key made of shared nested tuples is hashed for ever, where Ctrl-C
is not seen. Here time and memory grow with the bytes of the program, which `MAX_PICKLE_BYTES` bounds.

Tensors are views of the mapped file: an 8 GB checkpoint costs no memory until its values are read.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from diffusion_convert.checkpoint.archive import MAX_PICKLE_BYTES, Archive
from diffusion_convert.checkpoint.computed import TensorFile
from diffusion_convert.checkpoint.pickle_interpreter import INERT, MALFORMED, Inert, Interpreter, Items, Parameters
from diffusion_runtime.errors import CheckpointError

STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
SEQUENCE_MAGIC = 0x1950A86A20F9469CFC6C
"""What a checkpoint of torch before 1.6 begins with: no zip, but five pickles and then the storages."""

_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 2**48
_MAX_WRAPPERS = 4
"""How many dicts may lie around the weights. (A dict may also contain itself.)"""
IP_ADAPTER = ("image_proj", "ip_adapter")
"""The dicts that an IP-Adapter's file consists of."""


@dataclass(frozen=True, slots=True)
class _StorageType:
    """One of torch's storage classes: only its element type matters."""

    dtype: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """``count`` elements of one type, in the file's part ``data/{key}``."""

    dtype: str
    key: str
    count: int


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor, before it is one. Offset and stride in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def load(path: Path) -> TensorFile:
    """Open a pickled checkpoint without reading any values. Where the file wraps its tensors in ``state_dict``, or
    in the only dict of tensors that there is, those are returned. What is not a tensor is left out.

    Raises CheckpointError for a file that is in neither of torch's formats, is damaged, or holds no tensors.
    """
    outer, members = _open(path)
    inner = outer
    for _ in range(_MAX_WRAPPERS):
        inner = _within(inner)
    views = dict(_named(_flat(inner), _View))
    if not views:
        raise CheckpointError(f"{path}: holds no named tensors; expected the state dict of a model")
    return TensorFile(_map_views(path, views, members), dict(_named(outer, (int, float, str))))


def _within(found: object) -> object:
    """The dict that a dict wraps: ``state_dict``, or what trainers call otherwise (``model``, ``module``)."""
    if not isinstance(found, dict):
        return found
    if isinstance(found.get("state_dict"), dict):
        return found["state_dict"]
    if _holds_tensors(found):
        return found
    # Each is looked through once: a pickle may hold one dict a million times.
    inside = {id(value): value for value in found.values() if isinstance(value, dict)}
    holding = [value for value in inside.values() if _holds_tensors(value)]
    return holding[0] if len(holding) == 1 else found


def _flat(found: object) -> object:
    """An IP-Adapter's file is two dicts in one; its .safetensors form has their names before those in them."""
    if not isinstance(found, dict) or not all(isinstance(found.get(name), dict) for name in IP_ADAPTER):
        return found
    return {f"{part}.{name}": value for part in IP_ADAPTER for name, value in found[part].items()}


def _holds_tensors(found: dict[object, object]) -> bool:
    return any(isinstance(value, _View) for value in found.values())


def _named(found: object, kinds: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(found, dict):
        yield from (
            (key, value) for key, value in found.items() if isinstance(key, str) and isinstance(value, kinds)
        )


def _open(path: Path) -> tuple[object, Mapping[str, tuple[int, int]]]:
    """What the program makes, and where in the file its storages lie: begin and bytes by ``data/{key}``."""
    try:
        with path.open("rb") as file:
            # 0x80 is PROTO, with which pickles since protocol 2 begin; a zip begins with PK.
            head = file.read(MAX_PICKLE_BYTES) if file.peek(1)[:1] == b"\x80" else b""
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if head:
        return _open_sequence(path, head)
    archive = Archive.open(path)
    return _run(path, _Reader(BytesIO(archive.read("data.pkl")))), archive.members


def _open_sequence(path: Path, head: bytes) -> tuple[object, Mapping[str, tuple[int, int]]]:
    """`_open` for a file of torch before 1.6: pickles of a magic number, a version, facts about the machine, the
    state dict and the storages' keys; then each storage, as its number of elements and those."""
    stream = BytesIO(head)
    magic = _run(path, _Reader(stream))
    if magic != SEQUENCE_MAGIC:
        raise CheckpointError(f"{path}: a pickle, but not a checkpoint in one of torch's formats")
    _, machine = (_run(path, _Reader(stream)) for _ in range(2))
    reader = _Reader(stream)
    found = _run(path, reader)
    keys = _run(path, _Reader(stream))
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise CheckpointError(f"{path}: only little-endian checkpoints can be mapped")
    members: dict[str, tuple[int, int]] = {}
    end, length = stream.tell(), path.stat().st_size
    with path.open("rb") as file:
        for key in keys if isinstance(keys, list) else []:
            dtype, count = reader.storages.get(key, ("uint8", -1)) if isinstance(key, str) else ("uint8", -1)
            file.seek(end)
            # Each storage follows its number of elements, in eight bytes.
            size, begin = count * _item_bytes(dtype), end + 8
            if int.from_bytes(file.read(8), "little") != count or begin + size > length:
                raise CheckpointError(f"{path}: damaged or cut short: a storage is not where it should be")
            members[f"data/{key}"] = (begin, size)
            end = begin + size
    return found, members


def _run(path: Path, reader: _Reader) -> object:
    try:
        return reader.load()
    except MALFORMED as error:
        raise CheckpointError(f"{path}: damaged checkpoint: {type(error).__name__}: {str(error)[:200]}") from error


class _Reader(Interpreter):
    """The one unpickler of the project. ``storages`` are those that the program asks for: element type and count by
    key."""

    def __init__(self, program: BytesIO) -> None:
        super().__init__(program)
        self.storages: dict[str, tuple[str, int]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """A function of this file for a known name, else `INERT`. Nothing is imported."""
        return _KNOWN.get((module, name), INERT)

    def persistent_load(self, pid: object) -> object:
        """A storage: ``('storage', type, key, device, element count)``, before torch 1.6 with a None after it."""
        match pid:
            case ("storage", _StorageType(dtype=dtype), str(key), str(), int(count), *rest):
                if len(rest) > 1 or not 0 <= count < _MAX_ELEMENTS:
                    raise pickle.UnpicklingError("a storage of no such size")
                self.storages[key] = (dtype, count)
                return _Storage(dtype, key, count)
            # A class that is not known stands for itself and does nothing: trainers pickle their whole
            # configuration.
            case ("storage", Inert(), *_):
                return INERT  # of an element type that no weights have
            case _:
                raise pickle.UnpicklingError("a reference that is not to a storage")


def _rebuild_tensor(*args: object) -> object:
    """``args``: storage, offset, size, stride, and what concerns training only. The view must lie in its storage
    and have no more elements than it, or a small file could ask for any amount of memory."""
    match args:
        case (_Storage() as storage, int(offset), tuple(size), tuple(stride), *_):
            view = _View(storage, offset, _lengths(size), _lengths(stride))
        case (Inert(), *_):
            return INERT
        case _:
            raise pickle.UnpicklingError("a tensor that is not made of a storage, offset, size and stride")
    count = math.prod(view.size)
    last = offset + sum((length - 1) * step for length, step in zip(view.size, view.stride, strict=True))
    if not 0 <= offset < _MAX_ELEMENTS or count > storage.count or (count and last >= storage.count):
        raise pickle.UnpicklingError(f"a tensor of shape {view.size}, strides {view.stride} leaves its storage")
    return view


def _map_views(
    path: Path, views: Mapping[str, _View], members: Mapping[str, tuple[int, int]]
) -> dict[str, torch.Tensor]:
    # Not shared: whoever writes to a tensor writes to a copy of its pages, and never to the user's file.
    mapped: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    tensors = {}
    for name, view in views.items():
        begin, size = members.get(f"data/{view.storage.key}", (0, -1))
        if view.storage.count * _item_bytes(view.storage.dtype) > size:
            raise CheckpointError(
                f"{path}: damaged checkpoint: {name[:100]} has {view.storage.count} x {view.storage.dtype} in "
                f"{max(size, 0)} bytes"
            )
        tensors[name] = _tensor(mapped, begin, view)
    return tensors


def _tensor(mapped: torch.UntypedStorage, begin: int, view: _View) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, view.storage.dtype)
    if 0 in view.size:
        return torch.empty(view.size, dtype=dtype)
    if begin % dtype.itemsize == 0:
        offset = begin // dtype.itemsize + view.offset
        return torch.empty(0, dtype=dtype).set_(mapped, offset, view.size, view.stride)
    # zips that other tools wrote align nothing: this storage is copied
    part = mapped[begin : begin + view.storage.count * dtype.itemsize].clone()
    return torch.empty(0, dtype=dtype).set_(part, view.offset, view.size, view.stride)


def _item_bytes(dtype: str) -> int:
    found: torch.dtype = getattr(torch, dtype)
    return found.itemsize


def _lengths(values: tuple[object, ...]) -> tuple[int, ...]:
    """A shape or a stride. Their product stays a number that torch can count with, also where a length is 0."""
    lengths = tuple(value for value in values[:_MAX_DIMENSIONS] if type(value) is int and value >= 0)
    if len(lengths) != len(values) or math.prod(length or 1 for length in lengths) >= _MAX_ELEMENTS:
        raise pickle.UnpicklingError("something that is neither a shape nor a stride")
    return lengths


def _first(value: object = None, *_args: object) -> object:
    """A parameter is its data."""
    return value


def _from_type(rebuild: object = None, _type: object = None, args: object = (), *_state: object) -> object:
    """A tensor with attributes of its own, which are dropped."""
    return rebuild(*args) if rebuild is _rebuild_tensor and isinstance(args, tuple) else INERT


def _items(pairs: object = (), *_args: object) -> object:
    """A dict, of the pairs that Python 2 gave an OrderedDict. The list is emptied, so that no program makes many
    dicts of one long list."""
    made = Items()
    if isinstance(pairs, list):
        taken = pairs[:]
        pairs.clear()
        for pair in taken:
            if isinstance(pair, list | tuple) and len(pair) == 2:
                made[pair[0]] = pair[1]
    return made


_KNOWN: Mapping[tuple[str, str], Callable[..., object] | _StorageType] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch._utils", "_rebuild_parameter_with_state"): _first,
    ("torch.nn.parameter", "Parameter"): _first,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch.nn.modules.container", "ParameterDict"): lambda *_: Parameters(),
    ("collections", "OrderedDict"): _items,
    ("collections", "defaultdict"): lambda *_: Items(),
    ("builtins", "dict"): _items,
    ("__builtin__", "dict"): _items,
    **{("torch", name): _StorageType(dtype) for name, dtype in STORAGE_DTYPES.items()},
}
