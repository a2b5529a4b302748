"""The Swift package builds and its tests pass. Where there is no Swift 6 toolchain, this is skipped and says so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "swift_bridge"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("swift") is None, reason="no `swift` on PATH: the Swift package is not tested"),
]


def test_the_swift_package_builds_without_warnings_and_passes_its_tests() -> None:
    command = ["swift", "test", "-j", "2", "-Xswiftc", "-warnings-as-errors"]
    # Its models are run by the command of this environment.
    environment = {**os.environ, "COREML_SD_COMMAND": str(Path(sys.executable).with_name("coreml-sd"))}
    done = subprocess.run(command, cwd=PACKAGE, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "Test run with" in done.stdout + done.stderr
