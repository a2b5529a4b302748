"""A table of prompts: .txt, .jsonl, .csv or .parquet, one row for each prompt.

Columns are generate's options and the names that diffusers and the online endpoint give them. A row that cannot
be used carries the reason and the rest goes on; a column that nobody knows is an error at once, as it may be a
misspelt option that every row would lack.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from diffusion_runtime import control, images, strict_json
from diffusion_runtime.atomic import unfinished_file
from diffusion_runtime.control import ControlFile
from diffusion_runtime.errors import InputError, InstallationError
from diffusion_runtime.png_record import FILES, LISTED, Settings

COUNT = "count"
COLUMNS: Mapping[str, str] = {
    **{field.name: field.name for field in fields(Settings)},
    COUNT: COUNT,
    "num_inference_steps": "steps",
    "num_images_per_prompt": COUNT,
    "mask_image": "mask",
    **{option.removeprefix("--").replace("-", "_"): name for name, option in LISTED.items()},
}
"""A column of the table, and the option of generate that it is."""
MAX_CELL = 64 << 20  # characters; a picture in base64 may be long
_TYPES: Mapping[str, Any] = {**get_type_hints(Settings), COUNT: int}
_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True, slots=True)
class Row:
    """One row: ``number`` from 1, what the table holds, and the options that follow, or why there are none."""

    number: int
    given: Mapping[str, Any]
    options: Mapping[str, Any]
    count: int | None = None
    error: str | None = None


def read(path: Path, ignored: Set[str] = frozenset(), inputs: Path | None = None) -> list[Row]:
    """The rows of a table. Relative names of pictures are taken from the table's folder; pictures that stand in the
    table in base64 are written to the folder ``inputs``.

    Raises InputError for a file that cannot be read, for unknown columns that are not ``ignored``, and where there
    are no rows."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: expected a table of prompts that ends in {', '.join(READERS)}")
    try:
        found = list(reader(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 at byte {error.start}") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not found:
        raise InputError(f"{path}: holds no prompts")
    known = set(COLUMNS) | ignored
    unknown = {name for row in found if isinstance(row, Mapping) for name in row if name not in known}
    if unknown:
        shown = ", ".join(name or "''" for name in sorted(unknown))
        raise InputError(
            f"{path}: unknown columns {shown}: expected {', '.join(COLUMNS)}; "
            "columns of your own are passed over with --ignore NAME"
        )
    return [_row(number, row, path.parent, ignored, inputs) for number, row in enumerate(found, 1)]


Raw = Mapping[str, Any] | str
"""What stands in a row, or why it cannot be read."""


def _row(number: int, raw: Raw, folder: Path, ignored: Set[str], inputs: Path | None) -> Row:
    if isinstance(raw, str):
        return Row(number, {}, {}, error=raw)
    given = {name: value for name, value in raw.items() if not _is_missing(value)}
    options: dict[str, Any] = {}
    try:
        for column, value in given.items():
            if column in ignored:
                continue
            name = COLUMNS[column]
            if name in options:
                raise InputError(f"{column} and another column both say {name}: give one")
            options[name] = (
                _steering(column, value, name, folder) if name in LISTED else _typed(column, value, _TYPES[name])
            )
        if "prompt" not in options:
            raise InputError("prompt: missing")
        for name in FILES:
            if name in options:
                options[name] = str(_picture(name, options[name], folder, inputs))
        count = options.pop(COUNT, None)
    except InputError as error:
        return Row(number, _shown(given), {}, error=str(error))
    return Row(number, _shown(given), options, count)


def _steering(column: str, value: Any, name: str, folder: Path) -> tuple[ControlFile, ...]:
    """What steers, as --control and its like take it: a list of texts, or several in one text with semicolons."""
    from diffusion_runtime import picture_prompts, t2i_adapters  # torch: where a table has such a column

    parsers = {"adapters": t2i_adapters.parse, "ip_adapter_images": picture_prompts.parse}
    texts = value.split(";") if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{column}: got {strict_json.shortened(value)}, expected texts as canny=edges.png:0.8")
    files = (parsers.get(name, control.parse)(text) for text in texts if text.strip())
    return tuple(replace(file, image=str(folder / file.image)) for file in files)


def _typed(column: str, value: Any, kind: Any) -> Any:
    """``value`` as an option's type. A CSV holds texts only, and a table with gaps whole numbers as 25.0."""
    kinds = [one for one in (get_args(kind) or (kind,)) if one is not NoneType]
    if str in kinds:
        if isinstance(value, str):
            return value
    elif bool in kinds:
        found = _TRUTHS.get(str(value).strip().lower())
        if found is not None:
            return found
    elif not isinstance(value, bool):
        try:
            number = float(value)
            if kinds == [float] and math.isfinite(number):
                return number
            return _whole(value)
        except (ValueError, TypeError, OverflowError):
            pass
    expected = {str: "a text", bool: "true or false", float: "a number", int: "a whole number"}[kinds[0]]
    raise InputError(f"{column}: got {strict_json.shortened(value)}, expected {expected}")


def _whole(value: Any) -> int:
    if isinstance(value, str):
        with suppress(ValueError):  # as a float, a large seed would lose its last digits
            return int(value)
        value = float(value)
    if int(value) != value:
        raise ValueError
    return int(value)


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _shown(given: Mapping[str, Any]) -> dict[str, Any]:
    """What results.jsonl repeats of a row: all but pictures in base64."""
    return {
        name: f"{value[:40]}… ({len(value)} characters)"
        if isinstance(value, str) and _is_inline(name, value)
        else value
        for name, value in given.items()
    }


def _is_inline(column: str, value: str) -> bool:
    """A picture in base64 and not the name of a file: no file system takes such names."""
    return COLUMNS.get(column) in FILES and (value.startswith(images.DATA_URL) or len(value) > 1024)


def _picture(name: str, value: str, folder: Path, inputs: Path | None) -> Path:
    if not _is_inline(name, value):
        return folder / value
    if inputs is None:
        raise InputError(
            f"{name}: pictures in base64 need an output folder on this machine; give the name of a file"
        )
    try:
        data = images.from_base64(value)
    except ValueError as error:
        raise InputError(f"{name}: is neither the name of a file nor base64: {error}") from None
    path = inputs / hashlib.sha256(data).hexdigest()[:32]
    if not path.exists():
        inputs.mkdir(parents=True, exist_ok=True)
        with unfinished_file(path) as unfinished:
            unfinished.write_bytes(data)
    return path


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:  # Excel begins UTF-8 with a byte-order mark
        yield from (line.strip() for line in file if line.strip())


def _text(path: Path) -> Iterator[Raw]:
    yield from ({"prompt": line} for line in _lines(path))


def _json_lines(path: Path) -> Iterator[Raw]:
    for line in _lines(path):
        try:
            yield strict_json.parse_object(line, "the row", InputError)
        except InputError as error:
            yield str(error)


def _csv(path: Path) -> Iterator[Raw]:
    csv.field_size_limit(MAX_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        # Where the comma is in numbers, Excel writes semicolons.
        delimiter = next((one for one in ",;\t" if one in header), ",")
        try:
            table = csv.DictReader(file, strict=True, delimiter=delimiter)
            names = table.fieldnames or ()
            if len(set(names)) != len(names):
                raise InputError(f"{path}: a column is there twice: {', '.join(names)}")
            for row in table:
                if None in row:
                    yield f"line {table.line_num}: has more values than the header names columns"
                elif any(row.values()):  # Excel writes rows that were emptied as commas alone
                    yield row
        except csv.Error as error:
            raise InputError(f"{path}: line {table.line_num + 1}: not CSV: {error}") from error


def _parquet(path: Path) -> Iterator[Raw]:
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException
    except ImportError as error:
        raise InstallationError(
            f"{path}: .parquet needs pyarrow: run `pip install 'coreml-sd[cluster]'`"
        ) from error
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        yield from parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise InputError(f"{path}: not a Parquet file: {' '.join(str(error).split())}") from error


READERS: Mapping[str, Callable[[Path], Iterable[Raw]]] = {
    ".txt": _text,
    ".jsonl": _json_lines,
    ".csv": _csv,
    ".parquet": _parquet,
}
