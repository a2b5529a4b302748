"""Zips of models: unpacked with limits on names, links, count and size; packed the same bytes each time.

A zip comes from anywhere, so nothing in it is believed: every name is checked before the first byte is written,
sizes are counted while unpacking, and the result appears whole under its own folder or not at all.
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath

from diffusion_runtime.atomic import unfinished_file, unfinished_folder
from diffusion_runtime.errors import InputError, PackageError
from diffusion_runtime.real_path import is_inside

EMPTY: Mapping[str, bytes] = {}
_CHUNK = 1 << 20
_NAME_BYTES = 255  # what file systems take
_EPOCH = (1980, 1, 1, 0, 0, 0)
_FILE_MODE = (stat.S_IFREG | 0o644) << 16
_IGNORED = ("__MACOSX/", ".DS_Store")  # what macOS's archiver adds
_STORED = (".bin",)  # weights do not shrink
# How pages, errors in XML and JSON, "Not Found", "Entry not found" and Git LFS's pointers begin.
_WEBPAGES = (b"<!doc", b"<html", b"<?xml", b'{"err', b"Not F", b"Entry", b"versi")
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError)
"""zipfile looks at little before it unpacks: what it stumbles on in a damaged archive comes as it is."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What an archive may hold. ``ratio`` is unpacked to packed size of one entry (text of models: about 30) and of
    the whole archive, whose entries might all be the same packed bytes."""

    entries: int = 5_000
    size_bytes: int = 64 << 30
    ratio: int = 250
    depth: int = 16


def unpack(
    path: Path, target: Path, limits: Limits | None = None, wanted: Callable[[str], bool] = lambda _: True
) -> Path:
    """Unpack ``path`` to the new folder ``target`` and return the folder of the models: its only folder, or itself.

    ``wanted`` chooses files by their names; all names are checked whatever it says.
    Raises PackageError for what is no zip, is damaged or hostile, InputError where ``target`` is in the way; then
    nothing is left.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such zip")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: exists already; remove it or choose another folder")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _checked(archive, path, limits or Limits())
            with unfinished_folder(target) as unfinished:
                for info in filter(lambda info: wanted(info.filename), entries):
                    _unpack_entry(archive, info, unfinished / info.filename, path)
    except DAMAGED as error:
        raise PackageError(f"{path}: {_what_it_is(path) or f'damaged zip: {error}'}") from error
    except OSError as error:
        raise PackageError(f"{path}: cannot be unpacked to {target}: {error}") from error
    return only_folder(target)


def only_folder(folder: Path) -> Path:
    """The folder in ``folder`` where it holds nothing else, as in zips of models; else ``folder``."""
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() and not inside[0].suffix else folder


def pack(folder: Path, path: Path, without: Collection[str] = (), instead: Mapping[str, bytes] = EMPTY) -> None:
    """Write the zip ``path`` whose only folder is named like its stem and holds the files of ``folder``, without
    hidden ones and those in its folders that ``without`` names; ``instead`` of the content of some, another.

    The same files always give the same bytes: sorted, without times or owners. Weights are stored, not deflated.
    Raises PackageError for a symbolic link to a folder or to anything outside of ``folder``, before it writes.
    """
    inside = _shown(folder, without)
    for file in inside:
        if file.is_symlink() and not (file.is_file() and is_inside(file, folder)):
            raise PackageError(
                f"{file}: is a symbolic link to {file.readlink()}, which is not put into a zip; put the file there"
            )
    with unfinished_file(path) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        for file in inside:
            name = file.relative_to(folder).as_posix()
            if name in instead:
                archive.writestr(_info(f"{path.stem}/{name}"), instead[name])
            elif file.is_file():
                _pack_file(archive, file, f"{path.stem}/{name}")


def fault(
    path: Path,
    folder: Path,
    sha256: Callable[[Path], str],
    without: Collection[str] = (),
    instead: Mapping[str, bytes] = EMPTY,
) -> str | None:
    """What is wrong with a zip that `pack` has made of ``folder`` so, as the rest of a sentence about it; None
    where it holds what it should. ``sha256`` gives the hash of a file in the folder."""
    files = {
        f"{path.stem}/{file.relative_to(folder).as_posix()}": file
        for file in _shown(folder, without)
        if file.is_file()
    }
    try:
        with zipfile.ZipFile(path) as archive:
            if sorted(archive.namelist()) != sorted(files):
                return f"does not hold the files of {folder}"
            for name, file in files.items():
                with archive.open(name) as data:
                    digest = hashlib.file_digest(data, "sha256")  # type: ignore[arg-type]  # its stub lacks readinto
                    own = file.relative_to(folder).as_posix()
                    expected = hashlib.sha256(instead[own]).hexdigest() if own in instead else sha256(file)
                    if digest.hexdigest() != expected:
                        return f"holds another {own} than {folder}"
    except (*DAMAGED, OSError, RuntimeError):
        return "is damaged"
    return None


def _shown(folder: Path, without: Collection[str]) -> list[Path]:
    inside = ((file, file.relative_to(folder)) for file in folder.rglob("*"))
    return sorted(file for file, path in inside if not _hidden(path) and path.parts[0] not in without)


def _info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.compress_type = zipfile.ZIP_STORED if Path(name).suffix in _STORED else zipfile.ZIP_DEFLATED
    info.create_system = 3  # Unix, whatever the machine: the mode below is Unix's
    info.external_attr = _FILE_MODE
    return info


def _pack_file(archive: zipfile.ZipFile, file: Path, name: str) -> None:
    info = _info(name)
    info.file_size = file.stat().st_size
    # Headers are written before the data: zipfile cannot make room for a large size when it knows it.
    with file.open("rb") as source, archive.open(info, "w", force_zip64=info.file_size >= 1 << 31) as sink:
        shutil.copyfileobj(source, sink, _CHUNK)


def _checked(archive: zipfile.ZipFile, path: Path, limits: Limits) -> list[zipfile.ZipInfo]:
    """The archive's files. Raises PackageError naming the first entry that may not be unpacked."""
    infos = archive.infolist()
    if len(infos) > limits.entries:
        raise PackageError(f"{path}: refused: {len(infos)} entries, at most {limits.entries} are unpacked")
    total = sum(info.file_size for info in infos)
    if total > limits.size_bytes:
        raise PackageError(f"{path}: refused: {total} bytes unpacked, at most {limits.size_bytes}")
    size = path.stat().st_size
    # Small archives may grow by more: one line that is repeated shrinks to nearly nothing, and harms nobody.
    if total > max(size, _CHUNK) * limits.ratio:
        raise PackageError(f"{path}: refused: grows from {size} to {total} bytes: more than {limits.ratio} times")
    files, seen, folders = [], set[str](), set[str]()
    for info in infos:
        reason = _refusal(info, limits)
        plain = _folded(info.filename)
        if reason is None and plain in seen:
            reason = "the same name twice"
        if reason is not None:
            raise PackageError(f"{path}: refused: entry {info.filename!r}: {reason}")
        seen.add(plain)
        folders.update(_folded(parent.as_posix()) for parent in PurePosixPath(info.filename).parents)
        if not info.is_dir() and not _ignored(info.filename):
            files.append(info)
    if not files:
        raise PackageError(f"{path}: holds no files")
    for info in files:
        if _folded(info.filename) in folders:
            raise PackageError(f"{path}: refused: entry {info.filename!r}: is a file and a folder")
    return files


def _refusal(info: zipfile.ZipInfo, limits: Limits) -> str | None:
    """Why an entry may not be unpacked; None where it may."""
    name, kind = info.filename, stat.S_IFMT(info.external_attr >> 16)
    pure = PurePosixPath(name)
    if pure.is_absolute() or "\\" in name or ":" in name or not name.isprintable() or "\0" in info.orig_filename:
        return "the name leads out of the folder or is no plain name"
    if ".." in pure.parts or not pure.parts:
        return "the name leads out of the folder"
    if any(not part or part == "." or part.endswith((" ", ".")) for part in name.removesuffix("/").split("/")):
        return "the name is no plain name"
    if any(len(part.encode()) > _NAME_BYTES for part in pure.parts):
        return f"a name of more than {_NAME_BYTES} bytes"
    if len(pure.parts) > limits.depth:
        return f"more than {limits.depth} folders deep"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a link or a special file"
    if info.flag_bits & 1:
        return "encrypted"
    if info.file_size > max(info.compress_size, 4096) * limits.ratio:
        return f"grows from {info.compress_size} to {info.file_size} bytes: more than {limits.ratio} times"
    return None


def _unpack_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path, path: Path) -> None:
    """Unpack one file. zipfile checks its sum; its size is counted here, for the directory may lie."""
    target.parent.mkdir(parents=True, exist_ok=True)
    left = info.file_size
    with archive.open(info) as source, target.open("xb") as sink:
        while chunk := source.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                raise PackageError(f"{path}: refused: entry {info.filename!r}: is larger than it says")
            sink.write(chunk)
    if left:
        raise PackageError(f"{path}: entry {info.filename!r}: ends {left} bytes early; download it again")


def _folded(name: str) -> str:
    """The name as a file system sees it that ignores case and composes accents, as macOS's does."""
    return unicodedata.normalize("NFC", name).casefold().rstrip("/")


def _hidden(path: PurePath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _ignored(name: str) -> bool:
    return name.startswith(_IGNORED[0]) or PurePosixPath(name).name == _IGNORED[1]


def _what_it_is(path: Path) -> str | None:
    """What was saved under a zip's name, where that can be told: a site's page, or a large file's pointer."""
    with path.open("rb") as file:
        start = file.read(5)
    if start.lower() in {page.lower() for page in _WEBPAGES}:
        return "is no zip but a page or message of the site that it came from; download it again"
    return None if start.startswith(b"PK") else "is no zip"
