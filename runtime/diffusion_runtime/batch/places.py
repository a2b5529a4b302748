"""Where a batch goes: a folder, or object storage that pyarrow reaches (s3://, gs://, …)."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from diffusion_runtime import images
from diffusion_runtime.atomic import disk_errors, locked, unfinished_file
from diffusion_runtime.errors import DiffusionError, InputError, InstallationError, StorageError

RESULTS = "results.jsonl"
SECONDS_BETWEEN_WRITES = 15.0
"""Object storage knows no appending: the whole of results.jsonl is written anew, this often."""

Line = Mapping[str, Any]


def open_place(name: str) -> Place:
    """Raises InputError for a place of an unknown kind, InstallationError where its library is missing."""
    scheme = urlparse(name).scheme if "://" in name else ""
    if scheme in ("", "file"):
        return Folder(Path(unquote(urlparse(name).path) if scheme else name))
    return _storage(name)


def text_of(line: Line) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of this machine, or one that several machines share. Every write is whole or not there."""

    path: Path

    @property
    def inputs(self) -> Path | None:
        """A folder for pictures that stand in the table, where there is one."""
        return self.path / "inputs"

    def hold(self) -> AbstractContextManager[object]:
        """Keep other batches out, where that can be done."""
        images.check_writable(self.path / RESULTS)
        return locked(self.path)

    def pictures(self) -> set[str]:
        """The names of the pictures that are there."""
        return {path.name for path in self.path.glob("*.png")}

    def record(self, name: str) -> Mapping[str, Any]:
        """How a picture was made; empty where it does not say."""
        return _record(self.path / name)

    @contextmanager
    def writing(self, folder: str) -> Iterator[Path]:  # noqa: ARG002 pictures are written under their own name at once
        """A folder on this machine to write pictures to, which are at the place when the block ends."""
        yield self.path

    def read_results(self) -> str:
        """results.jsonl, empty where there is none."""
        with suppress(FileNotFoundError):
            return (self.path / RESULTS).read_text(encoding="utf-8", errors="replace")
        return ""

    def append(self, line: Line) -> None:
        """Add a line to results.jsonl."""
        with disk_errors(self.path / RESULTS), (self.path / RESULTS).open("a", encoding="utf-8") as file:
            file.write(text_of(line))
            file.flush()
            os.fsync(file.fileno())

    def write_results(self, lines: Iterable[Line]) -> None:
        """Replace results.jsonl."""
        with unfinished_file(self.path / RESULTS) as unfinished:
            unfinished.write_text("".join(map(text_of, lines)), encoding="utf-8")


@dataclass(slots=True)
class Storage:
    """A path of one of pyarrow's file systems; otherwise as `Folder`."""

    name: str
    files: Any
    path: str
    lines: list[Line] = field(default_factory=list)
    written: float = field(default_factory=time.monotonic)

    @property
    def inputs(self) -> None:
        return None

    @contextmanager
    def hold(self) -> Iterator[None]:
        with self._errors():
            self.files.create_dir(self.path, recursive=True)
        try:
            yield
        finally:
            self._write()

    def pictures(self) -> set[str]:
        from pyarrow.fs import FileSelector

        with self._errors():
            found = self.files.get_file_info(FileSelector(self.path, allow_not_found=True))
        return {info.base_name for info in found if info.base_name.endswith(".png")}

    def record(self, name: str) -> Mapping[str, Any]:
        with tempfile.TemporaryDirectory(prefix="coreml-sd-") as folder:
            local = Path(folder) / name
            local.write_bytes(self._read(name) or b"")
            return _record(local)

    @contextmanager
    def writing(self, folder: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix=f"coreml-sd-{folder}-") as local:
            yield Path(local)
            for path in sorted(Path(local).glob("*.png")):
                self._put(path.name, path.read_bytes())

    def read_results(self) -> str:
        return (self._read(RESULTS) or b"").decode(errors="replace")

    def append(self, line: Line) -> None:
        self.lines.append(line)
        if time.monotonic() - self.written >= SECONDS_BETWEEN_WRITES:
            self._write()

    def write_results(self, lines: Iterable[Line]) -> None:
        self.lines = list(lines)
        self._write()

    def _write(self) -> None:
        self._put(RESULTS, "".join(map(text_of, self.lines)).encode())
        self.written = time.monotonic()

    def _read(self, name: str) -> bytes | None:
        from pyarrow.fs import FileType

        with self._errors():
            if self.files.get_file_info(f"{self.path}/{name}").type == FileType.NotFound:
                return None
            with self.files.open_input_stream(f"{self.path}/{name}") as file:
                data: bytes = file.read()
        return data

    def _put(self, name: str, data: bytes) -> None:
        with self._errors(), self.files.open_output_stream(f"{self.path}/{name}") as file:
            file.write(data)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{self.name}: {' '.join(str(error).split())}") from error


Place = Folder | Storage
"""Where pictures and results.jsonl go."""


def _storage(name: str) -> Storage:
    try:
        from pyarrow import ArrowException, fs
    except ImportError as error:
        raise InstallationError(f"{name}: needs pyarrow: run `pip install 'coreml-sd[cluster]'`") from error
    try:
        files, path = fs.FileSystem.from_uri(name)
    except (ArrowException, ValueError, OSError) as error:
        raise InputError(
            f"{name}: {' '.join(str(error).split())}; expected a folder or a URI of pyarrow's"
        ) from error
    return Storage(name, files, path.rstrip("/"))


def _record(picture: Path) -> Mapping[str, Any]:
    try:
        return images.read_metadata(picture)
    except DiffusionError:
        return {}
