"""Fixtures that every test may use."""

from __future__ import annotations

import fcntl
import gc
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# The Hub's tests talk to a server of their own, which huggingface_hub refuses where it is told to stay offline.
os.environ.pop("HF_HUB_OFFLINE", None)

TESTS = Path(__file__).resolve().parent
CHECKPOINTS = TESTS / "checkpoints"
_MODULES_OF_A_LIBRARY = 50
_settled_modules = [0]


def pytest_runtest_setup() -> None:
    """Let the garbage collector pass over the million objects that libraries hold, as `coreml-sd convert` does: a
    conversion collects dozens of times, and each time that took longer than converting a tiny network."""
    if len(sys.modules) >= _settled_modules[0] + _MODULES_OF_A_LIBRARY:
        gc.collect()
        gc.freeze()
        _settled_modules[0] = len(sys.modules)


LONGEST = (
    "swift/test_pictures.py",  # first of all, as others wait until it has built the Swift package
    "test_fuzz.py",
    "convert/test_every_family.py",
    "runtime/test_batch.py",
    "test_readme.py",
    "convert/test_attention_weights.py",
    "runtime/test_sdxl_pictures.py",
    "runtime/test_diffusers_pipelines.py",
    "runtime/test_few_steps.py",
)
"""The files that take longest, in the order in which they are begun."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first, then those with slow tests: `make test` gives whole files to whoever is free, as their
    fixtures are made once for each, and the last ones should be small, or a worker waits for minutes."""
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (places.get(item.path, len(places)), item.path not in slow))


BuildOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes of a run."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "built-once"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _networks_are_converted_once(shared: Path) -> Iterator[None]:
    """What coremltools makes of a network is kept for the run (`remembered`)."""
    if "diffusion_convert.export.export" not in sys.modules:  # nothing is converted, and torch takes a second
        yield
        return
    import remembered

    folder = shared / "remembered"
    folder.mkdir(exist_ok=True)
    with remembered.conversions(folder):
        yield


@pytest.fixture
def coremltools_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports call coremltools, whether or not that network has been converted before: for tests of that call."""
    from diffusion_convert.export import export

    monkeypatch.setattr(export, "_convert", inspect.unwrap(export._convert))


@pytest.fixture(scope="session")
def build_once(shared: Path) -> BuildOnce:
    """``build_once(name, write)``: a folder that ``write(folder)`` makes, once for all processes of a run: what one
    is making, the others wait for. It is shared: do not change it."""

    def built(name: str, write: Callable[[Path], object]) -> Path:
        folder, unfinished = shared / name, shared / f".{name}"
        with (shared / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                write(unfinished)
                unfinished.rename(folder)
        return folder

    return built


@pytest.fixture(scope="session")
def tiny_checkpoint(build_once: BuildOnce) -> Callable[[str], Path]:
    """``tiny_checkpoint("sd2-v")``: the folder of a tiny random checkpoint of that family, written once per run
    (`tiny_checkpoints.RECIPES` lists the families). It is shared: do not change it."""
    import tiny_checkpoints

    def folder(family: str) -> Path:
        return build_once(f"checkpoint-{family}", lambda to: tiny_checkpoints.build(family, to / family)) / family

    return folder


@pytest.fixture(scope="session")
def converted(build_once: BuildOnce, tiny_checkpoint: Callable[[str], Path]) -> Callable[..., Path]:
    """``converted("sd1")``: what `convert` writes for a tiny checkpoint, or one of tests/checkpoints, with original
    attention alone, verified, with placeholders for weights as small as these, as if they had the sizes of real
    ones. ``compiled=True`` adds compiled models. Shared: copy it to change it, or to convert more to it."""
    from diffusion_convert import ConvertOptions, convert
    from diffusion_convert.export import placeholders

    def folder(name: str, compiled: bool = False) -> Path:
        def write(place: Path) -> None:
            own = CHECKPOINTS / name
            if compiled:
                shutil.copytree(folder(name), place / "models")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(placeholders, "MIN_SIZE", 64)
                options = ConvertOptions("original", compiled=compiled, zip=False)
                convert(own if own.is_dir() else tiny_checkpoint(name), place / "models", options)

        return build_once(f"converted-{name}{'-compiled' * compiled}", write) / "models"

    return folder
