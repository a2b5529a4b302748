"""The Swift package builds without warnings and its tests pass, those that need models included."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import toy_models
from swift.conftest import PACKAGE


@pytest.mark.slow
def test_the_swift_package_passes_its_tests(
    toy_folder: Path, toy_with_refiner: Path, built_swift_environment: dict[str, str], tmp_path: Path
) -> None:
    command = ["swift", "test", "--skip-build", "--no-parallel"]
    # These tests kill the process that runs the models: it must be that process, not the one that stands for it in
    # `coreml_sd` and can be outlived for a moment by what it started.
    alone = tmp_path / "coreml-sd"
    alone.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "from coreml_sd import main; main()" "$@"\n')
    alone.chmod(0o700)
    environment = {
        **built_swift_environment,
        "COREML_SD_COMMAND": str(alone),
        "BRIDGE_MODELS": str(toy_folder),
        "BRIDGE_REFINER": str(toy_with_refiner),
        "BRIDGE_DESCRIBED": str(toy_models.described(tmp_path / "described.mlpackage")),
    }
    done = subprocess.run(command, cwd=PACKAGE, env=environment, capture_output=True, text=True, check=False)
    failures = [line for line in done.stdout.splitlines() if "issue" in line or "error:" in line]
    assert done.returncode == 0, "\n".join(failures) + (done.stdout + done.stderr)[-3000:]
    assert "Suite PipelineTests passed" in done.stdout + done.stderr
    assert "Suite StandInTests passed" in done.stdout + done.stderr
