"""Commands that are killed at random moments, and pairs of commands with one output.

    python -m fuzz.kills --kills 300 --seed 0

Every scenario is run once undisturbed. Then the same command is killed (SIGKILL, once or several times in a row)
and run again to its end. At every moment what can be seen is whole: the old result, the new one, or nothing; the
end is what the undisturbed run made, and nothing else is left in the output, beside it or among temporary files.
In a race two processes run the command at once: one at least succeeds, the other succeeds or says in one line why
not, and what is there is whole. Commands run in forks of a process that has imported everything, so that kills hit
the work and not the imports. Ends with status 1 where something failed.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random

import tiny_checkpoints
import toy_models
from fuzz.worker import call, warm_up

Prepare = Callable[[Path, Path], None]
"""Makes what is there before the command in a folder, from the folder of seeds."""
PATIENCE_SECONDS = 300.0
CONVERT = (
    "convert",
    "SEEDS/sd1",
    "-o",
    "models",
    "--components",
    "text_encoder",
    "--attention",
    "original",
    "--no-verify",
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """``command`` runs in a folder that ``prepare`` filled; everything in the folder counts. ``whole`` are the
    depths of what appears as a whole: "models/original" and so on, as patterns."""

    name: str
    command: tuple[str, ...]
    prepare: Prepare
    whole: tuple[str, ...]


def _nothing(_: Path, __: Path) -> None:
    pass


def _older_conversion(seeds: Path, folder: Path) -> None:
    shutil.copytree(seeds / "older", folder / "models")


def _packages(seeds: Path, folder: Path) -> None:
    shutil.copytree(seeds / "packages", folder / "models")


def _package(seeds: Path, folder: Path) -> None:
    shutil.copytree(seeds / "model.mlpackage", folder / "model.mlpackage")


def _package_and_older(seeds: Path, folder: Path) -> None:
    _package(seeds, folder)
    shutil.copytree(seeds / "small.mlpackage", folder / "small.mlpackage")


def _package_and_compiled(seeds: Path, folder: Path) -> None:
    _package(seeds, folder)
    shutil.copytree(seeds / "older.mlmodelc", folder / "out" / "model.mlmodelc")


def _toy(seeds: Path, folder: Path) -> None:
    (folder / "toy").symlink_to(seeds / "toy")
    (folder / "prompts.txt").write_text("a cat\na red circle\n")


PALETTIZE = ("palettize", "model.mlpackage", "-o", "small.mlpackage", "--nbits", "4")
COMPILE = ("compile", "model.mlpackage", "-o", "out")
GENERATE = ("generate", "toy/models", "--prompts-file", "prompts.txt", "--count", "3", "--steps", "3",
            "--seed", "1", "--backend", "torch", "-o", "out/picture.png")  # fmt: skip
SCENARIOS = (
    Scenario("convert", CONVERT, _nothing, ("models/original", "models/*.zip")),
    Scenario("convert over an older one", CONVERT, _older_conversion, ("models/original", "models/*.zip")),
    Scenario("compile", COMPILE, _package, ("out/*",)),
    Scenario("compile over an older one", COMPILE, _package_and_compiled, ("out/*",)),
    Scenario("palettize", PALETTIZE, _package, ("*.mlpackage",)),
    Scenario("palettize over an older one", PALETTIZE, _package_and_older, ("*.mlpackage",)),
    Scenario("bundle", ("bundle", "models", "--zip"), _packages, ("models/original/*", "models/*.zip")),
    Scenario("generate", GENERATE, _toy, ("out/*.png",)),
)


def write_seeds(folder: Path) -> None:
    """What scenarios begin with, made by the commands themselves."""
    sd1 = tiny_checkpoints.build("sd1", folder / "sd1")
    toy_models.write(folder / "toy" / "models" / "original" / "packages")
    convert = ("convert", sd1, "--components", "text_encoder", "--attention", "original", "--no-verify")
    _must(*convert, "-o", folder / "older", "--nbits", "8")
    _must(*convert, "-o", folder / "packages", "--no-compiled")
    package = next((folder / "packages").rglob("*.mlpackage"))
    shutil.copytree(package, folder / "model.mlpackage")
    _must("palettize", package, "-o", folder / "small.mlpackage", "--nbits", "8")
    _must("compile", folder / "small.mlpackage", "-o", folder, "--name", "older")


def _must(*arguments: object) -> None:
    outcome = call([str(argument) for argument in arguments])
    if outcome.code:
        raise RuntimeError(f"a seed cannot be made: {arguments}: {outcome.said}{outcome.error}")


def start(scenario: Scenario, folder: Path, seeds: Path) -> int:
    """Fork a child that runs the command in ``folder``; its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.chdir(folder)
        tempfile.tempdir = str(folder.parent / "temp")
        outcome = call([part.replace("SEEDS", str(seeds)) for part in scenario.command])
        # As at the end of a process: coremltools removes its temporary packages there. (What the parent would do
        # at its own end runs too: it keeps no TemporaryDirectory.)
        atexit._run_exitfuncs()
        code = 99 if outcome.error else outcome.code
        text = json.dumps({"said": outcome.said, "error": outcome.error})
        (folder.parent / f"said-{os.getpid()}").write_text(text)
    finally:
        os._exit(code)


def wait(child: int, seconds: float) -> int | None:
    """The exit code of a child (negative: the signal that ended it), None where it runs on after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.005)


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def state(folder: Path) -> dict[str, str]:
    """Path -> hash of the contents of everything below ``folder``; links are not followed."""
    return {
        path.relative_to(folder).as_posix(): _content(path)
        for path in sorted(folder.rglob("*"))
        if not path.is_dir() or path.is_symlink()
    }


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    data = path.read_bytes()
    if path.suffix == ".png":
        from PIL import Image

        with Image.open(io.BytesIO(data)) as picture:  # an error here is a half-written picture
            data = picture.convert("RGB").tobytes()
    return hashlib.sha256(data).hexdigest()


def units(folder: Path, patterns: tuple[str, ...]) -> dict[str, dict[str, str] | str]:
    """What appears as a whole, by name: a folder's state or a file's hash; nothing hidden."""
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    visible = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    return {
        path.relative_to(folder).as_posix(): state(path) if path.is_dir() else _content(path)
        for path in sorted(visible)
    }


class Arena:
    """One scenario: its beginning, its undisturbed end, and trials."""

    def __init__(self, scenario: Scenario, root: Path, seeds: Path) -> None:
        self.scenario, self.seeds = scenario, seeds
        self.root = root / scenario.name.replace(" ", "-")
        self.folder = self._fresh()
        self.before, self.units_before = state(self.folder), units(self.folder, scenario.whole)
        began = time.monotonic()
        code = wait(start(scenario, self.folder, seeds), PATIENCE_SECONDS)
        if code != 0:
            raise RuntimeError(f"{scenario.name}: undisturbed: exit code {code}: {self._said()}")
        self.seconds = time.monotonic() - began
        self.after, self.units_after = state(self.folder), units(self.folder, scenario.whole)

    def _fresh(self) -> Path:
        shutil.rmtree(self.root, ignore_errors=True)
        folder = self.root / "work"
        folder.mkdir(parents=True)
        (self.root / "temp").mkdir()
        self.scenario.prepare(self.seeds, folder)
        return folder

    def kills(self, random: Random, most: int) -> tuple[int, list[str]]:
        """Kill one to ``most`` times, then run to the end; how often it was killed, and what was wrong."""
        self._fresh()
        killed, problems = 0, []
        for _ in range(random.randint(1, most)):
            child = start(self.scenario, self.folder, self.seeds)
            if wait(child, random.uniform(0, 1.1 * self.seconds)) is None:
                kill(child)
                killed += 1
            problems += self._half()
        return killed, problems + self._end([wait(start(self.scenario, self.folder, self.seeds), PATIENCE_SECONDS)])

    def race(self, random: Random) -> list[str]:
        """Two at once, the second up to half a run later."""
        self._fresh()
        first = start(self.scenario, self.folder, self.seeds)
        time.sleep(random.choice((0.0, random.uniform(0, 0.5 * self.seconds))))
        second = start(self.scenario, self.folder, self.seeds)
        codes = [wait(child, PATIENCE_SECONDS) for child in (first, second)]
        problems = self._end([code for code in codes if code == 0] or codes)
        problems += [f"a loser ends with {code}: {self._said()}" for code in codes if code not in (0, 2)]
        return [f"race: {problem}" for problem in problems]

    def _half(self) -> list[str]:
        """What can be seen and is neither as before nor as it will be; and what was there before and is gone."""
        try:
            now = units(self.folder, self.scenario.whole)
        except (OSError, SyntaxError) as error:
            return [f"half-written: {error}"]
        wrong = [
            f"half-written: {name}"
            for name, value in now.items()
            if value not in (self.units_before.get(name), self.units_after.get(name))
        ]
        both = self.units_before.keys() & self.units_after.keys()
        return wrong + [f"lost until the next run: {name}" for name in both if name not in now]

    def _end(self, codes: list[int | None]) -> list[str]:
        """What differs from the undisturbed run's end, and what is left."""
        problems = [f"exit code {code}: {self._said()}" for code in codes if code != 0]
        now = state(self.folder)
        differing = sorted(name for name in {*now, *self.after} if now.get(name) != self.after.get(name))
        hidden = [name for name in differing if name not in self.after]
        wrong = [name for name in differing if name in self.after]
        problems += [f"left: {', '.join(hidden[:3])} ({len(hidden)} files)"] if hidden else []
        problems += [f"not as undisturbed: {', '.join(wrong[:3])} ({len(wrong)} files)"] if wrong else []
        folders = [path.name for path in self.folder.rglob(".*") if path.is_dir()]
        problems += [f"left: folders {', '.join(folders[:3])}"] if folders else []
        temporary = [path.name for path in (self.root / "temp").iterdir()]
        return problems + ([f"left: temporary {', '.join(temporary[:3])} ({len(temporary)})"] if temporary else [])

    def _said(self) -> str:
        texts = [json.loads(path.read_text()) for path in self.root.glob("said-*")]
        lines = [line for text in texts for line in (text["error"] or text["said"]).strip().splitlines()[-1:]]
        return " | ".join(lines)[-400:]


def run(
    root: Path, kills: int, races: int, seed: int, scenarios: tuple[Scenario, ...] = SCENARIOS
) -> Iterator[str]:
    """Problems, each with its scenario, as they are found; ``kills`` and ``races`` count all scenarios'."""
    seeds = root / "seeds"
    with contextlib.redirect_stderr(io.StringIO()):
        warm_up()
        write_seeds(seeds)
    arenas = [Arena(scenario, root, seeds) for scenario in scenarios]
    done, trial = 0, 0
    while done < kills:
        arena = arenas[trial % len(arenas)]
        killed, problems = arena.kills(Random(f"{seed}-{trial}"), most=min(3, kills - done))
        done, trial = done + killed, trial + 1
        yield from (f"{arena.scenario.name}, trial {trial}: {problem}" for problem in dict.fromkeys(problems))
    for number in range(races):
        arena = arenas[number % len(arenas)]
        problems = arena.race(Random(f"{seed}-race-{number}"))
        yield from (f"{arena.scenario.name}, pair {number}: {problem}" for problem in dict.fromkeys(problems))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--races", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="scenarios with this in their name")
    arguments = parser.parse_args()
    chosen = tuple(scenario for scenario in SCENARIOS if (arguments.only or "") in scenario.name)
    started, problems = time.perf_counter(), []
    root = Path(tempfile.mkdtemp(prefix="coreml-sd-kills-")).resolve()
    try:
        for problem in run(root, arguments.kills, arguments.races, arguments.seed, chosen):
            print(problem, flush=True)
            problems.append(problem)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    counted: Mapping[str, int] = {"kills": arguments.kills, "races": arguments.races}
    shown = " and ".join(f"{count} {name}" for name, count in counted.items())
    print(f"{shown} in {time.perf_counter() - started:.0f} s: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
