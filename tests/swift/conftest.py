"""The Swift program, built once for all tests of this folder; where there is no toolchain they are skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "swift_bridge"
BUILT = PACKAGE / ".build" / "debug"
"""Not as for use: the optimizer takes as long as all these tests, and they look at results."""

FLAGS = (
    *("-gnone", "-warnings-as-errors", "-index-ignore-system-modules"),
    # Each module is compiled in one piece: two thirds of the processor time.
    *("-wmo", "-num-threads", "1", "-no-emit-module-separately-wmo"),
    # As in Package.swift: what runs the tests would have C's modules compiled again for another language mode.
    *("-swift-version", "6"),
)

Swift = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def toy_folder(build_once: Callable[..., Path]) -> Path:
    """Packages that compute next to nothing, with a manifest."""
    return _toy(build_once, has_refiner=False)


@pytest.fixture(scope="session")
def toy_with_refiner(build_once: Callable[..., Path]) -> Path:
    """The same with two text encoders and a refiner."""
    return _toy(build_once, has_refiner=True)


def _toy(build_once: Callable[..., Path], has_refiner: bool) -> Path:
    import toy_models

    packages = Path("models", "original", "packages")
    name = "toy-with-refiner" if has_refiner else "toy"
    return build_once(name, lambda to: toy_models.write(to / packages, has_refiner=has_refiner)) / packages


@pytest.fixture(scope="session")
def swift_environment(coreml_sd: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Without Core ML, models are run by the command of this environment. What its stand-in compiles lies where
    temporary files do, and stays, as Core ML's does."""
    if shutil.which("swift") is None:
        pytest.skip("no `swift` on PATH: the Swift package is not tested")
    command = os.environ.get("COREML_SD_COMMAND", str(coreml_sd))
    return {**os.environ, "COREML_SD_COMMAND": command, "TMPDIR": str(tmp_path_factory.mktemp("swift"))}


@pytest.fixture(scope="session")
def built_swift_environment(swift_environment: dict[str, str]) -> dict[str, str]:
    """The same, with the package, its program and its tests built once for all."""
    build = ["swift", "build", "--build-tests", "-j", "2", *(word for flag in FLAGS for word in ("-Xswiftc", flag))]
    built = subprocess.run(build, cwd=PACKAGE, env=swift_environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, (built.stdout + built.stderr)[-6000:]
    return swift_environment


@pytest.fixture(scope="session")
def swift_program(built_swift_environment: dict[str, str]) -> Swift:
    """``swift_program("generate", …)`` runs `coreml-sd-swift` with these arguments."""
    program = BUILT / "coreml-sd-swift"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [program, *arguments], env=built_swift_environment, capture_output=True, text=True, check=False
        )

    return run
