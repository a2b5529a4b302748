"""What packages computed when they were run: one whose program is the same computes the same, and is not run again.

The packages of one network that differ in attention alone are such: the torch backend puts together what attention
took apart, and runs the same program (`digest`) for each. Where that is not so, they are run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffusion_runtime import zips
from diffusion_runtime.atomic import unfinished_file

if TYPE_CHECKING:
    from diffusion_runtime.backends.torch_mil import TorchModel
    from diffusion_runtime.mil.digest import Digests

Arrays = Mapping[str, np.ndarray]
Run = tuple[Sequence[Arrays], Mapping[str, float]]
"""The outputs of each call, and the largest magnitude of each value by its MIL name, where those were watched."""

UNREADABLE = (*zips.DAMAGED, OSError, KeyError)
"""What reading a file of `numpy.savez` raises that is not there, or that a power cut has left."""


@dataclass(frozen=True, slots=True)
class KnownRuns:
    """Those in ``folder``, of packages of one network. Its methods raise what loading one with the torch backend
    does."""

    folder: Path

    def once(self, package: Path, inputs: Sequence[Arrays], run: Callable[[], Run], *, watched: bool) -> Run:
        """What ``run`` makes of ``package`` on ``inputs``, or made of one that is the same. ``watched``: largest
        magnitudes are wanted, too."""
        model, digests = _loaded(package)
        told = hashlib.sha256(repr((digests.program, watched, model.inputs, model.outputs)).encode())
        for arrays in inputs:
            for name, array in sorted(arrays.items()):
                told.update(f"{name} {array.dtype} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
            told.update(b"/")
        del model  # its weights stay mapped with it
        path = self.folder / f"{told.hexdigest()}.npz"
        found = _read(path, digests.values)
        if found is None:
            found = run()
            self._write(path, found, digests.values)
        return found

    def bits(self, package: Path, target: float, choose: Callable[[], Mapping[str, int]]) -> dict[str, int]:
        """The bits by weight, ``target`` on average, that ``choose`` gives for ``package``, or gave for one with
        the same program and the same weights under the same names."""
        _, digests = _loaded(package)
        path = self.folder / f"{digests.program}-{target:g}-bits.json"
        try:
            kept: dict[str, tuple[str, int]] = json.loads(path.read_text(encoding="utf-8"))
        except UNREADABLE:
            kept = {}
        if kept and all(digests.constants.get(name) == digest for name, (digest, _) in kept.items()):
            return {name: bits for name, (_, bits) in kept.items()}
        chosen = dict(choose())
        named = {name: (digests.constants.get(name), bits) for name, bits in chosen.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with unfinished_file(path) as unfinished:
            unfinished.write_text(json.dumps(named), encoding="utf-8")
        return chosen

    def _write(self, path: Path, run: Run, values: Mapping[str, str]) -> None:
        outputs, largest = run
        sizes = {values[name]: size for name, size in largest.items()}
        arrays = {f"{call}/{name}": array for call, named in enumerate(outputs) for name, array in named.items()}
        arrays |= {"digests": np.array(list(sizes), dtype=str), "largest": np.array(list(sizes.values()), float)}
        self.folder.mkdir(parents=True, exist_ok=True)
        with unfinished_file(path) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]


def _read(path: Path, values: Mapping[str, str]) -> Run | None:
    """The run that is kept there; None where there is none, or it is damaged. ``values``: see `digest.Digests`."""
    outputs: dict[int, dict[str, np.ndarray]] = {}
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            sizes = dict(zip(file["digests"].tolist(), file["largest"].tolist(), strict=True))
            for key in file.files:
                if "/" in key:
                    call, name = key.split("/", 1)
                    outputs.setdefault(int(call), {})[name] = file[key]
    except UNREADABLE:
        return None
    largest = {name: sizes[digest] for name, digest in values.items() if digest in sizes}
    return tuple(outputs[call] for call in sorted(outputs)), largest


def _loaded(package: Path) -> tuple[TorchModel, Digests]:
    from diffusion_runtime.backends.torch_mil import TorchBackend
    from diffusion_runtime.mil.digest import digests_of
    from diffusion_runtime.mil.fuse import PLAIN, fuse

    model = TorchBackend(stream_weights=True, fuse=False).load(package)
    return model, digests_of(fuse(model.module, PLAIN))
