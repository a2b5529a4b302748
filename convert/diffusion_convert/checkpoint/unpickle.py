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
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from diffusion_runtime.errors import CheckpointError

if TYPE_CHECKING:
    import torch

MAX_PICKLE_BYTES = 64 * 2**20
"""The part of a checkpoint that is not tensor data; 0.4 MB in the official Stable Diffusion files."""

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
_LOCAL_HEADER_BYTES = 30
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

    Raises CheckpointError for a file that is not torch's zip format, is damaged, or holds no tensors.
    """
    archive = _Archive.open(path)
    program = archive.read("data.pkl")
    _check_program(path, program)
    try:
        outer = inner = _Reader(program, archive).load()
    except _MALFORMED as error:
        raise CheckpointError(f"{path}: damaged checkpoint: {type(error).__name__}: {error}") from error
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


@dataclass(frozen=True, slots=True)
class _Archive:
    """Where in the file the members of torch's zip lie: begin and size in bytes, by name without the folder."""

    path: Path
    members: Mapping[str, tuple[int, int]]

    @staticmethod
    def open(path: Path) -> _Archive:
        try:
            with zipfile.ZipFile(path) as archive, path.open("rb") as file:
                infos = archive.infolist()
                members = {info.filename: _extent(path, file, info) for info in infos}
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
            raise CheckpointError(
                f"{path}: not a checkpoint in torch's zip format ({error}); if a torch before 1.6 wrote it, save "
                "it again as .safetensors with a tool that you trust"
            ) from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        if len(members) != len(infos):
            raise CheckpointError(f"{path}: damaged checkpoint: the zip names a file twice")
        programs = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise CheckpointError(f"{path}: not a checkpoint in torch's zip format: expected one FOLDER/data.pkl")
        folder = programs[0].removesuffix("data.pkl")
        found = _Archive(path, {name.removeprefix(folder): where for name, where in members.items()})
        if "byteorder" in found.members and (order := found.read("byteorder")) != b"little":
            raise CheckpointError(f"{path}: byte order {order!r}: only little-endian checkpoints can be mapped")
        return found

    def read(self, name: str) -> bytes:
        begin, size = self.members[name]
        if size > MAX_PICKLE_BYTES:
            raise CheckpointError(f"{self.path}: {name} has {size} bytes; expected at most {MAX_PICKLE_BYTES}")
        with self.path.open("rb") as file:
            file.seek(begin)
            return file.read(size)


def _extent(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> tuple[int, int]:
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
        raise CheckpointError(f"{path}: {info.filename!r} is compressed or encrypted, which torch never writes")
    file.seek(info.header_offset)
    name_length, extra_length = struct.unpack("<26x2H", file.read(_LOCAL_HEADER_BYTES))
    begin = info.header_offset + _LOCAL_HEADER_BYTES + name_length + extra_length
    if begin + info.file_size > path.stat().st_size:
        raise CheckpointError(f"{path}: cut short: {info.filename!r} ends beyond the end of the file")
    return begin, info.file_size


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
    """The one unpickler of the project. It resolves names from a literal table and never imports."""

    def __init__(self, program: bytes, archive: _Archive) -> None:
        super().__init__(BytesIO(program), encoding="utf-8", errors="replace")
        self._archive = archive
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
        """A storage: ``('storage', type, key, device, element count)``, its bytes in the zip's ``data/{key}``."""
        match pid:
            case ("storage", _StorageType(dtype=dtype), str(key), str(), int(count)):
                begin, size = self._archive.members.get(f"data/{key}", (0, -1))
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
