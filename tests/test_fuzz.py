"""Short forms of `make fuzz`: a few damaged inputs of every kind, kills and races of every command."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from fuzz import inputs
from fuzz.mutate import damaged
from fuzz.targets import TARGETS
from fuzz.worker import CPU_SECONDS

TESTS = Path(__file__).resolve().parent


WAYS = ("a folder", "a link to nowhere", "a pipe", "a device")


@pytest.fixture(scope="module")
def seeded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seeded")


@pytest.mark.slow
def test_damaged_inputs_are_refused_in_one_line_or_read(seeded: Path, forked_python: Path) -> None:
    results = list(inputs.run(seeded, 0, len(TARGETS), python=forked_python))
    assert {result["target"] for result in results} == set(TARGETS)
    assert [(result["case"], result["problems"]) for result in results if result["problems"]] == []


@pytest.mark.slow
def test_what_is_no_file_is_refused_or_not_needed(seeded: Path, forked_python: Path) -> None:
    """Of every kind of file that the commands read: nothing is waited for, nothing is read without an end."""
    results = list(inputs.run(seeded, 0, len(WAYS) * len(TARGETS), ways=WAYS, python=forked_python))
    assert [result["target"] for result in results] == [*TARGETS] * len(WAYS)
    shown = [(WAYS[result["case"] // len(TARGETS)], result["target"], result["problems"]) for result in results]
    assert [one for one in shown if one[-1]] == []
    accepted = {result["target"] for result in results if result["code"] == 0}
    assert accepted <= NOT_READ, "what is passed over is taken for a file that was never there"


NOT_READ = {"safety-config", "depth-config", "toy-package", "compiled", "toy-compiled"}
"""Targets with files that some commands do not read: a picture processor's settings, a package not needed."""


@pytest.mark.slow
def test_kills_and_races_lose_nothing_and_leave_nothing(forked_python: Path, shared: Path, tmp_path: Path) -> None:
    """In a process of its own: what is forked must have no other threads. Conversions are remembered: most of their
    time was coremltools', in which a kill shows nothing, as nothing is written."""
    code = "import sys; from fuzz.kills import main; sys.exit(main())"
    command = [str(forked_python), "-c", code, "--kills", "10", "--races", "4"]
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["COREML_SD_REMEMBERED"] = str(shared / "remembered")
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 0, run.stdout


FAULTS = {
    "import os; os.system('true')": "runs",
    "import subprocess; subprocess.run(['true'])": "runs",
    "open('/tmp/fuzz-outside', 'w')": "writes outside",
    "raise KeyError('x')": "traceback",
    "while True: pass": "hang",
    "bytearray(1 << 40)": "memory",
    "open('left', 'w')": "writes outside",
    "import tempfile; tempfile.mkstemp()": "left",
    "raise SystemExit(2)": "says no error",
}


@pytest.mark.parametrize(("code", "problem"), FAULTS.items(), ids=FAULTS)
def test_the_harness_sees_what_it_looks_for(code: str, problem: str, forked_python: Path, tmp_path: Path) -> None:
    """A command that does wrong in each way: what finds nothing must be able to find something."""
    program = f"""
import json, sys
from pathlib import Path
from fuzz import worker
import diffusion_convert.cli.main as cli
worker.CPU_SECONDS = 1
worker.TARGETS = {{"any": worker.Target("seed", ("file.json",), (("inspect", "IN"),))}}
cli.main = lambda: exec({code!r})
worker.limit_memory()
print(json.dumps(worker.run_case(worker.Case(0), Path(sys.argv[1]).resolve())["problems"]))
"""
    (tmp_path / "seeds" / "seed").mkdir(parents=True)
    (tmp_path / "seeds" / "seed" / "file.json").write_text("{}")
    environment = inputs._environment()
    run = subprocess.run(
        [forked_python, "-c", program, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert any(found.startswith(problem) for found in json.loads(run.stdout.splitlines()[-1])), run.stdout
    assert CPU_SECONDS == 20


def test_a_number_is_the_same_damage_each_time() -> None:
    from random import Random

    data = json.dumps({"a": [1, 2, {"b": "c"}], "d": 0.5}).encode()
    made = [damaged("config.json", data, Random(number)) for number in range(50)]
    assert made == [damaged("config.json", data, Random(number)) for number in range(50)]
    assert len(set(made)) > 30
