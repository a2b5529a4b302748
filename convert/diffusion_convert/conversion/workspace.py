"""Where a conversion works: a hidden folder inside its output, from which everything is renamed into place.

OUTPUT/.coreml-sd/lock            held while a conversion runs
OUTPUT/.coreml-sd/{fingerprint}/  units/{name}/…      finished components
                                         references/*.npz    what the checkpoint's own networks computed
                                         staged/…            the result, being put together
                                         ready-{result}/…    the result, whole; only renames are left to do

A conversion that was stopped, in whatever way, leaves whole units, and goes on with them. From the moment when
``ready`` is there, the result is complete: whoever comes next finishes the renames.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from diffusion_runtime.errors import DiffusionError, InputError

FOLDER = ".coreml-sd"
_READY = "ready-"
_RESERVE_BYTES = 64 << 20
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG)


@dataclass(frozen=True, slots=True)
class Workspace:
    output: Path
    root: Path
    result: str

    @property
    def units(self) -> Path:
        return self.root / "units"

    @property
    def references(self) -> Path:
        return self.root / "references"

    @property
    def staged(self) -> Path:
        return self.root / "staged"

    @property
    def ready(self) -> Path:
        return self.root / f"{_READY}{self.result[:16]}"


@contextmanager
def workspace(output: Path, fingerprint: str, result: str) -> Iterator[Workspace]:
    """The work folder of a conversion with that fingerprint (of its units) and result; leftovers of others are
    removed.

    Where an error or Ctrl-C ends the block, finished units stay; if there is none, no trace is left. Full disks and
    what must not be written to become InputErrors.
    """
    existed = output.exists()
    with _disk_errors(output):
        made = _make(output)
        hidden = output / FOLDER
        place = Workspace(output, hidden / fingerprint[:16], result)
        with _locked(hidden):
            try:
                _remove_others(hidden.iterdir(), place.root)
                _remove_others(ready_folders(output, fingerprint), place.ready)
                for folder in (place.units, place.references):
                    folder.mkdir(parents=True, exist_ok=True)
                yield place
                shutil.rmtree(hidden)
            except BaseException:
                if not kept(output):
                    shutil.rmtree(hidden, ignore_errors=True)
                    _remove_empty(made if not existed else ())
                raise


def kept(output: Path) -> tuple[str, ...]:
    """The finished units that a stopped conversion has left in ``output``, by name."""
    return tuple(sorted(path.parent.name for path in (output / FOLDER).glob("*/units/[!.]*/record.json")))


def ready_folders(output: Path, fingerprint: str) -> tuple[Path, ...]:
    """Results that a stopped conversion with that fingerprint had begun to rename into place."""
    return tuple((output / FOLDER / fingerprint[:16]).glob(f"{_READY}*"))


def check_space(output: Path, needed_bytes: int) -> None:
    """Raises InputError where the disk of ``output`` has less room than that. ``output`` need not exist."""
    place = next(path for path in (output, *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed_bytes + _RESERVE_BYTES:
        raise InputError(
            f"{output}: about {_size(needed_bytes)} are needed, but its disk has {_size(free)} free; name another "
            "place, or convert less: --components, --attention, --no-zip, --no-compiled"
        )


def check_place(output: Path) -> None:
    """Raises InputError where ``output`` can be seen not to be a folder that can be written to."""
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not nearest.is_dir():
        what = "is a file" if nearest == output else f"{nearest} is a file"
        raise InputError(f"{output}: {what}; name a folder for the result")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{output}: cannot be written to: no permission for {nearest}")


def publish(place: Workspace, obsolete: tuple[Path, ...]) -> None:
    """Rename the entries of ``ready`` into the output, in place of older ones; remove what is ``obsolete``."""
    replaced = place.root / "replaced"
    replaced.mkdir(exist_ok=True)
    for entry in sorted(place.ready.iterdir()):
        target = place.output / entry.name
        if target.exists() or target.is_symlink():
            _discard(replaced / entry.name)
            target.rename(replaced / entry.name)
        entry.rename(target)
    for path in obsolete:
        if path.exists():
            _discard(replaced / path.name)
            path.rename(replaced / path.name)
    shutil.rmtree(replaced)


def link_tree(source: Path, target: Path) -> None:
    """The folder ``source`` once more: its files as hard links where the disk has such, else as copies."""
    try:
        shutil.copytree(source, target, copy_function=os.link)
    except (OSError, shutil.Error):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)


def _make(output: Path) -> tuple[Path, ...]:
    """Make ``output``; the folders that were made, the innermost first."""
    made = tuple(path for path in (output, *output.parents) if not path.exists())
    output.mkdir(parents=True, exist_ok=True)
    try:
        (output / FOLDER).mkdir(exist_ok=True)
    except OSError:
        _remove_empty(made)
        raise
    return made


def _remove_empty(folders: tuple[Path, ...]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _remove_others(folders: Iterable[Path], kept: Path) -> None:
    for path in folders:
        if path.is_dir() and path != kept:
            shutil.rmtree(path)


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _locked(hidden: Path) -> Iterator[None]:
    import fcntl

    with (hidden / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{hidden.parent}: another conversion is writing to this folder: wait for it"
            ) from error
        yield


@contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except DiffusionError:
        raise
    except Exception as error:
        cause = _os_error(error)
        if cause is None:
            raise
        if cause.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"{output}: the disk is full; free some room and run the same command again to go on"
            ) from error
        if cause.errno in _NOT_WRITABLE:
            raise InputError(f"{output}: cannot be written to: {cause.strerror} ({cause.filename})") from error
        raise


def _os_error(error: BaseException | None) -> OSError | None:
    """The error of the operating system that ``error`` is or comes from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
