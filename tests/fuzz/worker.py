"""The process in which damaged files are read: every case in a folder of its own, watched from inside.

    python -m fuzz.worker ROOT FIRST LAST [WAY …]  cases FIRST to LAST; prints a line of JSON before and after each

What is watched: the exit code and what is said (a refusal is one line), processor time, memory, what is run, every
path that is opened for writing, renamed or removed, and what is left in the folders for temporary files.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from fuzz.mutate import CANARY, damaged
from fuzz.targets import TARGETS, Target

CPU_SECONDS = 20
"""By the processor's clock: other work on the machine makes no case hang."""
MEMORY_BYTES = 4 << 30
"""More address space than the libraries alone have taken."""
RUNS = frozenset({"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pty.spawn"})
WRITES = frozenset(
    {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
)


class Hang(BaseException):
    """Raised by the timer."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """``error`` is the traceback where the command did not handle an error, else empty."""

    code: int
    said: str
    error: str


def call(arguments: Sequence[str]) -> Outcome:
    """`coreml-sd` with these arguments in this process, through its entry point."""
    from diffusion_convert.cli.main import main

    said = io.StringIO()
    before = sys.argv
    sys.argv = ["coreml-sd", *arguments]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        return Outcome(code, said.getvalue(), "")
    except (Exception, Hang):
        return Outcome(1, said.getvalue(), traceback.format_exc())
    finally:
        sys.argv = before
    return Outcome(0, said.getvalue(), "")


class Watch:
    """An audit hook (it cannot be taken off, so it is switched): what is run and written outside of ``inside``."""

    def __init__(self) -> None:
        self.inside: tuple[str, ...] = ()
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.inside:
            return
        if event in RUNS:
            self.seen.append(f"runs: {event} {arguments[:2]!r}"[:200])
        elif event in WRITES:
            self._check(event, arguments[1 if event in ("os.link", "os.symlink") else 0])
        elif event == "open" and self._for_writing(arguments):
            self._check(event, arguments[0])

    @staticmethod
    def _for_writing(arguments: tuple[Any, ...]) -> bool:
        flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))

    def _check(self, event: str, path: Any) -> None:
        if isinstance(path, (str, bytes)):
            whole = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path))))  # noqa: PTH100, PTH120
            if not whole.startswith(self.inside) and whole not in ("/dev", "/proc/self"):
                self.seen.append(f"writes outside: {event} {path!r}"[:200])


WATCH: Watch | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """Number ``number`` of a run, which is all that it depends on: ``number`` names target, seed and command.
    ``way``: of `INSTEAD`, in place of what the number says."""

    number: int
    way: str | None = None

    @property
    def target(self) -> str:
        return list(TARGETS)[self.number % len(TARGETS)]

    def prepare(self, root: Path, folder: Path) -> list[str]:
        """Copy the seed to ``folder``, damage it, and return the command."""
        target, random = TARGETS[self.target], Random(self.number)
        shutil.copytree(root / "seeds" / target.seed, folder / "in", copy_function=os.link)
        (folder / "out").mkdir()
        victim = self._victim(target, folder / "in", random)
        _damage(victim, random, self.way, [way for way in INSTEAD if way != "a pipe" or not target.takes_pipes])
        places = {
            "IN": str(folder / "in"),
            "FILE": str(victim),
            "SEEDS": str(root / "seeds"),
            "out": str(folder / "out"),
        }
        return [_placed(part, places) for part in random.choice(target.commands)]

    @staticmethod
    def _victim(target: Target, folder: Path, random: Random) -> Path:
        pattern = random.choice(target.files)
        return random.choice(sorted(path for path in folder.glob(pattern) if path.is_file()))


def _placed(part: str, places: dict[str, str]) -> str:
    head, slash, rest = part.partition("/")
    return places.get(head, head) + slash + rest


INSTEAD: Mapping[str, Callable[[Path], object]] = {
    "nothing": lambda _: None,
    "a folder": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link outside": lambda path: path.symlink_to("/etc/passwd"),
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}
"""What may stand in a file's place."""


def _damage(victim: Path, random: Random, way: str | None, ways: Sequence[str]) -> None:
    """Mostly the contents; now and then the file becomes something else, one of ``ways``."""
    data = victim.read_bytes()
    victim.unlink()  # a hard link: the seed stays as it is
    if way is None and random.random() < 0.96:
        victim.write_bytes(damaged(victim.as_posix(), data, random))
    else:
        INSTEAD[way if way is not None and way in ways else random.choice(ways)](victim)


def run_case(case: Case, root: Path) -> dict[str, Any]:
    """What went wrong with one case, as ``problems``: empty where all is well."""
    folder = root / f"case-{case.number}"
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("home", "temp"):
        (folder / name).mkdir(parents=True)
    arguments = case.prepare(root, folder)
    before = _state(folder / "in")
    os.chdir(folder / "home")
    tempfile.tempdir = str(folder / "temp")
    with watched(folder) as seen:
        outcome = call(arguments)
    os.chdir(root)
    problems = [*_judge(outcome), *seen]
    if list((folder / "home").iterdir()) or list(root.rglob(CANARY)):
        problems.append(f"writes outside: {[path.name for path in (folder / 'home').iterdir()]}")
    # coremltools removes its temporary packages when the process ends.
    if left := sorted(path.name for path in (folder / "temp").iterdir() if path.suffix != ".mlpackage"):
        problems.append(f"left: temporary {left}")
    if not TARGETS[case.target].writes_inside and _state(folder / "in") != before:
        problems.append("changes its input")
    if outcome.code and (left := _left(folder / "out")):
        problems.append(f"left: {left} after exit code {outcome.code}")
    if not problems:
        _remove(folder)
    shown = [part.replace(f"{folder}/", "").replace(f"{root}/", "") for part in arguments]
    return {"case": case.number, "target": case.target, "command": shown, "problems": problems, **asdict(outcome)}


def _judge(outcome: Outcome) -> list[str]:
    if outcome.error:
        *_, last = outcome.error.strip().splitlines()
        kind = "hang" if last.startswith("fuzz.worker.Hang") else "memory" if "MemoryError" in last else "traceback"
        return [f"{kind}: {last[:200]}"]
    lines = [line for line in outcome.said.splitlines() if line.startswith("error:")]
    if outcome.code == 2 and len(lines) != 1 and "Usage" not in outcome.said:
        return [f"says no error in one line: {outcome.said[-200:]!r}"]
    return [] if outcome.code in (0, 1, 2) else [f"exit code {outcome.code}"]


def _left(folder: Path) -> list[str]:
    """What a failed command left that can be seen; finished units of a conversion are kept on purpose."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")] + [
        path.relative_to(folder).as_posix() for path in folder.rglob("*.unfinished")
    ]


def _state(folder: Path) -> str:
    told = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        told.update(
            f"{path.relative_to(folder)!r} {status.st_size} {status.st_mtime_ns} {status.st_mode}\n".encode()
        )
    return told.hexdigest()


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """The audit hook and the timer; what the hook saw."""
    global WATCH  # noqa: PLW0603  (hooks stay for the process's life)
    WATCH = WATCH or Watch()

    def stop(*_: object) -> None:
        raise Hang(f"{CPU_SECONDS} s of processor time")

    signal.signal(signal.SIGPROF, stop)
    WATCH.seen = []
    WATCH.inside = (str(folder.resolve()),)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS, 1.0)
    # The system ends the process where no Python code runs that the timer could interrupt.
    usage = resource.getrusage(resource.RUSAGE_SELF)
    end = int(usage.ru_utime + usage.ru_stime) + CPU_SECONDS + 5
    resource.setrlimit(resource.RLIMIT_CPU, (end, resource.RLIM_INFINITY))
    try:
        yield WATCH.seen
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        WATCH.inside = ()


def limit_memory() -> None:
    if not Path("/proc/self/statm").exists():
        return  # macOS keeps no such limit
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, taken + MEMORY_BYTES))


def warm_up() -> None:
    """Import what commands import when they need it: it writes caches and takes the time of the first case."""
    import diffusers
    import torch
    import transformers

    from diffusion_runtime.coremltools_import import import_coremltools

    torch.set_num_threads(1)
    import_coremltools("converters.mil")
    for name in ("AutoencoderKL", "UNet2DConditionModel", "StableDiffusionPipeline"):
        getattr(diffusers, name)
    for name in ("CLIPTextModel", "CLIPTokenizer", "DPTForDepthEstimation"):
        getattr(transformers, name)


def main() -> None:
    root, first, last, ways = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    warm_up()
    limit_memory()
    print(json.dumps({"ready": True}), flush=True)
    for number in range(first, last):
        print(json.dumps({"begins": number}), flush=True)
        turn, target = divmod(number, len(TARGETS))
        case = Case(target, ways[turn]) if ways else Case(number)
        print(json.dumps({**run_case(case, root), "case": number}), flush=True)


if __name__ == "__main__":
    main()
