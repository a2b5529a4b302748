"""coremldata.bin, which the loader reads, and analytics/coremldata.bin, which Apple's tools write."""

from __future__ import annotations

import base64
import hashlib
import struct

from diffusion_runtime.families import SYSTEMS
from diffusion_runtime.mil import description
from diffusion_runtime.mil.model import Model
from diffusion_runtime.mil.proto import ML_PROGRAM
from diffusion_runtime.mil.text import CONTAINER

_TRAILER = struct.Struct("<I12x")
_LENGTH = struct.Struct("<Q")


def container(model: Model) -> bytes:
    """The whole coremldata.bin. User metadata are sorted: Apple's order is random, ours the same each time."""
    described = description.canonical(model.description)
    version = model.specification_version
    # 7: the length of the text that follows it.
    head = CONTAINER.pack(ML_PROGRAM, SYSTEMS[version].writer, 7, b"generic", version, len(described))
    return head + described + _TRAILER.pack(ML_PROGRAM) * len(model.program.functions)


def analytics(specification: bytes, name: str) -> bytes:
    """The whole analytics/coremldata.bin of the model file ``specification``, whose file's stem is ``name``."""
    digest = base64.b64encode(hashlib.sha256(specification).digest()).decode()
    details = {"containsCustomLayer": "0", "modelDimension": "0"}
    source = {"modelHash": digest, "modelName": name}
    return _section("NeuralNetworkModelDetails", details) + _section("SpecificationDetails", source)


def _section(name: str, entries: dict[str, str]) -> bytes:
    pairs = b"".join(_sized(key) + _sized(value) for key, value in entries.items())
    return _sized(name) + _LENGTH.pack(len(entries)) + pairs


def _sized(text: str) -> bytes:
    data = text.encode()
    return _LENGTH.pack(len(data)) + data
