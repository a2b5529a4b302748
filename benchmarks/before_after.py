"""One benchmark of an earlier revision and of this one, in one run: for figures that can be compared.

    python benchmarks/before_after.py f8b177f bench_convert.py --whole --folder /tmp/bench

runs the script as it was at that revision (`benchmarks/` or `tests/bench/`), with that revision's product, and then
today's, with the same arguments, in this environment. Nothing else should be at work on the machine meanwhile.
Ends with status 1 where one of both fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import command_line
from diffusion_runtime import memory

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="as git takes it: a hash, a tag, HEAD~10")
    parser.add_argument("script", help="its name: bench_convert.py, bench_palettize.py, …")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what both are given")
    arguments = parser.parse_args()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command sets it; for both
    memory.keep_freed()
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        _git("worktree", "add", "--detach", str(before), arguments.revision)
        try:
            found = [_run(tree, arguments.script, arguments.arguments) for tree in (before, ROOT)]
        finally:
            _git("worktree", "remove", "--force", str(before))
    return 0 if all(found) else 1


def _git(*command: str) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: git {command[0]}: {done.stderr.strip()}")


def _run(tree: Path, script: str, arguments: list[str]) -> bool:
    paths = [path for path in (tree / "benchmarks" / script, tree / "tests" / "bench" / script) if path.is_file()]
    if not paths:
        raise SystemExit(f"error: {tree}: no {script} in benchmarks/ or tests/bench/: name one that both have")
    which = "after" if tree == ROOT else "before"
    print(f"\n== {which}: {script} {' '.join(arguments)}", flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tree / "convert"), str(tree / "runtime")])}
    began = time.perf_counter()
    done = subprocess.run([sys.executable, str(paths[0]), *arguments], env=environment, check=False)
    print(f"== {which}: {time.perf_counter() - began:.1f} s in all", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    command_line.run(main)
