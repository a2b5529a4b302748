"""Zips from anywhere: hostile and damaged ones are refused with one line, and nothing is left behind."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from diffusion_runtime import zips
from diffusion_runtime.errors import InputError, PackageError

SMALL = zips.Limits(entries=5, size_bytes=10_000, ratio=250, depth=4)
Entries = list[tuple[str | zipfile.ZipInfo, bytes]]


def archive(path: Path, entries: Entries) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in entries:
            file.writestr(name, data)
    return path


def with_mode(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = mode << 16
    return info


HOSTILE: dict[str, tuple[Entries, str]] = {
    "parent": ([("m/../../evil", b"x")], "leads out of the folder"),
    "absolute": ([("/etc/evil", b"x")], "leads out of the folder"),
    "drive": ([("C:/evil", b"x")], "no plain name"),
    "backslash": ([("m\\..\\evil", b"x")], "no plain name"),
    "control": ([("m/a\nb", b"x")], "no plain name"),
    "link": ([(with_mode("m/link", stat.S_IFLNK | 0o777), b"/etc/passwd")], "a link or a special file"),
    "device": ([(with_mode("m/dev", stat.S_IFCHR | 0o666), b"")], "a link or a special file"),
    "pipe": ([(with_mode("m/pipe", stat.S_IFIFO | 0o666), b"")], "a link or a special file"),
    "dot": ([("m/./a", b"x")], "no plain name"),
    "empty part": ([("m//a", b"x")], "no plain name"),
    "trailing space": ([("m/a ", b"x")], "no plain name"),
    "long name": ([(f"m/{'a' * 256}", b"x")], "a name of more than 255 bytes"),
    "twice": ([("m/a", b"1"), ("m/a", b"2")], "the same name twice"),
    "twice by case": ([("m/Unet", b"1"), ("m/unet", b"2")], "the same name twice"),
    "twice by accent": ([("m/\u00e9", b"1"), ("m/e\u0301", b"2")], "the same name twice"),
    "file and folder": ([("m/a", b"1"), ("m/A/b", b"2")], "is a file and a folder"),
    "count": ([(f"m/{n}", b"x") for n in range(6)], "6 entries, at most 5"),
    "size": ([(f"m/{n}", bytes(range(250)) * 16) for n in range(3)], "bytes unpacked, at most 10000"),
    "depth": ([("a/b/c/d/e", b"x")], "more than 4 folders deep"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archive_is_refused(name: str, tmp_path: Path) -> None:
    entries, expected = HOSTILE[name]
    inside = tmp_path / "inside"
    inside.mkdir()
    path = archive(tmp_path / "a.zip", entries)
    with pytest.raises(PackageError, match=r"a\.zip: refused: ") as caught:
        zips.unpack(path, inside / "target", SMALL)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(inside.iterdir()) == []
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.zip", "inside"]


@pytest.mark.parametrize(("more", "reason"), [(0, "grows from"), (1, "68719476737 bytes unpacked, at most")])
def test_more_than_64_gib_are_refused(more: int, reason: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        info = zipfile.ZipInfo("m/a")
        file.writestr(info, b"x")
        info.file_size = (64 << 30) + more  # what the directory will say, which is written when the file is closed
    with pytest.raises(PackageError, match=reason):
        zips.unpack(tmp_path / "a.zip", tmp_path / "target")


def test_bomb_is_refused_by_its_ratio(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", [("m/zeros", bytes(20 << 20))])
    with pytest.raises(PackageError, match="more than 250 times"):
        zips.unpack(path, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_entries_that_share_their_packed_bytes_are_refused(tmp_path: Path) -> None:
    """A bomb of which no single entry grows much."""
    path = archive(tmp_path / "a.zip", [("m/0000", bytes(800_000))])
    data = path.read_bytes()
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    count = 400
    directory = b"".join(data[start:end].replace(b"m/0000", b"m/%04d" % number) for number in range(count))
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, count, count, len(directory), start, 0)
    path.write_bytes(data[:start] + directory + tail)
    with pytest.raises(PackageError, match=r"grows from \d+ to 320000000 bytes: more than 250 times"):
        zips.unpack(path, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("entries", [[], [("m/", b"")], [("__MACOSX/m/._a", b"x")]])
def test_an_archive_without_files_is_refused(entries: Entries, tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="holds no files"):
        zips.unpack(archive(tmp_path / "a.zip", entries), tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_encrypted_entry_is_refused(tmp_path: Path) -> None:
    data = bytearray(archive(tmp_path / "a.zip", [("m/a", b"x")]).read_bytes())
    for mark, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        data[data.index(mark) + offset] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(PackageError, match="encrypted"):
        zips.unpack(tmp_path / "a.zip", tmp_path / "target")


def lying_about_size(data: bytes) -> bytes:
    """The directory says that the entry is smaller than it is."""
    start = data.index(b"PK\x01\x02")
    return data[: start + 24] + (10).to_bytes(4, "little") + data[start + 28 :]


def flipped(data: bytes) -> bytes:
    middle = data.index(b"0123")
    return data[:middle] + b"X" + data[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda data: data[: len(data) // 2], "damaged zip"),
        (lambda data: data[:-1], "damaged zip"),
        (flipped, "damaged zip"),
        (lying_about_size, "damaged zip|larger than it says"),
        (lambda _: b"<!DOCTYPE html><html>404</html>", "a page or message of the site"),
        (lambda _: b"Entry not found", "a page or message of the site"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\n", "a page or message of the site"),
        (lambda _: b"", "is no zip"),
    ],
)
def test_damaged_archive_is_refused(damage: Callable[[bytes], bytes], expected: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        file.writestr("m/a", b"0123456789" * 30)
    path = tmp_path / "a.zip"
    path.write_bytes(damage(buffer.getvalue()))
    with pytest.raises(PackageError, match=expected):
        zips.unpack(path, tmp_path / "target")
    assert [item.name for item in tmp_path.iterdir()] == ["a.zip"]


def test_what_is_in_the_way_is_left_alone(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", [("m/a", b"x")])
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("kept")
    with pytest.raises(InputError, match="exists already"):
        zips.unpack(path, tmp_path / "target")
    assert (tmp_path / "target" / "mine").read_text() == "kept"
    with pytest.raises(InputError, match="no such zip"):
        zips.unpack(tmp_path / "b.zip", tmp_path / "other")


def test_packing_and_unpacking_are_inverse_and_deterministic(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "Unet.mlmodelc" / "weights").mkdir(parents=True)
    (folder / "Unet.mlmodelc" / "weights" / "weight.bin").write_bytes(bytes(1000))
    (folder / "Unet.mlmodelc" / "model.mil").write_text("program(1.0)\n" * 100)
    (folder / ".DS_Store").touch()
    zips.pack(folder, tmp_path / "stem.zip")
    first = (tmp_path / "stem.zip").read_bytes()
    (folder / "Unet.mlmodelc" / "model.mil").touch()
    zips.pack(folder, tmp_path / "stem.zip")
    assert (tmp_path / "stem.zip").read_bytes() == first
    unpacked = zips.unpack(tmp_path / "stem.zip", tmp_path / "unpacked")
    assert unpacked == tmp_path / "unpacked" / "stem"
    assert sorted(path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")) == [
        "Unet.mlmodelc",
        "Unet.mlmodelc/model.mil",
        "Unet.mlmodelc/weights",
        "Unet.mlmodelc/weights/weight.bin",
    ]
    assert (unpacked / "Unet.mlmodelc" / "model.mil").read_text() == "program(1.0)\n" * 100


def test_what_macos_adds_is_passed_over(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", [("m/a", b"x"), ("__MACOSX/m/._a", b"y"), ("m/.DS_Store", b"z")])
    folder = zips.unpack(path, tmp_path / "target")
    assert folder == tmp_path / "target" / "m"
    assert [item.name for item in folder.iterdir()] == ["a"]


@pytest.mark.parametrize("target", ["file", "folder"])
def test_symbolic_links_out_of_the_folder_are_not_packed(target: str, tmp_path: Path) -> None:
    (tmp_path / "outside" / "folder").mkdir(parents=True)
    (tmp_path / "outside" / "file").write_text("secret")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "link").symlink_to(tmp_path / "outside" / target)
    with pytest.raises(PackageError, match=r"models/link: is a symbolic link to .*/outside/"):
        zips.pack(tmp_path / "models", tmp_path / "models.zip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models", "outside"]
