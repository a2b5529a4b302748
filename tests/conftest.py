"""Fixtures that every test may use."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import inspect
import itertools
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache, wraps
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from kill_points import Forks

# The Hub's tests talk to a server of their own, which huggingface_hub refuses where it is told to stay offline.
os.environ.pop("HF_HUB_OFFLINE", None)

TESTS = Path(__file__).resolve().parent
CHECKPOINTS = TESTS / "checkpoints"
MOST_LOADED = 24
"""So many models stay loaded: those of some families."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """A million objects are made while tests are collected, and none of them is garbage: they are never looked at.
    What is garbage later are networks, which conversions collect."""
    gc.disable()
    done = yield
    gc.freeze()
    gc.set_threshold(50_000)
    gc.enable()
    return done


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws without a seed of its own does not depend on the tests that its process had before."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


LONGEST = (
    "swift/test_pictures.py",  # first of all, as others wait until it has built the Swift package
    "test_fuzz.py",
    "convert/test_every_family.py",
    "test_readme.py",
    "convert/test_attention_weights.py",
    "runtime/test_sdxl_pictures.py",
    "runtime/test_diffusers_pipelines.py",
    "runtime/test_few_steps.py",
    "test_mac_report.py",
    "convert/test_layouts.py",
    "convert/test_mixed_bits.py",
    "convert/test_textual_inversion.py",
    "convert/test_folder_tokenizers.py",
    "convert/test_context_length.py",
    "convert/test_lora_parts.py",
    "convert/test_conversion.py",
    "runtime/test_evaluate.py",
    "runtime/test_scheduler_settings.py",
    "runtime/test_pipeline.py",
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
    """What `remembered` describes is kept for the run."""
    if "diffusion_convert.export.export" not in sys.modules:  # nothing is converted, and torch takes a second
        yield
        return
    import remembered
    from fuzz.worker import warm_up

    if "PYTEST_XDIST_WORKER" in os.environ:  # or the first conversions collect before the libraries are passed over
        warm_up()
    with remembered.conversions(shared / "remembered"), _old_objects_passed_over():
        yield


@contextmanager
def _old_objects_passed_over() -> Iterator[None]:
    """In this context, the garbage collector passes over all that is there when a conversion starts, as it does for
    a process that only converts: a million objects of libraries, models of fixtures. What a conversion collects
    after each network is little where networks are tiny, and looking for it is a tenth of the conversion: all of it
    is collected once in five conversions, each of which asks for it three times."""
    from diffusion_convert.conversion import convert as conversion
    from diffusion_runtime.coremltools_import import import_coremltools

    started = itertools.count()

    @contextmanager
    def settled_first() -> Iterator[None]:
        number = next(started)
        if number % 150 == 0:  # what was passed over may be garbage by now
            gc.unfreeze()
        if number % 15 == 0:
            gc.collect()
            gc.freeze()
        yield

    with ExitStack() as replaced:
        replaced.enter_context(mock.patch.object(conversion, "new_garbage_only", settled_first))
        # `ct.convert` collects at its end: where tests call it themselves, too.
        for module in (*_collecting(), import_coremltools("converters._converters_entry")):
            replaced.enter_context(mock.patch.object(module, "gc", SimpleNamespace(collect=lambda: 0)))
        yield


def _collecting() -> tuple[ModuleType, ...]:
    from diffusion_convert.conversion import palettized, part
    from diffusion_convert.palettize import checked
    from diffusion_convert.verification import compare

    return part, palettized, compare, checked


@pytest.fixture(scope="session")
def loaded_once(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Models that tests have made are, from here on, loaded once, and so are copies of them: lowering a program
    takes longer than running a network this small."""
    from diffusion_runtime.backends.torch_mil import TorchBackend
    from diffusion_runtime.errors import DiffusionError

    load, own = TorchBackend.load, {shared, tmp_path_factory.getbasetemp()}
    kept: dict[object, Any] = {}
    unchanged = tmp_path_factory.mktemp("loaded")  # weights stay mapped, and tests change what they loaded

    def anew(backend: TorchBackend, path: Path, *given: Any, **named: Any) -> Any:
        copy = Path(tempfile.mkdtemp(dir=unchanged), path.name)
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
        try:
            return load(backend, copy, *given, **named)
        except DiffusionError:
            load(backend, path, *given, **named)  # its error names the path
            raise

    @wraps(load)
    def loaded(backend: TorchBackend, path: Path, *given: Any, **named: Any) -> Any:
        # What is not fused is for verification, which fuses it. Links and devices are tests of what is refused.
        if not (backend.fuse and own.intersection(path.parents) and _is_plain(path)):
            return load(backend, path, *given, **named)
        key = _content(path), backend, given, *sorted(named.items())
        model = kept.pop(key, None) or anew(backend, path, *given, **named)
        kept[key] = model  # the last one used is the last
        if len(kept) > MOST_LOADED:
            shutil.rmtree(kept.pop(next(iter(kept))).path.parent, ignore_errors=True)
        return replace(model, path=path)

    with mock.patch.object(TorchBackend, "load", loaded):
        yield


def _is_plain(path: Path) -> bool:
    """Whether there is a file, or a folder of files and folders alone."""
    states = [one.lstat() for one in (path, *path.rglob("*"))] if path.exists() else []
    kinds = {stat.S_IFMT(one.st_mode) for one in states}
    return bool(states) and kinds <= {stat.S_IFREG, stat.S_IFDIR} and sum(one.st_size for one in states) < 1 << 26


def _content(path: Path) -> tuple[tuple[str, str], ...]:
    """Of a model's files, wherever it lies."""
    files = sorted(one for one in (path, *path.rglob("*")) if one.is_file())
    states = ((file, file.stat()) for file in files)
    digests = [_digest(file, state.st_size, state.st_mtime_ns) for file, state in states]
    return tuple(zip([f"{path.suffix}/{file.relative_to(path)}" for file in files], digests, strict=True))


@lru_cache(1000)
def _digest(file: Path, *_: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are built, run, traced and converted, whether or not they were before, and let go of: for tests of
    how."""
    from diffusion_convert.export import export
    from diffusion_convert.verification import compare
    from diffusion_runtime.backends.torch_mil import TorchBackend

    for module, name in (
        (export, "_program"),
        (export, "_convert"),
        (compare, "reference"),
        (TorchBackend, "load"),  # see `loaded_once`
    ):
        monkeypatch.setattr(module, name, inspect.unwrap(getattr(module, name)))
    for module in _collecting():
        monkeypatch.setattr(module, "gc", gc)


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
def forked_python() -> Iterator[Path]:
    """A program that stands for ``sys.executable`` where ``-c`` follows, and has imported the libraries."""
    program, path = str(TESTS / "forked.py"), os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="coreml-sd-") as folder:  # its name must be short: a socket's is
        address, words = Path(folder, "socket"), Path(folder, "python")
        words.write_text(f'#!/bin/sh\nexec "{sys.executable}" -IS "{program}" "{address}" "$@"\n')
        words.chmod(0o700)
        start = [sys.executable, program, str(address)]
        with subprocess.Popen(start, env=environment, stdin=subprocess.DEVNULL) as server:
            while not address.exists():
                assert server.poll() is None, "the process that others are forked from has ended"
                time.sleep(0.05)
            yield words
            server.terminate()


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Of a process that has imported what it is asked to run, and no more."""
    with Forks() as small:
        yield small


@pytest.fixture(scope="session")
def coreml_sd(forked_python: Path) -> Path:
    """A program that stands for `coreml-sd`, and has imported the libraries."""
    words = forked_python.with_name("coreml-sd")
    words.write_text(f'#!/bin/sh\nexec "{forked_python}" -c "from coreml_sd import main; main()" "$@"\n')
    words.chmod(0o700)
    return words


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
    attention alone, verified. ``compiled=True`` adds compiled models. Shared: copy it to change it, or to convert
    more to it."""
    from diffusion_convert import ConvertOptions, convert

    def folder(name: str, compiled: bool = False) -> Path:
        def write(place: Path) -> None:
            own = CHECKPOINTS / name
            if compiled:
                shutil.copytree(folder(name), place / "models")
            options = ConvertOptions("original", compiled=compiled, zip=False)
            convert(own if own.is_dir() else tiny_checkpoint(name), place / "models", options)

        return build_once(f"converted-{name}{'-compiled' * compiled}", write) / "models"

    return folder


@pytest.fixture(scope="session")
def controlnets(build_once: BuildOnce) -> Callable[[str], Path]:
    """``controlnets("sd1")``: a folder of tiny ControlNets for the tiny checkpoints of that kind; shared."""
    import tiny_controlnets

    def write(folder: Path) -> None:
        pools = {"global_pool_conditions": True, "controlnet_conditioning_channel_order": "bgr"}
        tiny_controlnets.build("sd1", folder / "sd1" / "edges_v1-tiny")
        tiny_controlnets.build("sd1", folder / "sd1" / "shuffle", 1, **pools)
        tiny_controlnets.build("sd1", folder / "sd1" / "tile", 2)
        tiny_controlnets.build("sdxl", folder / "sdxl" / "edges", 3)

    return lambda kind: build_once("controlnets", write) / kind


@pytest.fixture(scope="session")
def steered(
    build_once: BuildOnce, tiny_checkpoint: Callable[[str], Path], controlnets: Callable[[str], Path]
) -> Callable[[str], Path]:
    """``steered("sd1")``: what `convert` writes for a tiny checkpoint with its ControlNets, compiled and zipped;
    of SDXL packages alone, and no other UNet than the one that is steered. Shared."""
    from diffusion_convert import ConvertOptions, convert

    def folder(kind: str) -> Path:
        def write(place: Path) -> None:
            first = kind == "sd1"
            options = ConvertOptions(
                "original",
                controlnets=sorted(controlnets(kind).iterdir()),
                only_controlled=not first,
                compiled=first,
                zip=first,
            )
            convert(tiny_checkpoint(kind), place / "models", options)

        return build_once(f"steered-{kind}", write) / "models"

    return folder
