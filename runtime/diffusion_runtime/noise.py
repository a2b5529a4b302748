"""Where random numbers come from. The same seed and source give the same picture on every machine.

``torch`` draws as diffusers does on the CPU, so pictures equal diffusers'. ``numpy`` draws as the Python client of
Apple's ml-stable-diffusion does (the legacy RandomState). ``nvidia`` draws as ``torch.randn(…, device="cuda")``
does for tensors that a GPU fills with one value per thread (up to some 100,000 values; more depend on the GPU).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusion_runtime.errors import InputError

if TYPE_CHECKING:
    import torch

    Generators = torch.Generator | list[torch.Generator] | None

MAX_SEED = 2**64 - 1
MAX_FRESH_SEED = 2**32 - 1  # what every source takes, numpy's too

Source = Callable[[Sequence[int]], "torch.Tensor"]
"""Standard normal float32 values of the shape asked for; every call draws the next ones."""


@dataclass(frozen=True, slots=True)
class Noise:
    """One source for all pictures of a run, or one for each of them (then each picture depends on its own seed
    alone). ``generators`` are torch's, for schedulers that draw noise at every step; None for other sources."""

    sources: tuple[Source, ...]
    generators: Generators = None

    @property
    def per_picture(self) -> bool:
        return len(self.sources) > 1

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        """Standard normal values; with one source per picture, ``shape[0]`` is the number of pictures."""
        import torch

        if not self.per_picture:
            return self.sources[0](shape)
        if shape[0] != len(self.sources):
            raise InputError(
                f"{len(self.sources)} generators or seeds for {shape[0]} pictures: give one, or one each"
            )
        return torch.cat([source((1, *shape[1:])) for source in self.sources])

    def drawing(self) -> AbstractContextManager[None]:
        """While it is open, ``torch.randn`` draws from this noise where torch's generators cannot be used: a
        scheduler that draws noise at every step then uses the chosen source."""
        return nullcontext() if self.generators is not None else _randn_from(self)


def from_generators(generators: torch.Generator | Sequence[torch.Generator]) -> Noise:
    """Noise of torch's generators, drawn as diffusers draws it."""
    import torch

    listed = list(generators) if isinstance(generators, Sequence) else [generators]
    if not listed:
        raise InputError("an empty list of generators: give one, or one for each picture")
    for one in listed:
        if not isinstance(one, torch.Generator):
            raise InputError(
                f"generator is a {type(one).__name__}: expected torch.Generator; numbers go into seed="
            )
    return Noise(tuple(map(_torch_source, listed)), listed[0] if len(listed) == 1 else listed)


def from_seeds(seeds: Sequence[int], rng: str = "torch") -> Noise:
    """Noise of ``rng`` (one of `RNGS`): of one seed for all pictures, or of one for each."""
    import torch

    if rng not in RNGS:
        raise InputError(f"unknown random number generator {rng!r}: expected one of {', '.join(RNGS)}")
    if not seeds:
        raise InputError("an empty list of seeds: give one, or one for each picture")
    for seed in seeds:
        _check_seed(seed, rng)
    if rng == "torch":
        return from_generators([torch.Generator().manual_seed(seed) for seed in map(int, seeds)])
    return Noise(tuple(_SEEDED[rng](seed) for seed in map(int, seeds)))


def _check_seed(seed: object, rng: str) -> None:
    most = MAX_FRESH_SEED if rng == "numpy" else MAX_SEED
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed <= most:
        remedy = "; for a random one, give no seed" if seed == -1 else ""
        of = " with rng numpy" if rng == "numpy" else ""
        raise InputError(f"seed {seed!r}{of}: expected a whole number, 0 to {most}{remedy}")


def _torch_source(generator: torch.Generator) -> Source:
    import torch

    def draw(shape: Sequence[int]) -> torch.Tensor:
        device = generator.device
        return torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32).cpu()

    return draw


def _seeded_numpy(seed: int) -> Source:
    import torch

    # Not default_rng, which draws others: pictures of Apple's Python client come from the legacy one.
    state = np.random.RandomState(seed)

    def draw(shape: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(state.randn(*shape).astype(np.float32))

    return draw


def _seeded_nvidia(seed: int) -> Source:
    """cuRAND's normal distribution on Philox 4x32-10: value ``i`` of call ``k`` is the first of the four normals of
    counter ``(k, 0, i, 0)`` under the key ``seed``, by Box and Muller."""
    import torch

    calls = iter(range(2**32))

    def draw(shape: Sequence[int]) -> torch.Tensor:
        count = math.prod(shape)
        counter = np.zeros((4, count), np.uint32)
        counter[0] = next(calls)
        counter[2] = np.arange(count, dtype=np.uint32)
        # curand_init's way to make a key of a 64-bit seed; each value is a subsequence of its own (counter word 2).
        key = (np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32))
        first, second, _, _ = philox_4x32_10(counter, key)
        return torch.from_numpy(_box_muller(first, second).astype(np.float32).reshape(tuple(shape)))

    return draw


_SEEDED: Mapping[str, Callable[[int], Source]] = {"numpy": _seeded_numpy, "nvidia": _seeded_nvidia}
RNGS = ("torch", *_SEEDED)


def philox_4x32_10(counter: np.ndarray, key: tuple[np.uint32, np.uint32]) -> np.ndarray:
    """Ten rounds of Philox 4x32: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), section
    3.3. ``counter`` is uint32 of shape (4, count), one column per block; so is the result."""
    c0, c1, c2, c3 = counter.astype(np.uint64)
    k0, k1 = np.uint64(key[0]), np.uint64(key[1])
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        left = c0 * np.uint64(0xD2511F53)
        right = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & low, (left >> 32) ^ c3 ^ k1, left & low
        k0 = (k0 + np.uint64(0x9E3779B9)) & low
        k1 = (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)


def _box_muller(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The sine half of Box and Muller's transform, with cuRAND's mapping of integers into (0, 1] and (0, 2 pi]."""
    unit = 2.0**-32
    # Half a unit is added so that the logarithm never sees 0.
    radius = np.sqrt(-2.0 * np.log(first * unit + unit / 2))
    angle: np.ndarray = (second * unit + unit / 2) * (2 * math.pi)
    return np.asarray(radius * np.sin(angle))


@contextmanager
def _randn_from(noise: Noise) -> Iterator[None]:
    import torch
    from torch.overrides import TorchFunctionMode

    class Drawn(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
        ) -> Any:
            # All that diffusers' randn_tensor calls; it takes torch's generators only, so noise of another kind
            # enters here.
            if function is not torch.randn:
                return function(*args, **(kwargs or {}))
            shape = args[0] if isinstance(args[0], Sequence) else args
            values = noise.normal(tuple(shape))
            return values.to(dtype=(kwargs or {}).get("dtype"))

    with Drawn():
        yield


def fresh_seed() -> int:
    """A seed that nobody chose."""
    return secrets.randbelow(MAX_FRESH_SEED + 1)
