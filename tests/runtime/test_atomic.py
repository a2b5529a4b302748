"""What is written appears whole: kills at each step, races, what disks refuse, links, hostile leftovers."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from diffusion_runtime import atomic
from diffusion_runtime.atomic import (
    WORK_FOLDER,
    commit,
    locked,
    passing_file,
    sweep,
    unfinished_file,
    unfinished_folder,
    work,
)
from diffusion_runtime.errors import InputError, StorageError
from kill_points import Forks


def write(path: Path, text: str, count: int = 3) -> None:
    with unfinished_folder(path) as unfinished:
        for number in range(count):
            (unfinished / f"{number}").write_text(text)


def read(path: Path) -> set[str]:
    return {file.read_text() for file in path.iterdir()}


def publish(place: Path, text: str) -> None:
    """Two folders and a file at once, in place of older ones and of one more."""
    with locked(place), work(place) as slot:
        for name in ("a", "b"):
            (slot / "new" / name).mkdir(parents=True)
            (slot / "new" / name / "file").write_text(text)
        (slot / "new" / "c").write_text(text)
        commit(slot, ["obsolete"])


EXCHANGE = atomic._exchange


def exchange(is_there: bool) -> None:
    atomic._exchange = EXCHANGE if is_there else lambda *_: False


@pytest.fixture(params=["exchange", "two renames"])
def disk(request: pytest.FixtureRequest, forks: Forks) -> Iterator[str]:
    """With and without a system call that exchanges two folders, in this process and in those that are killed."""
    for call in (exchange, partial(forks.call, exchange)):
        call(request.param == "exchange")
    yield str(request.param)
    for call in (exchange, partial(forks.call, exchange)):
        call(True)


def test_a_folder_is_there_after_a_kill_at_any_step(disk: str, forks: Forks, tmp_path: Path) -> None:
    path, step, seen = tmp_path / "a", 0, set[str]()
    write(path, "old")
    while forks.kill_at(partial(write, path, "new"), step := step + 1):
        assert path.is_dir() or disk == "two renames"
        write(tmp_path / "b", "another")
        assert len(read(path)) == 1 and len(list(path.iterdir())) == 3
        assert {entry.name for entry in tmp_path.iterdir()} == {"a", "b"}, "nothing is left after the next run"
        seen |= read(path)
        write(path, "old")
    assert step > 5 and seen == {"old", "new"} and read(path) == {"new"}


@pytest.mark.usefixtures("disk")
def test_several_entries_appear_all_or_none_after_a_kill_at_any_step(forks: Forks, tmp_path: Path) -> None:
    step, seen = 0, set[str]()
    publish(tmp_path, "old")
    (tmp_path / "obsolete").mkdir()
    while forks.kill_at(partial(publish, tmp_path, "new"), step := step + 1):
        with locked(tmp_path):
            pass
        texts = {(tmp_path / name).read_text() for name in ("a/file", "b/file", "c")}
        assert len(texts) == 1, "all are of one time"
        assert (tmp_path / "obsolete").exists() == (texts == {"old"})
        assert {entry.name for entry in tmp_path.iterdir()} - {"obsolete"} == {"a", "b", "c"}
        seen |= texts
        publish(tmp_path, "old")
        (tmp_path / "obsolete").mkdir(exist_ok=True)
    assert step > 10 and seen == {"old", "new"}


def test_the_old_folder_is_there_again_where_a_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", "old")

    def fail(_: Path, target: Path) -> Path:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))

    with monkeypatch.context() as patch, pytest.raises(StorageError, match="/a: cannot be written"):
        patch.setattr(atomic, "_exchange", lambda *_: False)
        patch.setattr(Path, "replace", fail)
        write(tmp_path / "a", "new")
    assert read(tmp_path / "a") == {"old"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_ctrl_c_between_two_renames_ends_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", "old")
    original = Path.replace
    stopped: list[Path] = []

    def stop(self: Path, target: Path) -> Path:
        if not stopped:
            stopped.append(target)
            raise KeyboardInterrupt
        return original(self, target)

    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", "new")
    assert read(tmp_path / "a") == {"new"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_place_where_no_file_can_be_is_no_other_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As /proc for an administrator, who may write everywhere."""

    def refuse(lock: Path) -> NoReturn:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(lock))

    monkeypatch.setattr(atomic, "_open", refuse)
    monkeypatch.setattr(atomic, "_BETWEEN_TRIES", 0)
    with pytest.raises(StorageError, match="/a: cannot be written: No such file or directory"):
        write(tmp_path / "a", "new")


def test_one_of_two_writers_is_told_of_the_other(tmp_path: Path) -> None:
    """In another process: it says which, and its command."""
    script = (
        "import sys; from pathlib import Path; from diffusion_runtime.atomic import unfinished_folder\n"
        "with unfinished_folder(Path(sys.argv[1])): print('in', flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(StorageError, match=rf"/a: is being written by process {other.pid}, `-c .*/a`; wait"):
            write(tmp_path / "a", "mine")
        write(tmp_path / "b", "another one may be written")
        other.communicate("\n")
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["a", "b"]


def write_own(place: Path) -> None:
    write(place / "a", str(os.getpid()), 40)


@pytest.mark.parametrize("act", [write_own, partial(publish, text="x")])
def test_pairs_of_writers(act: Callable[[Path], None], forks: Forks, tmp_path: Path) -> None:
    """One of two may be refused; what is there is whole, and nothing else is."""
    for _ in range(25):
        codes = forks.race(*[partial(act, tmp_path)] * 2)
        assert 0 in codes
        assert len(read(tmp_path / "a")) == 1
        assert not (tmp_path / WORK_FOLDER).exists()


def write_files(place: Path) -> None:
    for number in range(30):
        with unfinished_file(place / f"{os.getpid()}-{number}") as unfinished:
            unfinished.write_text("x" * 1000)


def test_files_of_several_writers_and_sweepers(forks: Forks, tmp_path: Path) -> None:
    """No lock is needed for files of one's own name: nobody is refused, and nobody's work is swept."""
    assert forks.race(*[partial(write_files, tmp_path)] * 3) == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 90
    assert {file.stat().st_size for file in tmp_path.iterdir()} == {1000}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_a_symbolic_link_names_is_written(kind: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "real")
    for text in ("one", "two"):
        if kind == "folder":
            write(tmp_path / "link", text)
            assert read(tmp_path / "elsewhere" / "real") == {text}
        else:
            with unfinished_file(tmp_path / "link") as unfinished:
                unfinished.write_text(text)
            assert (tmp_path / "elsewhere" / "real").read_text() == text
        assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.parent.name != "real") == [
        "elsewhere",
        "link",
        "real",
    ]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "/a: the disk is full; free some room"),
        (errno.EDQUOT, "/a: the disk is full"),
        (errno.EROFS, "/a: cannot be written: Read-only file system"),
        (errno.EACCES, "/a: cannot be written: Permission denied"),
        (errno.EIO, "/a: cannot be written: Input/output error"),
    ],
)
@pytest.mark.parametrize("write_", [unfinished_folder, unfinished_file])
def test_what_the_disk_refuses_is_a_storage_error(
    write_: Callable[..., object], code: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match=message), write_(tmp_path / "to" / "a"):  # type: ignore[attr-defined]
        try:
            raise OSError(code, os.strerror(code))
        except OSError as error:
            raise RuntimeError("wrapped by a library") from error
    assert list(tmp_path.iterdir()) == [], "folders that were made are removed"


def test_a_bug_stays_a_bug(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), unfinished_folder(tmp_path / "a"):
        (tmp_path / "nowhere").read_text()


def test_files_and_folders_are_not_mistaken(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="file: is a file"), unfinished_folder(tmp_path / "file"):
        pass
    with pytest.raises(InputError, match="folder: is a folder"), unfinished_file(tmp_path / "folder"):
        pass


def show(path: Path, *texts: str) -> None:
    with passing_file(path) as show_:
        for text in texts:
            show_(partial(Path.write_text, data=text))
            assert path.read_text() == text


def test_a_passing_file_goes_with_its_writer_killed_at_any_step(forks: Forks, tmp_path: Path) -> None:
    path, step = tmp_path / "a", 0
    while forks.kill_at(partial(show, path, "1", "2", "3"), step := step + 1):
        sweep(tmp_path)
        assert list(tmp_path.iterdir()) == []
    assert step > 10 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["another", "changed", "there before"])
def test_what_is_not_the_writers_stays(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    if kind == "there before":
        path.write_text("mine")
    with suppress(KeyboardInterrupt), passing_file(path) as show_:
        show_(lambda new: new.write_text("1"))
        if kind == "another":
            path.unlink()
        path.write_text("mine")
        show_(lambda new: new.write_text("2"))
        raise KeyboardInterrupt
    sweep(tmp_path)
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


def _names_outside(slot: Path, mine: Path) -> None:
    names = [str(mine), "../x", "../mine", "../../mine", "..", ""]
    told = {"new": dict.fromkeys(names, 1), "obsolete": names, "done": names}
    status = (mine / "file").lstat()
    mark = [status.st_ino, status.st_size, status.st_mtime_ns]
    marks = {name: [mark] for name in ("../mine/file", "../../mine/file", *names)}
    (slot / "shown.json").write_text(json.dumps(marks))
    (slot / "commit.json").write_text(json.dumps(told))


def _no_json(slot: Path, _: Path) -> None:
    (slot / "commit.json").write_text("[" * 100_000)
    (slot / "shown.json").write_text("[" * 100_000)


def _lock_is_a_link(slot: Path, mine: Path) -> None:
    (slot / "lock").symlink_to(mine / "file")


def _new_is_a_link(slot: Path, mine: Path) -> None:
    (slot / "new").symlink_to(mine)
    (slot / "commit.json").write_text(json.dumps({"new": {"file": 1}, "obsolete": [], "done": []}))


HOSTILE = (_names_outside, _no_json, _lock_is_a_link, _new_is_a_link)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_work_folder_reaches_nothing_outside(kind: Callable[[Path, Path], None], tmp_path: Path) -> None:
    """A folder of models from anywhere may hold one."""
    mine = tmp_path / "mine"
    slot = tmp_path / "theirs" / WORK_FOLDER / "work-1"
    for folder in (mine, slot):
        folder.mkdir(parents=True)
    (mine / "file").write_text("mine")
    kind(slot, mine)
    sweep(tmp_path / "theirs")
    write(tmp_path / "theirs" / "a", "new")
    assert (mine / "file").read_text() == "mine"
    assert {entry.name for entry in (tmp_path / "theirs").iterdir()} - {WORK_FOLDER} == {"a"}


def test_a_work_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine" / "work-1").mkdir(parents=True)
    (tmp_path / WORK_FOLDER).symlink_to(tmp_path / "mine")
    with pytest.raises(StorageError, match="is a symbolic link"):
        write(tmp_path / "a", "new")
    assert (tmp_path / "mine" / "work-1").is_dir()


@pytest.mark.parametrize("how", ["locked(place)", "work(place)", "unfinished_file(place / 'file')"])
def test_a_disk_too_full_for_a_lock_is_left_as_it_was(tmp_path: Path, how: str) -> None:
    """The limit on the size of files stands in for a full disk: the lock's first byte does not fit."""
    code = f"""
import resource, signal, sys
from pathlib import Path
from diffusion_runtime.atomic import locked, unfinished_file, work
from diffusion_runtime.errors import StorageError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
place = Path(sys.argv[1])
try:
    with {how}:
        sys.exit(3)
except (StorageError, OSError):
    pass
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []
