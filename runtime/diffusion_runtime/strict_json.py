"""The one reader of JSON from outside: limits on size and depth, and errors of one line that name the place.

Python's own reader has no bounds: nesting ends in a RecursionError, a number of a million digits in a ValueError of
another kind, and a pipe in place of a file in a wait for ever.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from diffusion_runtime.errors import DiffusionError

if TYPE_CHECKING:
    from pydantic import BaseModel

MAX_BYTES = 8 << 20
MAX_VOCABULARY_BYTES = 64 << 20  # tokenizer.json of the largest tokenizers that share CLIP's format: 30 MB
MAX_DEPTH = 64
MAX_DIGITS = 40  # transformers writes model_max_length as 1000000000000000019884624838656
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Model = TypeVar("Model", bound="BaseModel")


def read(path: Path, error: type[DiffusionError], limit: int = MAX_BYTES) -> Any:
    """The value that a UTF-8 file of at most ``limit`` bytes holds.

    Raises ``error``, in one line that names the file, where it is missing, no regular file, too large or cannot be
    read, and as `parse` does."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise error(f"{path}: cannot be read as JSON: it is not a regular file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError as missing:
        raise error(f"{path}: missing") from missing
    except OSError as failure:
        raise error(f"{path}: cannot be read as JSON: {failure.strerror or failure}") from failure
    except ValueError as failure:  # a path with a NUL in it
        raise error(f"{str(path)!r}: cannot be read as JSON: {failure}") from failure
    if len(data) > limit:
        raise error(f"{path}: cannot be read as JSON: it is larger than {limit >> 20} MiB")
    return parse(data, str(path), error)


def read_object(path: Path, error: type[DiffusionError], limit: int = MAX_BYTES) -> dict[str, Any]:
    """As `read`; raises ``error`` for anything but an object, too."""
    return _an_object(read(path, error, limit), str(path), error)


def parse(data: str | bytes, where: str, error: type[DiffusionError]) -> Any:
    """The value of a text that came from ``where``.

    Infinity is taken, since diffusers writes it into schedulers' configurations; NaN never is. Raises ``error``,
    in one line that begins with ``where``, for what is not JSON, nested more than `MAX_DEPTH` deep, a whole number
    of more than `MAX_DIGITS` digits, a number that overflows, NaN, and text that is no Unicode."""
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(text, parse_int=_whole, parse_float=_real, parse_constant=_constant)
    except UnicodeDecodeError as fault:
        raise error(f"{where}: cannot be read as JSON: it is not UTF-8 at byte {fault.start}") from fault
    except RecursionError:
        raise error(f"{where}: cannot be read as JSON: {_TOO_DEEP}") from None
    except ValueError as fault:
        raise error(f"{where}: cannot be read as JSON: {fault}") from fault
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth_exceeds(value, MAX_DEPTH):
        raise error(f"{where}: cannot be read as JSON: {_TOO_DEEP}")
    if _SURROGATE.search(text) and not all(map(_is_unicode, _texts(value))):
        raise error(
            f"{where}: cannot be read as JSON: a text in it holds half of a surrogate pair (\\ud800–\\udfff)"
        )
    return value


def parse_object(data: str | bytes, where: str, error: type[DiffusionError]) -> dict[str, Any]:
    """As `parse`; raises ``error`` for anything but an object, too."""
    return _an_object(parse(data, where, error), where, error)


def as_model(model: type[Model], value: object, where: str, what: str, error: type[DiffusionError]) -> Model:
    """``value`` as a pydantic model. Raises ``error``, in one line with the first field that is wrong: "``where``:
    not ``what``: field: reason"."""
    try:
        return model.model_validate(value)
    except ValidationError as fault:
        first = fault.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "top level"
        given = "" if first["type"] == "missing" else f", got {shortened(first['input'])}"
        raise error(f"{where}: not {what}: {field}: {first['msg']}{given}") from fault


_TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep"


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number in it has {len(digits)} digits, expected at most {MAX_DIGITS}")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {shortened(digits)} in it is too large")
    return value


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN in it is no value")
    return float(name)


def _an_object(value: Any, where: str, error: type[DiffusionError]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise error(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _depth_exceeds(value: Any, limit: int) -> bool:
    """Level by level and not recursively: what is read may be nested as deeply as Python's own limit."""
    level = [value]
    for _ in range(limit):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True


def _inside(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _texts(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            yield from one
        waiting.extend(_inside(one))


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shortened(value: object) -> str:
    """``value`` for a message, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
