"""Packages that are damaged or hostile, through every command that reads one: exit code 2 and one line, in no time
and with no memory, and nothing is written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import toy_models
from diffusion_convert import ConvertOptions, convert
from diffusion_runtime.coremltools_import import import_messages
from fuzz.worker import Hang, call

BuildOnce = Callable[..., Path]
Damage = Callable[[Path], object]
SECONDS = 300.0
MEGABYTES = 300
WEIGHTS, MODEL, MANIFEST = (
    "Data/com.apple.CoreML/weights/weight.bin",
    "Data/com.apple.CoreML/model.mlmodel",
    "Manifest.json",
)


@dataclass(frozen=True, slots=True)
class Reader:
    """``package`` is the one that is damaged, below a folder IN; the command may write to OUT."""

    package: str
    command: tuple[str, ...]


ALONE = "package/a.mlpackage"
GENERATE = ("generate", "IN/toys", "--prompt", "a cat", "--image", "IN/photo.png", "--steps", "2", "--seed", "1",
            "--backend", "torch", "-o", "OUT/p.png")  # fmt: skip
TOYS = f"toys/original/packages/{toy_models.APPLE}vae_encoder.mlpackage"
CONVERTED = "converted/original/packages/Stable_Diffusion_version_sd1_text_encoder.mlpackage"
READERS = {
    "inspect": Reader(ALONE, ("inspect", f"IN/{ALONE}")),
    "compile": Reader(ALONE, ("compile", f"IN/{ALONE}", "-o", "OUT/compiled")),
    "palettize": Reader(ALONE, ("palettize", f"IN/{ALONE}", "-o", "OUT/small.mlpackage")),
    "generate": Reader(TOYS, GENERATE),
    "verify": Reader(CONVERTED, ("verify", "IN/converted", "--against", "IN/sd1")),
}


@pytest.fixture(scope="module")
def seeds(build_once: BuildOnce, tiny_package: BuildOnce, tiny_checkpoint: BuildOnce) -> Path:
    def write(to: Path) -> None:
        shutil.copytree(tiny_package(), to / ALONE)
        toy_models.write(to / "toys" / "original" / "packages")
        values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(to / "photo.png")
        shutil.copytree(tiny_checkpoint("sd1"), to / "sd1")
        options = ConvertOptions(attention="original", components="text_encoder", compiled=False, verify=False)
        convert(to / "sd1", to / "converted", options)
        manifest = to / "converted/original/packages/manifest.json"
        told = json.loads(manifest.read_text())
        told["components"]["text_encoder"]["sha256"] = {}  # else damage would be seen by its hash
        manifest.write_text(json.dumps(told))

    return build_once("damaged-packages", write)


def weights(change: Callable[[bytearray], object]) -> Damage:
    def damage(package: Path) -> None:
        data = bytearray((package / WEIGHTS).read_bytes())
        made = change(data)
        (package / WEIGHTS).write_bytes(made if isinstance(made, bytes) else bytes(data))

    return damage


def cut(size: int) -> Damage:
    return weights(lambda data: bytes(data[:size]))


def put(kind: str, offset: int, value: int) -> Damage:
    return weights(lambda data: struct.pack_into(f"<{kind}", data, offset, value))


def spec(change: Callable[[Any], object]) -> Damage:
    """Change the protobuf message of the model."""

    def damage(package: Path) -> None:
        message = import_messages("Model_pb2").Model.FromString((package / MODEL).read_bytes())
        change(message)
        (package / MODEL).write_bytes(message.SerializePartialToString())

    return damage


def block(message: Any) -> Any:
    function = message.mlProgram.functions["main"]
    return function.block_specializations[function.opset]


def stored(message: Any) -> Any:
    """The first value that lies in the weight file."""
    return next(
        operation.attributes["val"].blobFileValue
        for operation in block(message).operations
        if operation.attributes["val"].HasField("blobFileValue")
    )


def manifest(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(package: Path) -> None:
        told = json.loads((package / MANIFEST).read_text())
        made = change(told)
        (package / MANIFEST).write_text(json.dumps(told if made is None else made))

    return damage


def item(path: str) -> Damage:
    return manifest(lambda told: told["itemInfoEntries"][told["rootModelIdentifier"]].update(path=path))


def replaced(name: str, by: Callable[[Path], object]) -> Damage:
    def damage(package: Path) -> None:
        path = package / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        by(path)

    return damage


def link(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


def outside(package: Path) -> None:
    """The weights themselves, through a link out of the package."""
    shutil.move(package / WEIGHTS, package.parent / "elsewhere.bin")
    (package / WEIGHTS).symlink_to(package.parent / "elsewhere.bin")


WEIGHT_DAMAGE: dict[str, Damage] = {
    **{f"cut to {size}": cut(size) for size in (0, 1, 63, 64, 127, 128, 200)},
    "its last byte is missing": weights(lambda data: bytes(data[:-1])),
    "version 1": put("I", 4, 1),
    "version 2**32 - 1": put("I", 4, 2**32 - 1),
    "no blobs": put("I", 0, 0),
    "mark": put("I", 64, 0xDEADBEEE),
    "type 0": put("I", 68, 0),
    "another type": put("I", 68, 14),
    "type 2**32 - 1": put("I", 68, 2**32 - 1),
    "size 0": put("Q", 72, 0),
    "size 1": put("Q", 72, 1),
    "size 2**63": put("Q", 72, 2**63),
    "size 2**64 - 1": put("Q", 72, 2**64 - 1),
    "data at 0": put("Q", 80, 0),
    "data in its record": put("Q", 80, 64),
    "data at an odd place": put("Q", 80, 129),
    "data behind the end": put("Q", 80, 1 << 40),
    "data at 2**64 - 64": put("Q", 80, 2**64 - 64),
    "zeros": weights(lambda data: bytes(len(data))),
    "all ones": weights(lambda data: b"\xff" * len(data)),
    "shifted by one": weights(lambda data: b"\0" + bytes(data)),
    "shifted by 64": weights(lambda data: bytes(64) + bytes(data)),
    "a folder": replaced(WEIGHTS, Path.mkdir),
    "missing": replaced(WEIGHTS, lambda _: None),
    "a pipe": replaced(WEIGHTS, os.mkfifo),
    "a link out of the package": outside,
    "a link to itself": replaced(WEIGHTS, link("weight.bin")),
    "a link to nothing": replaced(WEIGHTS, link("nothing")),
    "a link to a device": replaced(WEIGHTS, link("/dev/zero")),
    "its folder is a link": replaced("Data/com.apple.CoreML/weights", link("/")),
    "its folder is a file": replaced("Data/com.apple.CoreML/weights", Path.touch),
    "offset 0": spec(lambda message: setattr(stored(message), "offset", 0)),
    "offset 65": spec(lambda message: setattr(stored(message), "offset", 65)),
    "offset 2**64 - 64": spec(lambda message: setattr(stored(message), "offset", 2**64 - 64)),
    "file name absolute": spec(lambda message: setattr(stored(message), "fileName", "/etc/passwd")),
    "file name leads out": spec(lambda message: setattr(stored(message), "fileName", "@model_path/../../../../x")),
    "file name empty": spec(lambda message: setattr(stored(message), "fileName", "")),
    "file name with NUL": spec(lambda message: setattr(stored(message), "fileName", "@model_path/a\0b")),
    "file name of 5,000": spec(lambda message: setattr(stored(message), "fileName", "@model_path/" + "x" * 5000)),
    "file name of the folder": spec(lambda message: setattr(stored(message), "fileName", "@model_path/weights")),
}


def dimension(of: Callable[[Any], Any], value: int) -> Damage:
    def change(message: Any) -> None:
        of(message).type.tensorType.dimensions[0].constant.size = value

    return spec(change)


def first_input(message: Any) -> Any:
    return message.mlProgram.functions["main"].inputs[0]


def described_shape(*sizes: int) -> Damage:
    def change(message: Any) -> None:
        shape = message.description.input[0].type.multiArrayType.shape
        del shape[:]
        shape.extend(sizes)

    return spec(change)


def both_shapes(*sizes: int) -> Damage:
    """An input that program and description agree about."""

    def change(message: Any) -> None:
        shape = message.description.input[0].type.multiArrayType.shape
        dimensions = first_input(message).type.tensorType.dimensions
        del shape[:], dimensions[:]
        shape.extend(sizes)
        for size in sizes:
            dimensions.add().constant.size = size
        first_input(message).type.tensorType.rank = len(sizes)

    return spec(change)


def nested(message: Any) -> None:
    """Blocks in blocks, as deep as protobuf reads them."""
    at = block(message)
    for _ in range(24):
        inner = at.operations.add()
        inner.type = "cond"
        at = inner.blocks.add()


def many_operations(message: Any) -> None:
    operations = block(message).operations
    operations[-1].type = "no_such_operation"
    for _ in range(20_000):
        operations.add().CopyFrom(operations[-1])


def literal(message: Any) -> None:
    """A constant of fewer numbers than its type says."""
    tensors = (operation.attributes["val"] for operation in block(message).operations if operation.type == "const")
    value = next(value for value in tensors if value.immediateValue.tensor.WhichOneof("value") == "ints")
    value.type.tensorType.dimensions.add().constant.size = 1 << 40
    value.type.tensorType.rank += 1


PACKAGE_DAMAGE: dict[str, Damage] = {
    "manifest: leads out": item("../../outside.mlmodel"),
    "manifest: absolute": item("/etc/passwd"),
    "manifest: a folder": item("com.apple.CoreML"),
    "manifest: empty path": item(""),
    "manifest: NUL": item("com.apple.CoreML/\0"),
    "manifest: 5,000 characters": item("x" * 5000),
    "manifest: surrogate": item("\ud800"),
    "manifest: names nothing": item("com.apple.CoreML/other.mlmodel"),
    "manifest: no such root": manifest(lambda told: told.update(rootModelIdentifier="x")),
    "manifest: root is a list": manifest(lambda told: told.update(rootModelIdentifier=[])),
    "manifest: items are a list": manifest(lambda told: told.update(itemInfoEntries=[])),
    "manifest: an item is a number": manifest(lambda told: told["itemInfoEntries"].update(x=3)),
    "manifest: format 2": manifest(lambda told: told.update(fileFormatVersion="2.0.0")),
    "manifest: format is a number": manifest(lambda told: told.update(fileFormatVersion=1)),
    "manifest: a list": manifest(lambda _: [1]),
    "manifest: empty": replaced(MANIFEST, Path.touch),
    "manifest: deep": replaced(MANIFEST, lambda path: path.write_text("[" * 100_000)),
    "manifest: not UTF-8": replaced(MANIFEST, lambda path: path.write_bytes(b'{"\xff": 1}')),
    "manifest: a link out": replaced(MANIFEST, link("/etc/passwd")),
    "manifest: a link to itself": replaced(MANIFEST, link(MANIFEST)),
    "manifest: missing": replaced(MANIFEST, lambda _: None),
    "manifest: a pipe": replaced(MANIFEST, os.mkfifo),
    "data: missing": replaced("Data", lambda _: None),
    "data: a link out": replaced("Data", link("/")),
    "model: missing": replaced(MODEL, lambda _: None),
    "model: empty": replaced(MODEL, Path.touch),
    "model: a pipe": replaced(MODEL, os.mkfifo),
    "model: a folder": replaced(MODEL, Path.mkdir),
    "model: a link out": replaced(MODEL, link("/etc/passwd")),
    "model: a device": replaced(MODEL, link("/dev/zero")),
    "model: noise": replaced(MODEL, lambda path: path.write_bytes(bytes(range(256)) * 40)),
    "model: zeros": replaced(MODEL, lambda path: path.write_bytes(bytes(4096))),
    "version 0": spec(lambda message: setattr(message, "specificationVersion", 0)),
    "version 10,000": spec(lambda message: setattr(message, "specificationVersion", 10_000)),
    "version -5": spec(lambda message: setattr(message, "specificationVersion", -5)),
    "a neural network": spec(lambda message: message.neuralNetwork.SetInParent()),
    "no functions": spec(lambda message: message.mlProgram.functions.clear()),
    "no main": spec(
        lambda message: (
            message.mlProgram.functions["other"].CopyFrom(message.mlProgram.functions["main"])
            or message.mlProgram.functions.pop("main")
        )
    ),
    "no blocks": spec(lambda message: message.mlProgram.functions["main"].block_specializations.clear()),
    "another opset": spec(lambda message: setattr(message.mlProgram.functions["main"], "opset", "CoreML99")),
    "no operations": spec(lambda message: block(message).operations.__delitem__(slice(None))),
    "no outputs": spec(lambda message: block(message).outputs.__delitem__(slice(None))),
    "an output of no operation": spec(lambda message: block(message).outputs.__setitem__(0, "nothing")),
    "described: no inputs": spec(lambda message: message.description.input.__delitem__(slice(None))),
    "described: no outputs": spec(lambda message: message.description.output.__delitem__(slice(None))),
    "described: another name": spec(lambda message: setattr(message.description.input[0], "name", "\x1b[31m\n")),
    "described: image": spec(
        lambda message: setattr(message.description.input[0].type.imageType, "width", 1 << 62)
    ),
    "described: negative": described_shape(-1, -7),
    "described: zero": described_shape(0, 0),
    "described: 2**62": described_shape(1 << 62, 1 << 62),
    "described: rank 1,000": described_shape(*[1] * 1000),
    "input: 2**40": dimension(first_input, 1 << 40),
    "input: 2**63": dimension(first_input, (1 << 64) - 1),
    "input: 0": dimension(first_input, 0),
    "input: 64 GB": both_shapes(1 << 17, 1 << 17),
    "input: 2**60 elements": both_shapes(1 << 30, 1 << 30),
    "input: rank 100": both_shapes(*[2] * 100),
    "operation: unknown": spec(lambda message: setattr(block(message).operations[-1], "type", "no_such_operation")),
    "operation: no name": spec(lambda message: setattr(block(message).operations[-1], "type", "")),
    "operation: no outputs": spec(lambda message: block(message).operations[-1].outputs.__delitem__(slice(None))),
    "operation: no inputs": spec(lambda message: block(message).operations[-1].inputs.clear()),
    "operation: itself as input": spec(
        lambda message: (
            next(iter(block(message).operations[-1].inputs.values()))
            .arguments[0]
            .__setattr__("name", block(message).operations[-1].outputs[0].name)
        )
    ),
    "operations: nested": spec(nested),
    "operations: 20,000 unknown ones": spec(many_operations),
    "constant: fewer numbers than it says": spec(literal),
}


UNDERSTOOD = {
    *("no main", "another opset", "described: image", "input: 64 GB"),
    *("operation: unknown", "operation: no name", "operation: no inputs", "operations: nested"),
    "operations: 20,000 unknown ones",
}
"""What commands that run nothing may show and copy: it would fit a later version of Core ML."""


def damaged(seeds: Path, place: Path, name: str, damage: Damage) -> None:
    """A folder ``place`` for a command: the package of that name damaged, all else as it is."""
    (place / "out").mkdir()
    (place / "in").mkdir()
    for path in seeds.iterdir():
        if name.startswith(f"{path.name}/"):
            shutil.copytree(path, place / "in" / path.name, copy_function=os.link)
        else:
            (place / "in" / path.name).symlink_to(path)
    package = place / "in" / name
    for path in (*package.rglob("*"),):
        if path.is_file():  # a link to the seeds' own
            data = path.read_bytes()
            path.unlink()
            path.write_bytes(data)
    damage(package)


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """A hang is an error of this test alone; no TimeoutError, which commands would take for the disk's."""

    def stop(*_: object) -> None:
        raise Hang(f"{SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def checked(place: Path, reader: Reader) -> int:
    """Run the command, and give the code that it ends with: in one line where that is not 0."""
    words = [part.replace("IN/", f"{place}/in/").replace("OUT/", f"{place}/out/") for part in reader.command]
    memory, since = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    outcome = call(words)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert time.process_time() - since < 20
    assert taken < MEGABYTES * 1000 * (1000 if sys.platform == "darwin" else 1), taken
    assert not outcome.error, outcome
    if outcome.code:
        lines = [line for line in outcome.said.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and outcome.said.strip().endswith(lines[0]), outcome.said
        assert len(lines[0]) < 2100 and lines[0].isprintable(), lines[0]
        assert list((place / "out").rglob("*")) == []
    return outcome.code


@pytest.mark.slow
@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("damage", WEIGHT_DAMAGE)
def test_damaged_weight_files(command: str, damage: str, seeds: Path, tmp_path: Path) -> None:
    damaged(seeds, tmp_path, READERS[command].package, WEIGHT_DAMAGE[damage])
    assert checked(tmp_path, READERS[command]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("damage", PACKAGE_DAMAGE)
def test_damaged_and_hostile_packages(command: str, damage: str, seeds: Path, tmp_path: Path) -> None:
    damaged(seeds, tmp_path, READERS[command].package, PACKAGE_DAMAGE[damage])
    shown = damage in UNDERSTOOD and command in ("inspect", "compile")
    assert checked(tmp_path, READERS[command]) in ((0, 2) if shown or damage == "version 10,000" else (2,))
