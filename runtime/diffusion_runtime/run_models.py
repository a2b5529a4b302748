"""`coreml-sd run-models`: models for programs in other languages, over standard input and output.

A message is one line of JSON, then the bytes of the arrays that it lists, little-endian, in row-major order and
without gaps between them. Every request gets one answer, in order:

    {"do": "load", "path": "…/Unet.mlmodelc"}
    {"model": 1, "inputs": [{"name": "sample", "dtype": "float16", "shape": [2, 4, 64, 64]}, …], "outputs": […],
     "metadata": {"description": "…", "version": "…", "author": "…", "license": "…", "user_defined": {"key": "…"}}}

    {"do": "predict", "model": 1, "arrays": [{"name": "sample", "dtype": "float16", "shape": [2, 4, 8, 8]}]} + bytes
    {"arrays": [{"name": "noise_pred", "dtype": "float32", "shape": [2, 4, 64, 64]}]} + bytes

    {"do": "release", "model": 1}
    {}

An input that takes several shapes lists all of them in "shapes"; "shape" is the default. Texts of the metadata that
the model's author left out are "".

What cannot be done is answered by {"error": "one line"}, and the next request is read. A line that is no request
ends the program with exit code 2, since nobody knows what bytes follow it. It ends with 0 when its input does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from diffusion_runtime.backends import Backend, ComputeUnits, Model, TensorSpec
from diffusion_runtime.errors import DiffusionError, InputError

DTYPES = ("float16", "float32", "float64", "int32")
MAX_LINE = 1 << 20
MAX_BYTES = 1 << 33

Arrays = Mapping[str, np.ndarray]
Answer = tuple[dict[str, Any], Arrays]


@dataclass(slots=True)
class Models:
    """The models that were loaded, by the number that their answer gave."""

    backend: Backend
    loaded: dict[int, Model] = field(default_factory=dict)
    numbers: count[int] = field(default_factory=lambda: count(1))

    def load(self, request: Mapping[str, Any], arrays: Arrays) -> Answer:  # noqa: ARG002
        if not isinstance(request.get("path"), str):
            raise InputError("load: no path")
        model = self.backend.load(Path(request["path"]), ComputeUnits.ALL)
        number = next(self.numbers)
        self.loaded[number] = model
        described = {"inputs": _described(model.inputs), "outputs": _described(model.outputs)}
        return {"model": number, **described, "metadata": asdict(model.metadata)}, {}

    def predict(self, request: Mapping[str, Any], arrays: Arrays) -> Answer:
        results = self._model(request)(**arrays)
        return {}, results

    def release(self, request: Mapping[str, Any], arrays: Arrays) -> Answer:  # noqa: ARG002
        self._model(request)
        del self.loaded[request["model"]]
        return {}, {}

    def _model(self, request: Mapping[str, Any]) -> Model:
        number = request.get("model")
        if not isinstance(number, int) or number not in self.loaded:
            raise InputError(f"model {number!r}: no such model is loaded")
        return self.loaded[number]


def serve(backend: Backend, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more. Raises InputError for a line that is no request."""
    models = Models(backend)
    acts: Mapping[str, Callable[[Mapping[str, Any], Arrays], Answer]] = {
        "load": models.load,
        "predict": models.predict,
        "release": models.release,
    }
    while line := requests.readline(MAX_LINE):
        request = _request(line)
        arrays = _read(request.get("arrays", []), requests)
        try:
            if request.get("do") not in acts:
                raise InputError(f"do {request.get('do')!r}: expected one of {', '.join(acts)}")
            answer, results = acts[request["do"]](request, arrays)
        except DiffusionError as error:
            answer, results = {"error": str(error)}, {}
        _write(answer, results, answers)


def _request(line: bytes) -> Mapping[str, Any]:
    try:
        request = json.loads(line)
    except ValueError as error:
        raise InputError(f"run-models: a line that is no JSON: {line[:80]!r}") from error
    if not isinstance(request, dict) or not line.endswith(b"\n"):
        raise InputError(f"run-models: expected an object of at most {MAX_LINE} bytes, got {line[:80]!r}")
    return request


def _read(listed: Any, requests: BinaryIO) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for entry in listed if isinstance(listed, list) else [listed]:
        name, dtype, shape = _entry(entry)
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > MAX_BYTES:
            raise InputError(f"run-models: array {name} of {size} bytes: expected at most {MAX_BYTES}")
        data = requests.read(size)
        if len(data) != size:
            raise InputError(f"run-models: the input ended within array {name}")
        arrays[name] = np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype).reshape(shape)
    return arrays


def _entry(entry: Any) -> tuple[str, str, tuple[int, ...]]:
    match entry:
        case {"name": str(name), "dtype": str(dtype), "shape": list(shape)} if dtype in DTYPES:
            if all(isinstance(size, int) and size >= 0 for size in shape):
                return name, dtype, tuple(shape)
    raise InputError(
        f"run-models: an array is described as {entry!r}: expected name, shape and dtype ({', '.join(DTYPES)})"
    )


def _write(answer: dict[str, Any], arrays: Arrays, answers: BinaryIO) -> None:
    if arrays:
        answer["arrays"] = [
            {"name": name, "dtype": str(array.dtype), "shape": list(array.shape)} for name, array in arrays.items()
        ]
    answers.write(json.dumps(answer).encode() + b"\n")
    for array in arrays.values():
        answers.write(array.astype(array.dtype.newbyteorder("<")).tobytes())
    answers.flush()


def _described(specs: Mapping[str, TensorSpec]) -> list[dict[str, Any]]:
    return [
        {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}
        | ({"shapes": [list(shape) for shape in spec.shapes]} if spec.shapes else {})
        for spec in specs.values()
    ]
