"""Whether a change of the source changes what is written: a table of hashes of everything that conversions make.

    python tools/output_hashes.py -o before.json [CASE ...]           convert, print and save the table
    python tools/output_hashes.py --against before.json [CASE ...]    convert, print what differs; then status 1

Cases are the repository's trained checkpoint with 16-bit and 6-bit weights ("shapes", "shapes-6"), and one tiny
checkpoint of each family ("tiny-sd1", …). Rows are weights, programs, compiled models, vocabularies and zips'
contents; the name and the version of the tool in metadata are masked, and hashes of hashed files are left out,
so that tables of two versions can be compared. Metadata and the manifests' values stand in the table as text: a
difference there reads as what it is. Another source tree is measured by putting its folders on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Last: another tree's own checkpoints, on PYTHONPATH, come first.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
import tiny_checkpoints

SHAPES = Path(__file__).resolve().parents[1] / "tests" / "checkpoints" / "shapes"
NAMES = re.compile(r"coreml[-_](sd|diffusion)")
BASE64_SHA256 = re.compile(rb"[A-Za-z0-9+/]{43}=")
LEFT_OUT = ("tools", "format_version")
Rows = Iterator[tuple[str, str]]


def cases() -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Name -> tiny family, or "" for the trained checkpoint, and the options of `convert`."""
    found: dict[str, tuple[str, Mapping[str, Any]]] = {"shapes": ("", {}), "shapes-6": ("", {"nbits": 6})}
    return found | {f"tiny-{family}": (family, {}) for family in tiny_checkpoints.FAMILIES}


def table(case: str) -> dict[str, str]:
    """Convert one case in a temporary folder; what was written, by path, as hashes or text."""
    from diffusion_convert import ConvertOptions, convert

    family, options = cases()[case]
    with tempfile.TemporaryDirectory() as folder:
        source = tiny_checkpoints.build(family, Path(folder) / family) if family else SHAPES
        convert(source, Path(folder) / "models", ConvertOptions(**options))
        return {f"{case}/{name}": value for name, value in rows(Path(folder) / "models")}


def rows(folder: Path) -> Rows:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".zip":
            yield from zip_rows(path, name)
        elif name != "README.md":  # the card: prose, which changes with every wording
            yield from file_rows(path, name)


def zip_rows(path: Path, name: str) -> Rows:
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        entries = [
            (info.filename, info.date_time, info.compress_type, info.external_attr) for info in archive.infolist()
        ]
        yield f"{name}: entries", _hash(repr(entries).encode())
        archive.extractall(folder)
        for inner, value in rows(Path(folder)):
            yield f"{name}: {inner}", value


def file_rows(path: Path, name: str) -> Rows:
    if path.name == "manifest.json":
        for key, value in json.loads(path.read_text(encoding="utf-8")).items():
            if key not in LEFT_OUT:
                yield f"{name}: {key}", _text(_without_hashes(value))
    elif path.name == "metadata.json":
        yield name, _hash(_text(json.loads(path.read_text(encoding="utf-8"))).encode())
    elif path.suffix == ".mlmodel":
        model = _proto("Model_pb2").Model.FromString(path.read_bytes())
        yield f"{name}: metadata", _take_metadata(model.description)
        yield f"{name}: program", _hash(model.SerializeToString(deterministic=True))
    elif path.name == "coremldata.bin" and path.parent.name == "analytics":
        yield name, _hash(BASE64_SHA256.sub(b"", path.read_bytes()))
    elif path.name == "coremldata.bin":
        yield from _container_rows(path.read_bytes(), name)
    else:
        yield name, _hash(path.read_bytes())


def _container_rows(data: bytes, name: str) -> Rows:
    """Head, description and trailer; the head's last number is the description's length, which metadata change."""
    from diffusion_runtime.mil.text import CONTAINER

    *head, length = CONTAINER.unpack_from(data)
    described = _proto("Model_pb2").ModelDescription.FromString(data[CONTAINER.size :][:length])
    yield f"{name}: metadata", _take_metadata(described)
    rest = repr(head).encode() + data[CONTAINER.size + length :]
    yield name, _hash(rest + described.SerializeToString(deterministic=True))


def _take_metadata(description: Any) -> str:
    about = description.metadata
    told = {
        field.name: getattr(about, field.name) for field, _ in about.ListFields() if field.name != "userDefined"
    }
    text = _text({**told, "userDefined": dict(about.userDefined)})
    description.ClearField("metadata")
    return text


def _without_hashes(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_hashes(inner) for key, inner in value.items() if key not in ("sha256", "size_bytes")}
    return [_without_hashes(inner) for inner in value] if isinstance(value, list) else value


def _text(value: Any) -> str:
    """JSON in one order of keys, without the tool's name and version."""
    text = json.dumps(_without_version(value), sort_keys=True, ensure_ascii=False)
    return NAMES.sub("TOOL", text)


def _without_version(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: inner for key, inner in value.items() if not re.fullmatch(rf"{NAMES.pattern}\.version", key)}
        return {NAMES.sub("TOOL", key): _without_version(inner) for key, inner in kept.items()}
    return [_without_version(inner) for inner in value] if isinstance(value, list) else value


def _proto(name: str) -> Any:
    """Of coremltools, which a conversion has imported without its noise."""
    return importlib.import_module(f"coremltools.proto.{name}")


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:20]


def show_difference(before: Mapping[str, str], now: Mapping[str, str]) -> int:
    """Print every row that differs; their number."""
    differing = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    for name in differing:
        print(f"{name}\n  - {before.get(name, '(absent)')}\n  + {now.get(name, '(absent)')}")
    print(f"{len(differing)} of {len(now)} rows differ")
    return len(differing)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(cases())} (default: all)")
    parser.add_argument("-o", "--output", type=Path, help="save the table as JSON")
    parser.add_argument("--against", type=Path, help="a table that was saved; only what differs is printed")
    arguments = parser.parse_args()
    now: dict[str, str] = {}
    for case in arguments.cases or cases():
        print(f"converting {case}", file=sys.stderr, flush=True)
        now |= table(case)
    if arguments.output:
        arguments.output.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    if arguments.against:
        before = json.loads(arguments.against.read_text(encoding="utf-8"))
        chosen = {
            name: value for name, value in before.items() if name.partition("/")[0] in (arguments.cases or cases())
        }
        return 1 if show_difference(chosen, now) else 0
    for name, value in now.items():
        print(f"{value if len(value) <= 20 else _hash(value.encode())}  {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
