"""How often a conversion reads manifests and hashes files, in a fresh run and in one that finds everything there:

python tools/count_reads.py tests/checkpoints/shapes
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from diffusion_convert import convert

COUNTED: Counter[str] = Counter()
HASHED: Counter[tuple[int, int, int]] = Counter()
"""How often each file was hashed, by device, inode and size. Two attention kinds' weights are two files when they
are hashed and links of one afterwards: the bytes hashed are more than those there, no file is hashed twice. What
stands in a zip is counted by itself: it is compared with the files by its hashes."""


def count(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: the manifests that are opened, to be read, hashed or put into a zip."""
    if (
        event == "open"
        and str(arguments[0]).endswith("/manifest.json")
        and str(arguments[1] or "r").startswith("r")
    ):
        COUNTED["manifest reads"] += 1


def counted_digest(file: Any, *arguments: Any) -> Any:
    if isinstance(file, zipfile.ZipExtFile):
        COUNTED["entries"] += 1
    else:
        status = os.fstat(file.fileno())
        COUNTED["bytes hashed"] += status.st_size
        HASHED[status.st_dev, status.st_ino, status.st_size] += 1
    return digest(file, *arguments)


def bytes_there(output: Path) -> int:
    """Bytes of the models' files, each once however many links it has."""
    models = [path for suffix in (".mlpackage", ".mlmodelc") for path in output.rglob(f"*{suffix}")]
    files = [file.stat() for model in models for file in model.rglob("*") if file.is_file()]
    return sum({(status.st_dev, status.st_ino): status.st_size for status in files}.values())


digest = hashlib.file_digest

if __name__ == "__main__":
    hashlib.file_digest = counted_digest  # type: ignore[assignment]
    sys.addaudithook(count)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "models"
        for run in ("fresh", "all there"):
            COUNTED.clear()
            HASHED.clear()
            convert(sys.argv[1], place)
            share = COUNTED["bytes hashed"] / bytes_there(place)
            print(
                f"{run}: {COUNTED['manifest reads']} manifest reads, {share:.2f} times the bytes there hashed, "
                f"{len(HASHED)} files at most {max(HASHED.values(), default=0)} times each, "
                f"{COUNTED['entries']} entries of zips compared"
            )
