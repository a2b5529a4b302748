"""The models of one pipeline: loaded when first asked for, timed, freed when told; chunks joined to one model."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from diffusion_runtime.backends import Model, TensorSpec, check_arrays
from diffusion_runtime.errors import DiffusionError, InputError

Load = Callable[[], Model]
_OF_SIZE = "@"


@dataclass(slots=True)
class Timing:
    """Seconds spent in one model. ``first_call_seconds`` often holds what a backend puts off until then."""

    load_seconds: float = 0.0
    first_call_seconds: float = 0.0
    calls: int = 0
    later_seconds: float = 0.0

    @property
    def steady_seconds(self) -> float:
        """Mean of all calls but the first; the first's where there is no other."""
        return self.later_seconds / (self.calls - 1) if self.calls > 1 else self.first_call_seconds


@dataclass(frozen=True, slots=True)
class Models:
    """Models by component name ("unet", "vae_decoder", …).

    ``names``: see `known_as`. With ``keep`` False a model is freed as soon as its stage is over (`release`), and
    loaded anew when needed."""

    loads: Mapping[str, Load]
    keep: bool = True
    timings: dict[str, Timing] = field(default_factory=dict)
    names: Mapping[str, str] | None = None
    _loaded: dict[str, Timed] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return self._own(name) in self.loads

    def known_as(self, names: Mapping[str, str]) -> Models:
        """The same models under other names (the name there -> the name here), and no others; each is loaded once
        for both."""
        return replace(self, names={there: self._own(here) for there, here in names.items()})

    def of_size(self, size: str) -> Models:
        """The same under the same names, those for pictures of another size where there are such."""
        visible = self.names or {name: name for name in self.loads}
        own = {name: sized(here, size) for name, here in visible.items() if sized(here, size) in self.loads}
        return replace(self, names={**visible, **own})

    def _own(self, name: str) -> str:
        return name if self.names is None else self.names.get(name, "")

    def __getitem__(self, name: str) -> Timed:
        """The model, loaded now if it was not. Raises InputError where there is no such model."""
        asked, name = name, self._own(name)
        if name not in self.loads:
            known = dict.fromkeys(load.partition(_OF_SIZE)[0] for load in self.loads)
            raise InputError(
                f"these models have no {asked} (they have: {', '.join(known)}): convert again with "
                f"--components {','.join([asked, *known])}"
            )
        if name not in self._loaded:
            timing = self.timings.setdefault(name, Timing())
            start = time.perf_counter()
            model = self.loads[name]()
            timing.load_seconds += time.perf_counter() - start
            self._loaded[name] = Timed(name, model, timing)
        return self._loaded[name]

    def release(self, *names: str) -> None:
        """Say that a stage is over: frees these models unless they are kept."""
        if not self.keep and [name for name in names if self._loaded.pop(self._own(name), None)]:
            # A lowered program is a cycle of objects (module, graph, nodes). Left to itself the collector may come
            # only after the next model is loaded, with the weights of both in memory.
            gc.collect()

    def prewarm(self, names: Iterable[str]) -> None:
        """Load models and run each once on zeros, so that the first picture takes no longer than the next."""
        for name in names:
            model = self[name]
            model(**{spec.name: np.zeros(spec.shape, spec.dtype) for spec in model.inputs.values()})


@dataclass(frozen=True, slots=True)
class Timed:
    """A model that knows its name and how long it takes. One call costs about a microsecond more."""

    name: str
    model: Model
    timing: Timing

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self.model.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self.model.outputs

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        result = self.model(**arrays)
        seconds = time.perf_counter() - start
        if self.timing.calls == 0:
            self.timing.first_call_seconds = seconds
        else:
            self.timing.later_seconds += seconds
        self.timing.calls += 1
        return result

    def one(self, name: str, **arrays: np.ndarray) -> np.ndarray:
        """The output called ``name``, or the only one. Raises DiffusionError where it is not a number."""
        value, _ = self.several(name, "", **arrays)
        return value

    def several(self, name: str, other: str, **arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """As `one`, and the output called ``other``, if there is one."""
        results = self(**arrays)
        value = results[name] if name in results else next(iter(results.values()))
        # float16 overflows to NaN without a sound, and NaN decodes to a black picture.
        if not np.isfinite(value).all():
            raise not_finite(self.name)
        return value, results.get(other)


def sized(component: str, size: str) -> str:
    """What `Models` call a component for pictures of another size than the first."""
    return f"{component}{_OF_SIZE}{size}"


def not_finite(model: str) -> DiffusionError:
    """The error for a model that computes NaN or infinity, which would make a black picture."""
    return DiffusionError(
        f"{model} gave values that are not numbers (NaN or infinity): its weights are damaged or it overflows in "
        "float16; check it with `coreml-sd inspect`, or convert it again with --precision auto"
    )


def unfit_latents() -> InputError:
    """The error for latents that became NaN, or infinity in the numbers that a model takes."""
    return InputError(
        "the latents are not numbers, or too large for float16, after a step of the scheduler: its settings do not "
        "fit each other or what the UNet predicts; choose another scheduler (`--scheduler NAME`)"
    )


@dataclass(frozen=True, slots=True)
class Chain:
    """Models that run one after the other as one, as the chunks of a UNet do: what an earlier one gives is, by its
    name, what a later one takes. The last one's outputs are the chain's."""

    links: tuple[Model, ...]

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        needed: dict[str, TensorSpec] = {}
        given: set[str] = set()
        for link in self.links:
            needed |= {name: spec for name, spec in link.inputs.items() if name not in given | needed.keys()}
            given |= link.outputs.keys()
        return needed

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self.links[-1].outputs

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        check_arrays(self.inputs, arrays, "chunked model")
        values = dict(arrays)
        for link in self.links:
            taken = {
                name: values[name].astype(spec.dtype, copy=False).reshape(spec.shape)
                for name, spec in link.inputs.items()
            }
            results = link(**taken)
            values |= results
        return results


@dataclass(frozen=True, slots=True)
class Renamed:
    """A model whose inputs are called otherwise: ``names`` maps what they are called here to its own."""

    model: Model
    names: Mapping[str, str]

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        known = {own: name for name, own in self.names.items()}
        return {
            known.get(name, name): replace(spec, name=known.get(name, name))
            for name, spec in self.model.inputs.items()
        }

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self.model.outputs

    def __call__(self, **arrays: np.ndarray) -> dict[str, np.ndarray]:
        return self.model(**{self.names.get(name, name): array for name, array in arrays.items()})


def renamed(load: Load, names: Mapping[str, str]) -> Load:
    return lambda: Renamed(load(), names)


def chained(loads: Sequence[Load]) -> Load:
    """One load for a component of several models."""
    return loads[0] if len(loads) == 1 else lambda: Chain(tuple(load() for load in loads))
