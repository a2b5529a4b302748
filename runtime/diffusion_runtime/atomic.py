"""The one way to write: in a hidden work folder next to the result, then renamed into place, under a lock.

PLACE/.coreml-sd/lock             held while a command writes to PLACE as a whole (`locked`)
PLACE/.coreml-sd/work-{key}/      one thing that is being written to PLACE
                            lock         held while its writer lives
                            new/NAME     what becomes PLACE/NAME
                            commit.json  there once all of new/ is whole: only renames are left to do
                            shown.json   names a file in PLACE that goes when its writer does
PLACE/.coreml-sd/{other}/         work that a later run goes on with (conversions, downloads): never swept

Nothing in a work folder is packed, uploaded, compiled or inspected. Whoever writes to a place next looks after
what processes that are gone have left in it (`sweep`): committed work is put in place, the rest is removed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shlex
import shutil
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from diffusion_runtime.errors import DiffusionError, InputError, StorageError
from diffusion_runtime.passing_files import remove_shown, show

WORK_FOLDER = ".coreml-sd"
_LOCK, _NEW, _COMMIT, _SLOT = "lock", "new", "commit.json", "work-"
_SHOWN_COMMAND = 120  # characters of the command line of whoever holds a lock
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EIO, errno.EXDEV, errno.ESTALE, errno.EBUSY, errno.ETXTBSY, errno.ENOTEMPTY),
)
_TRIES, _BETWEEN_TRIES = 25, 0.02
"""A lock is asked for again, and for seconds in between: who sweeps holds one for a moment."""
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@contextmanager
def locked(place: Path) -> Iterator[Path]:
    """Hold the folder ``place``, made if it is not there, against every other command that writes to it as a whole;
    yields its work folder. What processes that are gone have left is put in place or removed first.

    Folders that were made are removed again where nothing was put into them. Raises StorageError where another
    process holds the folder, naming it, and for what the disk refuses.
    """
    with disk_errors(place), _work_folder(place) as hidden, _held(hidden / _LOCK, place):
        sweep(place)
        try:
            yield hidden
        finally:
            (hidden / _LOCK).unlink(missing_ok=True)


@contextmanager
def unfinished_folder(path: Path) -> Iterator[Path]:
    """An empty folder of the name of ``path`` that becomes it, replacing an older one, when the block ends well;
    else it vanishes. Where ``path`` is a symbolic link, what it names is replaced.

    Raises InputError where ``path`` is a file, StorageError where another process is writing it, naming that, and
    for what the disk refuses.
    """
    with disk_errors(path):
        target = _named(path)
        if target.exists() and not target.is_dir():
            raise InputError(f"{path}: is a file; expected a folder or nothing there")
        with work(target.parent, _key(target.name), path) as slot:
            new = slot / _NEW / target.name
            new.mkdir(parents=True)
            yield new
            commit(slot)


@contextmanager
def unfinished_file(path: Path) -> Iterator[Path]:
    """A path of the name of ``path`` to write to, renamed to it when the block ends well, else removed. Several
    processes may write the same file: the last one's stays. Links and errors are as for ``unfinished_folder``."""
    with disk_errors(path):
        target = _named(path)
        if target.is_dir():
            raise InputError(f"{path}: is a folder; expected a file or nothing there")
        with work(target.parent) as slot:
            yield slot / target.name
            (slot / target.name).replace(target)


@contextmanager
def passing_file(path: Path) -> Iterator[Callable[[Callable[[Path], object]], None]]:
    """Yields ``show(write)``, which puts what ``write`` writes to the path that it is given at ``path``, each time
    in place of what it put there before. The file goes when the block ends, and after a kill with the next `sweep`.
    A file that another program has put at ``path`` is neither replaced nor removed. Errors are as for
    ``unfinished_file``."""
    with disk_errors(path), work(path.parent) as slot:
        try:
            yield lambda write: show(slot, path, write)
        finally:
            remove_shown(slot)


@contextmanager
def work(place: Path, key: str | None = None, shown: Path | None = None) -> Iterator[Path]:
    """A new folder in the work folder of ``place`` that vanishes with the block, or is swept later. With ``key``,
    one process at a time has it: raises StorageError for another, naming ``shown``."""
    with _work_folder(place) as hidden:
        sweep(place)
        slot = hidden / f"{_SLOT}{key or secrets.token_hex(8)}"
        with _held(slot / _LOCK, shown or place):
            try:
                yield slot
            finally:
                if not (slot / _COMMIT).exists():  # else the next run puts the rest in place
                    with suppress(OSError):
                        remove(slot)


def commit(slot: Path, obsolete: Iterable[str] = (), done: Iterable[str] = ()) -> None:
    """Rename everything in ``slot/new`` into place, in place of what is there, and remove the entries of the place
    that are ``obsolete`` and those of its work folder that are ``done``. From the first rename on, whoever comes
    next would finish it.

    Where the only rename fails, what was there is there again, and OSError is raised."""
    entries = {entry.name: entry.lstat().st_ino for entry in (slot / _NEW).iterdir() if _is_plain(entry.name)}
    text = json.dumps({"new": entries, "obsolete": list(obsolete), "done": list(done)})
    (slot / f"{_COMMIT}.new").write_text(text, encoding="utf-8")
    # Whole or not there: who finds it takes what it says for decided.
    (slot / f"{_COMMIT}.new").rename(slot / _COMMIT)
    try:
        _finish(slot)
    except OSError:
        if len(entries) == 1:  # of several, some are in place already: those that are left must follow
            (slot / _COMMIT).unlink()
        raise
    except BaseException:  # Ctrl-C: a few renames more, and all is well
        _finish(slot)
        raise


def move_into_place(folder: Path, target: Path) -> bool:
    """Rename a whole folder out of a work folder to ``target``; False where there is one, which stays."""
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            return False
    return True


def sweep(place: Path) -> None:
    """Put in place what processes that are gone had committed in the work folder of ``place``; remove what they had
    not. What belongs to others or cannot be removed is left."""
    hidden = place / WORK_FOLDER
    with suppress(OSError):
        for slot in [] if hidden.is_symlink() else sorted(hidden.glob(f"{_SLOT}*")):
            with suppress(OSError), _left(slot / _LOCK):
                if (slot / _COMMIT).exists():
                    _finish(slot)
                remove_shown(slot)
                remove(slot)
        if (hidden / _LOCK).is_file():
            with _left(hidden / _LOCK):
                (hidden / _LOCK).unlink()
        hidden.rmdir()  # which the system refuses, as it should, while somebody's work is in it


def remove(path: Path) -> None:
    """Remove a folder from a work folder. Its name is free at once, for a process that waits for it; where the
    rest is interrupted, a later `sweep` goes on."""
    slot = path.with_name(f"{_SLOT}{secrets.token_hex(8)}")
    with suppress(FileNotFoundError):
        path.rename(slot)
        shutil.rmtree(slot, ignore_errors=True)  # another process may be sweeping it: both go on to the end


def is_disk_error(error: OSError) -> bool:
    """Whether a disk has refused something, as against a connection that has failed."""
    return error.errno in (*_FULL, *_REFUSED)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Make a StorageError, which names ``path``, of what the disk refuses, also where a library has wrapped it."""
    try:
        yield
    except DiffusionError:
        raise
    except Exception as error:
        cause, shown = _os_error(error), _outside(path)
        if cause is not None and cause.errno in _FULL:
            raise StorageError(
                f"{shown}: the disk is full; free some room and run the same command again"
            ) from error
        where = "" if cause is None or not isinstance(cause.filename, (str, bytes)) else os.fsdecode(cause.filename)
        if cause is not None and cause.errno in _REFUSED:
            named = f" ({where})" if where else ""
            raise StorageError(f"{shown}: cannot be written: {cause.strerror}{named}") from error
        if cause is not None and cause.errno == errno.ENOENT and WORK_FOLDER in Path(where).parts:
            raise StorageError(f"{shown}: what was being written was removed meanwhile; run it again") from error
        raise


def check_writable(folder: Path) -> None:
    """Raises InputError where ``folder`` cannot be a folder, StorageError where nothing can be written to it."""
    with disk_errors(folder):
        nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        what = "is a file" if nearest == folder else f"{nearest} is a file"
        raise InputError(f"{folder}: {what}; name a folder for the result")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise StorageError(f"{folder}: cannot be written: no permission for {nearest}")


@contextmanager
def _work_folder(place: Path) -> Iterator[Path]:
    """The work folder of ``place``, which `_held` makes; both are removed again where they are empty in the end."""
    hidden = place / WORK_FOLDER
    made = [hidden, *(folder for folder in (place, *place.parents) if not folder.exists())]
    if hidden.is_symlink():
        raise StorageError(f"{hidden}: is a symbolic link; remove it")
    try:
        yield hidden
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _held(lock: Path, shown: Path) -> Iterator[None]:
    """Hold the lock file, made if it is not there. Raises StorageError where another process holds it."""
    holder = ""
    failed: OSError | None = None
    for _ in range(_TRIES):
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = _open(lock)
        except (FileNotFoundError, FileExistsError) as error:  # somebody has swept the folder just now
            failed = error
            time.sleep(_BETWEEN_TRIES)
            continue
        with file:
            # A sweep may have removed the file after it was opened: a lock on that one keeps nobody out.
            if _take(file, where_unknown=True) and _is_at(file, lock):
                _sign(file, lock)
                yield
                return
            file.seek(0)
            holder = file.read()
        time.sleep(_BETWEEN_TRIES)
    if failed is not None and not holder:
        raise StorageError(f"{_outside(shown)}: cannot be written: {failed.strerror}; name another place")
    raise StorageError(f"{_outside(shown)}: is being written by {holder or 'another process'}; wait for it")


def _sign(file: IO[str], lock: Path) -> None:
    """Say in a lock file that is held who holds it. On a disk that is too full for that, the lock is removed."""
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()}, `{shlex.join(sys.argv)[:_SHOWN_COMMAND]}`")
        file.flush()
    except OSError:
        with suppress(OSError):
            lock.unlink()
            lock.parent.rmdir()
        raise


@contextmanager
def _left(lock: Path) -> Iterator[None]:
    """Hold the lock of a process that is gone. Raises OSError where it lives."""
    if lock.parent.is_symlink() or (lock.parent / _NEW).is_symlink():
        raise OSError
    with _open(lock) as file:
        if not _take(file, where_unknown=False) or not _is_at(file, lock):
            raise BlockingIOError
        yield


def _open(lock: Path) -> IO[str]:
    # A work folder may come with a folder of models from anywhere: what a link names must not be written to.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(lock, flags, 0o666), "r+", encoding="utf-8", errors="backslashreplace")


def _take(file: IO[str], where_unknown: bool) -> bool:
    """Whether the lock on the file was free, and is ours now; ``where_unknown`` on disks that know no locks."""
    try:
        # flock, not POSIX locks: those are lost when the process closes any other descriptor of the file.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return where_unknown if error.errno not in _HELD else False
    return True


def _is_at(file: IO[str], path: Path) -> bool:
    with suppress(OSError):
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    return False


def _finish(slot: Path) -> None:
    """Do what is left of a commit. Names that lead out of the place are passed over: a work folder may come with a
    folder of models from anywhere."""
    place = slot.parent.parent
    try:
        told = json.loads((slot / _COMMIT).read_text(encoding="utf-8"))
        entries, obsolete, done = dict(told["new"]), list(told["obsolete"]), list(told["done"])
    except (ValueError, KeyError, TypeError, RecursionError):
        entries, obsolete, done = {}, [], []
    for name, inode in filter(lambda item: _is_plain(item[0]), entries.items()):
        new, target = slot / _NEW / name, place / name
        # Nothing is renamed twice, whichever step the process before was killed at.
        # Two that are exchanged look as before, but for this number: it goes with what is renamed.
        if os.path.lexists(new) and not (os.path.lexists(target) and target.lstat().st_ino == inode):
            _put(new, target, slot / f"replaced-{name}")
    for folder, names in ((place, obsolete), (slot.parent, done)):
        for name in filter(_is_plain, names):
            with suppress(FileNotFoundError):
                (folder / name).rename(slot / f"removed-{secrets.token_hex(4)}")  # and with the slot, later
    (slot / _COMMIT).unlink()


def _put(new: Path, target: Path, replaced: Path) -> None:
    """Rename ``new`` to ``target``; what was there goes to ``replaced``, or to ``new`` in the same moment."""
    both = os.path.lexists(target) and target.is_dir() and new.is_dir()
    if both and _exchange(new, target):
        return
    if both:
        target.rename(replaced)
    try:
        new.replace(target)
    except BaseException:
        if replaced.exists() and not os.path.lexists(target):
            replaced.rename(target)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders take each other's place in one step; False where the system or the disk cannot."""
    library, here = ctypes.CDLL(None), -100  # AT_FDCWD
    if sys.platform == "darwin":
        swap = getattr(library, "renamex_np", None)
        return swap is not None and swap(os.fsencode(one), os.fsencode(other), 2) == 0  # RENAME_SWAP
    rename = getattr(library, "renameat2", None)
    return (
        rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), 2) == 0
    )  # RENAME_EXCHANGE


def _named(path: Path) -> Path:
    """What ``path`` stands for: a symbolic link stays, and what it names is written."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path.absolute()


def _key(name: str) -> str:
    """The same for names that are one to a file system that ignores case and composes accents, as macOS's does."""
    plain = unicodedata.normalize("NFC", name).casefold()
    return hashlib.sha256(plain.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and "\0" not in name and name == Path(name).name and name[:1] not in ("", ".")


def _outside(path: Path) -> Path:
    """The path that the user knows: where what lies in a work folder will be, or the folder that it is for."""
    if WORK_FOLDER not in path.parts[1:]:
        return path
    at = path.parts.index(WORK_FOLDER)
    place, inside = Path(*path.parts[:at]), path.parts[at + 1 :]
    return place / inside[2] if len(inside) > 2 and inside[1] == _NEW else place


def _os_error(error: BaseException | None) -> OSError | None:
    """The error of the operating system that ``error`` is or comes from."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None
