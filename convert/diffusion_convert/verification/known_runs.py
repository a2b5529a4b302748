"""What packages computed when they were run: one whose program is the same computes the same, and is not run again.

The packages of one network that differ in attention alone are such: the torch backend puts together what attention
took apart, and runs the same program (`identity`) for each. Where that is not so, they are run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffusion_runtime.atomic import unfinished_file

if TYPE_CHECKING:
    from diffusion_runtime.mil.identity import Identity

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class KnownRun:
    """A program on some inputs: ``path`` is where is kept what it computed. ``values``: see `identity.Identity`."""

    path: Path
    values: Mapping[str, str]

    def read(self) -> tuple[tuple[Arrays, ...], dict[str, float]] | None:
        """The outputs of each call, and the largest magnitude of each value by its name in this package, where
        those were watched; None where no such program has been run."""
        if not self.path.is_file():
            return None
        outputs: dict[int, dict[str, np.ndarray]] = {}
        with np.load(self.path, allow_pickle=False) as file:
            sizes = dict(zip(file["digests"].tolist(), file["largest"].tolist(), strict=True))
            for key in file.files:
                if "/" in key:
                    call, name = key.split("/", 1)
                    outputs.setdefault(int(call), {})[name] = file[key]
        largest = {name: sizes[digest] for name, digest in self.values.items() if digest in sizes}
        return tuple(outputs[call] for call in sorted(outputs)), largest

    def write(self, outputs: Sequence[Arrays], largest: Mapping[str, float] | None = None) -> None:
        sizes = {self.values[name]: size for name, size in (largest or {}).items()}
        arrays = {f"{call}/{name}": array for call, named in enumerate(outputs) for name, array in named.items()}
        arrays |= {"digests": np.array(list(sizes), dtype=str), "largest": np.array(list(sizes.values()), float)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished_file(self.path) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class KnownRuns:
    """Those in ``folder``, of packages of one network."""

    folder: Path

    def of(self, package: Path, inputs: Sequence[Arrays], *, watched: bool) -> KnownRun:
        """The run of ``package`` on ``inputs``, made already or not. ``watched``: one that tells how large all
        values become.

        Raises what loading the package with the torch backend does."""
        identity = _identity(package)
        told = hashlib.sha256(f"{identity.digest} {watched}".encode())
        for arrays in inputs:
            for name, array in sorted(arrays.items()):
                told.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
            told.update(b"/")
        return KnownRun(self.folder / f"{told.hexdigest()}.npz", identity.values)

    def bits(self, package: Path, target: float, choose: Callable[[], Mapping[str, int]]) -> dict[str, int]:
        """The bits by weight, ``target`` on average, that ``choose`` gives for ``package``, or gave for one with
        the same program and the same weights under the same names."""
        identity = _identity(package)
        path = self.folder / f"{identity.digest}-{target:g}-bits.json"
        if path.is_file():
            kept: dict[str, tuple[str, int]] = json.loads(path.read_text(encoding="utf-8"))
            if all(identity.constants.get(name) == digest for name, (digest, _) in kept.items()):
                return {name: bits for name, (_, bits) in kept.items()}
        chosen = dict(choose())
        named = {name: (identity.constants.get(name), bits) for name, bits in chosen.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with unfinished_file(path) as unfinished:
            unfinished.write_text(json.dumps(named), encoding="utf-8")
        return chosen


def _identity(package: Path) -> Identity:
    from diffusion_runtime.backends.torch_mil import TorchBackend
    from diffusion_runtime.mil.fuse import PLAIN, fuse
    from diffusion_runtime.mil.identity import identify

    return identify(fuse(TorchBackend(stream_weights=True, fuse=False).load(package).module, PLAIN))
