"""A disk that is full, whatever writes and whichever file it is: exit code 2, one line that names the path and says
what to do, nothing half-written, the earlier output as it was, and the same command goes on once there is room.

The system refuses to make any file longer than a limit (RLIMIT_FSIZE), in the place where a full disk refuses it.
"""

from __future__ import annotations

import gc
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from huggingface_hub import constants

import small_bundle
import tiny_checkpoints
import toy_models
from diffusion_convert.bundle.folder import BundleOptions, bundle_folder
from diffusion_runtime.atomic import WORK_FOLDER
from fuzz.worker import Outcome, call
from hub_server import Hub, serving
from kill_points import Forks

BuildOnce = Callable[..., Path]
Contents = dict[str, bytes | None]
REMEDY = "the disk is full; free some room and run the same command again"
MOST_LIMITS = 3


@dataclass(frozen=True, slots=True)
class Writer:
    """A command with "PLACE" for the folder that it works in and "HUB" for a server; ``output`` is what it writes
    there, ``seeds`` what it reads, ``older`` writes an earlier output of the same name."""

    command: tuple[str, ...]
    output: str
    seeds: tuple[str, ...]
    older: Callable[[Path], object] | None = None


def file(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def folder(path: Path) -> None:
    """An earlier package or compiled model."""
    path.mkdir(parents=True)
    for name in ("Manifest.json", "coremldata.bin", "model.mlmodel"):
        (path / name).write_text("{}")


def palettize(*options: str) -> tuple[str, ...]:
    return ("palettize", "PLACE/large.mlpackage", "-o", "PLACE/small.mlpackage", "--no-check", *options)


def generate(*options: str) -> tuple[str, ...]:
    return ("generate", "PLACE/toys", "--prompt", "a cat", "-o", "PLACE/new/p.png", "--seed", "1", "--steps", "2",
            "--backend", "torch", *options)  # fmt: skip


CONVERT = ("convert", "PLACE/sd1", "-o", "PLACE/models", "--components", "text_encoder", "--attention", "original")
COMPILE = ("compile", "PLACE/large.mlpackage", "-o", "PLACE/out", "--name", "Model")
WRITERS = {
    "convert": Writer(CONVERT, "models", ("sd1",)),
    "compile": Writer(COMPILE, "out/Model.mlmodelc", ("large.mlpackage",), folder),
    "palettize": Writer(palettize(), "small.mlpackage", ("large.mlpackage",), folder),
    "palettize --save-recipe": Writer(
        palettize("--save-recipe", "PLACE/recipe.json"), "recipe.json", ("large.mlpackage",), file("{}")
    ),
    "palettize --plot": Writer(
        palettize("--target-bits", "5", "--plot", "PLACE/plot.png"), "plot.png", ("large.mlpackage",), file("")
    ),
    "bundle --zip": Writer(("bundle", "PLACE/models", "--zip"), "models", ("models",)),
    "bundle": Writer(("bundle", "PLACE/toys"), "toys", ("toys",)),
    "generate": Writer(generate(), "new/p.png", ("toys",), file("an older picture")),
    "generate --preview": Writer(generate("--preview"), "new/p.png", ("toys",), file("an older picture")),
    "bench --report": Writer(
        ("bench", "PLACE/toys", "--runs", "1", "--backend", "torch", "--report", "PLACE/report.json"),
        "report.json",
        ("toys",),
        file("an older report"),
    ),
    "download": Writer(("download", "maker/model", "-o", "PLACE/out", "--endpoint", "HUB"), "out", ()),
    "publish": Writer(
        ("publish", "PLACE/bundled", "--repo-id", "maker/new", "--endpoint", "HUB"), "bundled", ("bundled",)
    ),
}


@pytest.fixture(scope="module")
def seeds(build_once: BuildOnce, tiny_package: BuildOnce) -> Path:
    def write(to: Path) -> None:
        tiny_checkpoints.build("sd1", to / "sd1")
        small_bundle.write_bundle(to / "models")
        bundle_folder(small_bundle.write_bundle(to / "bundled", ("original",)), BundleOptions(card=False))
        toy_models.write(to / "toys" / "original" / "packages")
        shutil.copytree(tiny_package(), to / "large.mlpackage")

    return build_once("full-disk", write)


@pytest.fixture(scope="module")
def forks(forked_python: Path, shared: Path) -> Iterator[Forks]:
    """Of a process in which commands have been run once: what they import, those that are forked find there."""
    with Forks(forked_python, COREML_SD_REMEMBERED=str(shared / "remembered")) as one:
        one.call(no_xet)
        yield one


def no_xet() -> None:
    constants.HF_HUB_DISABLE_XET = True


@pytest.fixture
def hub(seeds: Path) -> Iterator[Hub]:
    files = {name: data for name, data in contents(seeds / "bundled").items() if data is not None}
    with serving(Hub(files=files, exists=True, commits=["first"])) as running:
        yield running


def prepared(writer: Writer, seeds: Path, place: Path, older: bool, hub: Hub) -> tuple[str, ...]:
    """Fill ``place``; the command."""
    place.mkdir()
    for name in writer.seeds:
        shutil.copytree(seeds / name, place / name)
    if older and writer.older is not None:
        (place / writer.output).parent.mkdir(parents=True, exist_ok=True)
        writer.older(place / writer.output)
    return tuple(part.replace("PLACE", str(place)).replace("HUB", hub.endpoint) for part in writer.command)


def limited(command: tuple[str, ...], longest: int) -> Outcome:
    """The command in a process that cannot write any file of more than ``longest`` bytes (-1: no limit)."""
    context = get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_limited, args=(command, longest, there))
    child.start()
    there.close()
    try:
        outcome: Outcome = here.recv()
    finally:
        child.join()
    return outcome


def _limited(command: tuple[str, ...], longest: int, answer: Connection) -> None:
    gc.freeze()  # or a collection would look at all that is imported, and copy it
    if longest >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (longest, resource.RLIM_INFINITY))
    answer.send(call(command))


def contents(folder: Path) -> Contents:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def visible(found: Contents) -> Contents:
    """Without work that the next run goes on with, and the folder that is there for it."""
    hidden = {name for name in found if WORK_FOLDER in name.split("/")}
    holders = {name for name in found if f"{name}/{WORK_FOLDER}" in hidden}
    return {name: data for name, data in found.items() if name not in hidden | holders}


def entries(found: Contents) -> dict[str, Contents]:
    """By what stands in the folder itself."""
    return {
        name: {path: data for path, data in found.items() if path.split("/")[0] == name}
        for name in {path.split("/")[0] for path in found}
    }


def limits(before: Contents, after: Contents) -> list[int]:
    """Each fails: nothing at all, and less than a file that was written has (times in records make a byte or two of
    difference); the sizes are spread."""
    sizes = sorted({len(data) for name, data in after.items() if data and before.get(name) != data})
    some = (
        sizes
        if len(sizes) <= MOST_LIMITS
        else [sizes[n * (len(sizes) - 1) // (MOST_LIMITS - 1)] for n in range(MOST_LIMITS)]
    )
    return [0, *(size * 9 // 10 for size in some)]


CASES = [(name, older) for name, writer in WRITERS.items() for older in (False, True) if writer.older or not older]
"""What a conversion or a bundle had there before is left as it was too: other tests show it."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "older"), CASES)
def test_a_full_disk_is_named_and_nothing_is_touched(
    name: str, older: bool, seeds: Path, hub: Hub, forks: Forks, tmp_path: Path
) -> None:
    writer = WRITERS[name]
    undisturbed = tmp_path / "undisturbed"
    command = prepared(writer, seeds, undisturbed, older, hub)
    start = contents(undisturbed)
    outcome = forks.call(call, command)
    assert (outcome.code, outcome.error) == (0, ""), outcome
    after = contents(undisturbed)
    for longest in limits(start, after):
        place = tmp_path / f"at-{longest}"
        command = prepared(writer, seeds, place, older, hub)
        outcome = forks.call(limited, command, longest)
        assert (outcome.code, outcome.error) == (2, ""), (longest, outcome)
        said = [line for line in outcome.said.splitlines() if line.startswith("error:")]
        assert len(said) == 1 and said[0].endswith(REMEDY), (longest, outcome.said)
        named = Path(said[0].removeprefix("error: ").partition(": ")[0])
        assert named != place and named.is_relative_to(place) and WORK_FOLDER not in named.parts, said
        found = entries(visible(contents(place)))
        assert found.keys() >= entries(start).keys()
        # Of two results (--plot), the first may be there as a whole.
        assert [n for n in found if found[n] not in (entries(start).get(n), entries(after).get(n))] == [], longest
        again = forks.call(limited, command, -1)
        assert (again.code, again.error) == (0, ""), again
        assert contents(place).keys() == after.keys()
