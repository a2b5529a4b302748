"""`coreml-sd batch` as a process and its workers: kills, workers that die, Ray."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import spawn
from pathlib import Path
from typing import Any

import pytest

from batches import Make, pictures, results, without_time, write
from diffusion_runtime.batch.local import LocalWorkers
from diffusion_runtime.batch.on_ray import RayWorkers, connect
from diffusion_runtime.batch.places import Folder
from diffusion_runtime.batch.run import Batch, prepare, setups
from diffusion_runtime.errors import InputError
from forked import process_of

COMMAND = ["-c", "from diffusion_convert.cli.main import main; main()", "batch"]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(forked_python: Path) -> Run:
    def done(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(forked_python), *COMMAND, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)

    return done


@pytest.fixture
def forked_workers(forked_python: Path) -> Iterator[None]:
    """Those that this process starts, without the seconds that imports take."""
    before = spawn.get_executable()
    spawn.set_executable(str(forked_python))
    yield
    spawn.set_executable(before)


def test_the_command_says_what_came_of_it(run: Run, toy_folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", "image": "gone.png"}])
    arguments = (toy_folder, tmp_path / "p.jsonl", "-o", tmp_path / "out", "--steps", 2, "--backend", "torch")
    shown = run(*arguments)
    assert shown.returncode == 1 and "gone.png: no such file" in shown.stderr and "1 rows failed" in shown.stderr
    assert "1 pictures, results.jsonl" in shown.stdout
    wrong = run(tmp_path / "nothing", tmp_path / "p.jsonl", "-o", tmp_path / "other")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_two_hundred_rows_killed_five_times_are_those_of_an_undisturbed_run(
    run: Run, forked_python: Path, toy_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {n}\n" for n in range(200)))

    def arguments(place: str, workers: int) -> list[str]:
        chosen = ["--steps", "2", "--backend", "torch", "--threads", "1", "--workers", str(workers)]
        return [str(toy_folder), str(tmp_path / "prompts.txt"), "-o", str(tmp_path / place), *chosen]

    whole = run(*arguments("whole", 1))
    assert whole.returncode == 0, whole.stderr
    drawn = random.Random(3)
    for moment in sorted(drawn.sample(range(1, 190), 5)):
        started = subprocess.Popen(
            [forked_python, *COMMAND, *arguments("killed", 2)],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        killed_at = moment if drawn.random() < 0.8 else 0  # now and then before anything is made
        while started.poll() is None and len(pictures(tmp_path / "killed")) < killed_at:
            time.sleep(0.01)
        # Now the whole group, now the first process alone, whose workers must notice.
        kill = os.killpg if drawn.random() < 0.5 else os.kill
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            kill(process_of(forked_python, started), signal.SIGKILL)
        started.wait()
    last = run(*arguments("killed", 2))
    assert last.returncode == 0, last.stderr
    assert pictures(tmp_path / "killed") == pictures(tmp_path / "whole")
    assert without_time(results(tmp_path / "killed")) == without_time(results(tmp_path / "whole"))
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {
        *pictures(tmp_path / "whole"),
        "results.jsonl",
    }


@pytest.mark.usefixtures("forked_workers")
def test_a_worker_that_dies_is_replaced_and_its_row_made(toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"{n}\n" for n in range(6)))
    place = Folder(tmp_path / "out")
    of = setups(str(toy_folder), {"backend": "torch"}, str(place.path), 1, 1, None, None)
    workers = LocalWorkers(of)
    with place.hold():
        batch = Batch(prepare(tmp_path / "prompts.txt", place, {"steps": 2}, 1, of), place, workers)
        for answer in batch.run():
            if answer.task.number == 2:
                os.kill(workers.running[0].child.process.pid, signal.SIGKILL)
    assert [line["error"] for line in results(place.path)] == [None] * 6


@pytest.mark.usefixtures("forked_workers")
def test_a_row_whose_worker_always_dies_is_given_up(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("a\n")
    place = Folder(tmp_path / "out")
    of = setups(str(toy_folder), {"backend": "torch"}, str(place.path), 1, 1, None, None)
    workers = LocalWorkers(of)
    given = LocalWorkers._heard

    def heard(self: LocalWorkers, one: Any, waiting: Any) -> Any:
        answer = given(self, one, waiting)
        if one.is_ready and one.task is None and answer is None:
            one.child.process.kill()
        return answer

    monkeypatch.setattr(LocalWorkers, "_heard", heard)
    with place.hold():
        batch = Batch(prepare(tmp_path / "prompts.txt", place, {"steps": 2}, 1, of), place, workers)
        list(batch.run())
    assert "SIGKILL" in results(place.path)[0]["error"] and "3 times" in results(place.path)[0]["error"]


@pytest.fixture
def ray() -> Iterator[Any]:
    found = connect("local")
    yield found
    found.shutdown()


@pytest.mark.slow
def test_ray_makes_the_same_pictures_and_survives_a_dead_actor(
    toy_folder: Path, make: Make, tmp_path: Path, ray: Any
) -> None:
    (tmp_path / "prompts.txt").write_text("".join(f"{n}\n" for n in range(12)))
    expected = make(tmp_path / "prompts.txt", tmp_path / "out")
    place = Folder(tmp_path / "ray")
    of = setups(str(toy_folder), {"backend": "torch"}, str(place.path), 1, 2, None, None)
    killed = False
    with place.hold():
        batch = Batch(prepare(tmp_path / "prompts.txt", place, {"steps": 2}, 1, of), place, RayWorkers(ray, of))
        for _ in batch.run():
            if not killed:
                killed = True
                actor = next(iter(ray.util.list_named_actors(all_namespaces=True)))
                ray.kill(ray.get_actor(actor["name"], actor["namespace"]))
    assert without_time(results(place.path)) == without_time(expected)
    assert pictures(place.path) == pictures(tmp_path / "out")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "somewhere", "127.0.0.1:99999", "h:p"])
def test_a_cluster_that_does_not_answer_is_one_line(address: str) -> None:
    with pytest.raises(InputError, match=rf"^--ray {re.escape(address)}: "):
        connect(address)
