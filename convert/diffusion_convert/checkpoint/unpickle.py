"""Reading torch's pickled checkpoints (.ckpt, .bin, .pt) without running anything that is in them.

A pickle is a program: it names importable objects and calls them. Here `_Reader.find_class` imports nothing. It
knows the few names that rebuild tensors and plain containers, each as a function of this file; any other name
becomes `Inert`, a class whose making, calling, filling and setting of state do nothing. So the training callbacks
and configuration objects of the official files load, as nothing, and an ``os.system`` in a file is only a name.

Tensors are views of the mapped file: an 8 GB checkpoint costs no memory until its values are read.
"""

from __future__ import annotations

import math
import pickle
import pickletools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_convert.checkpoint.archive import MAX_PICKLE_BYTES, Archive
from diffusion_runtime.errors import CheckpointError

if TYPE_CHECKING:
    import torch

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
_FORBIDDEN_OPCODES = frozenset({"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"})
_MEMO_OPCODES = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_MALFORMED = (  # what the interpreter raises for a program that makes no sense
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class Inert:
    """What every class and function that is not known becomes: it takes all that a pickle can do to it and does
    nothing. One class for all, so that nothing in a file has a say in what it is."""

    __slots__ = ()

    def __new__(cls, *_args: object, **_kwargs: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...

    def __call__(self, *_args: object, **_kwargs: object) -> Inert:
        return self

    def __setstate__(self, _state: object = None) -> None: ...

    def __setitem__(self, _key: object, _value: object) -> None: ...

    def append(self, _value: object) -> None: ...

    def extend(self, _values: object) -> None: ...

    def add(self, _value: object) -> None: ...


class _Items(dict[object, object]):
    """A dict of any kind. It has no attributes, so that a file cannot put its own in place of a method."""

    __slots__ = ()

    def __setstate__(self, _state: object) -> None: ...


@dataclass(frozen=True, slots=True)
class _Rebuild:
    """A known name: calling it calls a function of this file, and a pickle can change nothing about it."""

    function: Callable[..., object]

    def __call__(self, *args: object) -> object:
        return self.function(*args)

    def __setstate__(self, _state: object) -> None: ...


@dataclass(frozen=True, slots=True)
class _StorageType:
    """One of torch's storage classes: only its element type matters."""

    dtype: str

    def __setstate__(self, _state: object) -> None: ...


@dataclass(frozen=True, slots=True)
class _Storage:
    """``count`` elements of one type that begin at a byte of the file."""

    dtype: str
    begin: int
    count: int

    def __setstate__(self, _state: object) -> None: ...


@dataclass(frozen=True, slots=True)
class _View:
    """A tensor, before it is one: torch's own class would let a pickle change it. Offset and stride in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def __setstate__(self, _state: object) -> None: ...


@dataclass(frozen=True, slots=True)
class Pickled:
    """What a checkpoint holds: tensors by name, as views of the mapped file, and the plain numbers and texts that
    lie beside its state dict (``global_step``, ``epoch``)."""

    tensors: Mapping[str, torch.Tensor]
    scalars: Mapping[str, int | float | str]


def load_tensors(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a pickled checkpoint by name; see `load`."""
    return load(path).tensors


def load(path: Path) -> Pickled:
    """Open a pickled checkpoint without reading any values. Where the file wraps its tensors in ``state_dict``,
    those are returned. What is not a tensor is left out.

    Raises CheckpointError for a file that is in neither of torch's formats, is damaged, or holds no tensors.
    """
    program, members = _open(path)
    outer = inner = _run(path, program, members)[0]
    while isinstance(inner, dict) and isinstance(inner.get("state_dict"), dict):
        inner = inner["state_dict"]
    views = dict(_named(inner, _View))
    if not views:
        raise CheckpointError(f"{path}: holds no named tensors; expected the state dict of a model")
    return Pickled(_map_views(path, views), dict(_named(outer, (int, float, str))))


def _named(found: object, kinds: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(found, dict):
        yield from (
            (key, value) for key, value in found.items() if isinstance(key, str) and isinstance(value, kinds)
        )


def _open(path: Path) -> tuple[bytes, Mapping[str, tuple[int, int]]]:
    """The program that makes the state dict, and where in the file its storages lie (``data/{key}``)."""
    try:
        with path.open("rb") as file:
            head = file.read(MAX_PICKLE_BYTES) if file.peek(1)[:1] == b"\x80" else b""
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if head:
        return _open_sequence(path, head)
    archive = Archive.open(path)
    return archive.read("data.pkl"), archive.members


def _open_sequence(path: Path, head: bytes) -> tuple[bytes, Mapping[str, tuple[int, int]]]:
    """`_open` for a file of torch before 1.6: pickles of a magic number, a version, facts about the machine, the
    state dict and the storages' keys; then each storage, as its number of elements and those."""
    programs, end = [], 0
    try:
        for _ in range(5):
            ((_, _, stop),) = deque(pickletools.genops(head[end:]), maxlen=1)
            begin, end = end, end + (stop or 0) + 1
            programs.append(head[begin:end])
    except _MALFORMED as error:
        raise CheckpointError(f"{path}: cut short, or not a checkpoint in one of torch's formats") from error
    magic, _, machine, keys = (_run(path, programs[index], {})[0] for index in (0, 1, 2, 4))
    if magic != SEQUENCE_MAGIC or not isinstance(keys, list) or not isinstance(machine, dict):
        raise CheckpointError(f"{path}: a pickle, but not a checkpoint in one of torch's formats")
    if machine.get("little_endian") is not True:
        raise CheckpointError(f"{path}: only little-endian checkpoints can be mapped")
    _, storages = _run(path, programs[3], None)
    members: dict[str, tuple[int, int]] = {}
    with path.open("rb") as file:
        for key in keys:
            dtype, count = storages.get(key, ("uint8", -1)) if isinstance(key, str) else ("uint8", -1)
            file.seek(end)
            size, begin = count * _item_bytes(dtype), end + 8
            if int.from_bytes(file.read(8), "little") != count or begin + size > path.stat().st_size:
                raise CheckpointError(f"{path}: damaged or cut short: storage {key!r} is not where it should be")
            members[f"data/{key}"] = (begin, size)
            end = begin + size
    return programs[3], members


def _run(
    path: Path, program: bytes, members: Mapping[str, tuple[int, int]] | None
) -> tuple[object, Mapping[str, tuple[str, int]]]:
    """What a program makes, and the storages that it asks for: element type and count by key."""
    _check_program(path, program)
    reader = _Reader(program, members)
    try:
        return reader.load(), reader.storages
    except _MALFORMED as error:
        raise CheckpointError(f"{path}: damaged checkpoint: {type(error).__name__}: {error}") from error


def _check_program(path: Path, program: bytes) -> None:
    """Raises CheckpointError for opcodes that torch never writes and that would cost memory by themselves."""
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name in _FORBIDDEN_OPCODES:
                raise CheckpointError(f"{path}: uses pickle's {opcode.name}, which torch never writes")
            if opcode.name in _MEMO_OPCODES and isinstance(argument, int) and not 0 <= argument < len(program):
                raise CheckpointError(f"{path}: damaged checkpoint: memo index {argument}")
    except _MALFORMED as error:
        raise CheckpointError(f"{path}: damaged checkpoint: {error}") from error


class _Reader(pickle.Unpickler):
    """The one unpickler of the project. It resolves names from a literal table and never imports.

    ``members`` is where storages lie; None: not known yet, and any that the program names is taken to be there."""

    def __init__(self, program: bytes, members: Mapping[str, tuple[int, int]] | None) -> None:
        super().__init__(BytesIO(program), encoding="utf-8", errors="replace")
        self._members = members
        self.storages: dict[str, tuple[str, int]] = {}
        rebuild_tensor, items = _Rebuild(self._rebuild_tensor), _Rebuild(_items)
        self._known: dict[tuple[str, str], object] = {
            ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _Rebuild(_first),
            ("torch._utils", "_rebuild_parameter_with_state"): _Rebuild(_first),
            ("torch.nn.parameter", "Parameter"): _Rebuild(_first),
            ("torch._tensor", "_rebuild_from_type_v2"): _Rebuild(_from_type),
            ("collections", "OrderedDict"): items,
            ("collections", "defaultdict"): _Rebuild(lambda *_: _Items()),
            ("builtins", "dict"): items,
            ("__builtin__", "dict"): items,
            ("builtins", "set"): _Rebuild(_set),
            ("__builtin__", "set"): _Rebuild(_set),
            **{("torch", name): _StorageType(dtype) for name, dtype in STORAGE_DTYPES.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        """A function of this file for a known name, else `Inert`. Nothing is imported."""
        return self._known.get((module, name), Inert)

    def persistent_load(self, pid: object) -> object:
        """A storage: ``('storage', type, key, device, element count)``, before torch 1.6 with a None after it."""
        match pid:
            case ("storage", _StorageType(dtype=dtype), str(key), str(), int(count), *view) if view in ([], [None]):
                self.storages[key] = (dtype, count)
                whole = (0, count * _item_bytes(dtype))
                begin, size = whole if self._members is None else self._members.get(f"data/{key}", (0, -1))
            case ("storage", type(), *_):
                return Inert()  # of an element type that no weights have
            case _:
                raise pickle.UnpicklingError("a reference that is not to a storage")
        if not 0 <= count * _item_bytes(dtype) <= size:
            raise pickle.UnpicklingError(f"storage {key!r} of {count} x {dtype} has {max(size, 0)} bytes")
        return _Storage(dtype, begin, count)

    def _rebuild_tensor(self, *args: object) -> object:
        """``args``: storage, offset, size, stride, and what concerns training only. The view must lie in its
        storage and have no more elements than it, or a small file could ask for any amount of memory."""
        match args:
            case (_Storage() as storage, int(offset), tuple(size), tuple(stride), *_):
                view = _View(storage, offset, _lengths(size), _lengths(stride))
            case (Inert(), *_):
                return Inert()
            case _:
                raise pickle.UnpicklingError("a tensor that is not made of a storage, offset, size and stride")
        count = math.prod(view.size)
        last = offset + sum((length - 1) * step for length, step in zip(view.size, view.stride, strict=True))
        if offset < 0 or count > storage.count or (count and last >= storage.count):
            raise pickle.UnpicklingError(f"a tensor {view} leaves its storage")
        return view


def _map_views(path: Path, views: Mapping[str, _View]) -> dict[str, torch.Tensor]:
    import torch

    mapped: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    return {name: _tensor(mapped, view) for name, view in views.items()}


def _tensor(mapped: torch.UntypedStorage, view: _View) -> torch.Tensor:
    import torch

    dtype: torch.dtype = getattr(torch, view.storage.dtype)
    if 0 in view.size:
        return torch.empty(view.size, dtype=dtype)
    begin = view.storage.begin
    if begin % dtype.itemsize == 0:
        offset = begin // dtype.itemsize + view.offset
        return torch.empty(0, dtype=dtype).set_(mapped, offset, view.size, view.stride)
    # zips that other tools wrote align nothing: this storage is copied
    part = mapped[begin : begin + view.storage.count * dtype.itemsize].clone()
    return torch.empty(0, dtype=dtype).set_(part, view.offset, view.size, view.stride)


def _item_bytes(dtype: str) -> int:
    import torch

    found: torch.dtype = getattr(torch, dtype)
    return found.itemsize


def _lengths(values: tuple[object, ...]) -> tuple[int, ...]:
    lengths = tuple(value for value in values if type(value) is int and 0 <= value < 2**48)
    if len(lengths) != len(values) or len(values) > _MAX_DIMENSIONS:
        raise pickle.UnpicklingError(f"{values} is neither a shape nor a stride")
    return lengths


def _first(value: object = None, *_args: object) -> object:
    """A parameter is its data."""
    return value


def _from_type(rebuild: object = None, _type: object = None, args: object = (), *_state: object) -> object:
    """A tensor with attributes of its own, which are dropped."""
    return rebuild(*args) if isinstance(rebuild, _Rebuild) and isinstance(args, tuple) else Inert()


def _items(pairs: object = (), *_args: object) -> object:
    return _Items(pair for pair in pairs if len(pair) == 2) if isinstance(pairs, list | tuple) else _Items()


def _set(values: object = (), *_args: object) -> object:
    return set(values) if isinstance(values, list | tuple) else set()
