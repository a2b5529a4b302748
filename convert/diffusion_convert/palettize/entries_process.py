"""`palette.best_entries` in a process of its own. To look for entries is many short calls under Python's lock, at
which it and the threads that count, index and pack would keep each other waiting.

    python -m diffusion_convert.palettize.entries_process

reads problems from its standard input and writes their entries to its standard output until the first one ends:
for each group of problems a line of JSON ([number of values, entries, type of these] of each, or of the answer
[number of entries, type]) and the bytes of the arrays.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Any, Self

import numpy as np

from diffusion_convert.palettize.palette import Problem, best_entries


class EntriesProcess:
    """The process, as a context manager. One that cannot be started or ends early is done without."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        command = [sys.executable, "-P", "-m", __name__]  # -P: no module of the current folder
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError:
            self._process = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # closes the pipes, too
            self._process = None

    def __call__(self, problems: Sequence[Problem]) -> list[np.ndarray]:
        """`best_entries`."""
        if self._process is not None and self._process.stdin and self._process.stdout:
            try:
                _send(self._process.stdin, [(len(one.values), one.count, one.dtype.str) for one in problems])
                for one in problems:
                    self._process.stdin.write(one.values.tobytes() + one.counts.tobytes())
                self._process.stdin.flush()
                return [_array(self._process.stdout, *one) for one in _received(self._process.stdout)]
            except (OSError, EOFError):
                self.__exit__()
        return best_entries(problems)


def _send(stream: IO[bytes], heading: Any) -> None:
    stream.write(json.dumps(heading).encode() + b"\n")


def _received(stream: IO[bytes]) -> Any:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return json.loads(line)


def _array(stream: IO[bytes], count: int, dtype: str) -> np.ndarray:
    size = count * np.dtype(dtype).itemsize
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return np.frombuffer(data, dtype)


def main() -> None:
    taken, given = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            problems = [
                Problem(_array(taken, size, "<f8"), _array(taken, size, "<f8"), count, np.dtype(dtype))
                for size, count, dtype in _received(taken)
            ]
        except EOFError:
            return
        found = best_entries(problems)
        _send(given, [(len(entries), entries.dtype.str) for entries in found])
        given.write(b"".join(entries.tobytes() for entries in found))
        given.flush()


if __name__ == "__main__":
    main()
