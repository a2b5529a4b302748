"""Random numbers: torch's as diffusers draws them, NumPy's as Apple's client does, NVIDIA's as published."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion_runtime import noise
from diffusion_runtime.errors import InputError


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    """The known-answer vectors of Random123 (tests/kat_vectors, philox4x32, 10 rounds)."""
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, expected)]
    first, second = (np.uint32(word) for word in words[1])
    got = noise.philox_4x32_10(np.array(words[0], np.uint32)[:, None], (first, second))
    assert got[:, 0].tolist() == words[2]


def test_nvidia_values_are_those_of_a_gpu() -> None:
    """What ``torch.randn((3, 4), device="cuda")`` gives after ``torch.manual_seed(0)``, as published with the web
    UI's imitation of it."""
    expected = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    source = noise.from_seeds([0], "nvidia")
    assert np.allclose(source.normal((3, 4)).numpy(), expected, atol=1e-6)
    assert not np.allclose(source.normal((3, 4)).numpy(), expected)  # the next call draws the next values


def test_numpy_values_are_those_of_randomstate() -> None:
    state = np.random.RandomState(7)
    source = noise.from_seeds([7], "numpy")
    for shape in ((1, 4, 8, 8), (2, 3)):
        assert np.array_equal(source.normal(shape).numpy(), state.randn(*shape).astype(np.float32))


def test_torch_values_are_those_of_a_generator() -> None:
    generator = torch.Generator().manual_seed(7)
    assert torch.equal(noise.from_seeds([7]).normal((2, 5)), torch.randn(2, 5, generator=generator))


@pytest.mark.parametrize("rng", noise.RNGS)
def test_each_picture_depends_on_its_own_seed_alone(rng: str) -> None:
    both = noise.from_seeds([1, 2], rng).normal((2, 4, 8, 8))
    assert torch.equal(both[1:], noise.from_seeds([2], rng).normal((1, 4, 8, 8)))
    assert abs(float(both.mean())) < 0.2 and 0.8 < float(both.std()) < 1.2


@pytest.mark.parametrize("rng", ["numpy", "nvidia"])
def test_schedulers_that_draw_noise_draw_it_from_the_chosen_source(rng: str) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    chosen, same = noise.from_seeds([3], rng), noise.from_seeds([3], rng)
    with chosen.drawing():
        drawn = randn_tensor((1, 4, 2, 2), generator=None, device=torch.device("cpu"), dtype=torch.float32)
        flat = torch.randn(6)
    assert torch.equal(drawn, same.normal((1, 4, 2, 2)))
    assert torch.equal(flat, same.normal((6,)))
    assert not torch.equal(torch.randn(6), flat)  # outside, torch draws by itself


@pytest.mark.parametrize("seed", [-1, noise.MAX_SEED + 1])
def test_seeds_that_no_source_takes_are_refused(seed: int) -> None:
    with pytest.raises(InputError, match=f"seed {seed}: expected a whole number, 0 to {noise.MAX_SEED}"):
        noise.from_seeds([seed])


def test_a_fresh_seed_can_be_used() -> None:
    assert len({noise.fresh_seed() for _ in range(8)}) > 1
    noise.from_seeds([noise.fresh_seed()], "nvidia").normal((1,))


@pytest.mark.parametrize("seed", [0, 2**32, 2**63, 2**64 - 1, np.uint64(2**64 - 1)])
def test_seeds_of_node_editors_draw_what_diffusers_draws(seed: int) -> None:
    from diffusers.utils.torch_utils import randn_tensor

    theirs = randn_tensor((1, 4, 4, 4), generator=torch.Generator().manual_seed(int(seed)))
    assert torch.equal(noise.from_seeds([seed]).normal((1, 4, 4, 4)), theirs)
    assert noise.from_seeds([seed], "nvidia").normal((4,)).isfinite().all()


def test_seeds_that_a_source_does_not_take_are_refused() -> None:
    with pytest.raises(InputError, match=r"seed 4294967296 with rng numpy: expected .* 0 to 4294967295"):
        noise.from_seeds([2**32], "numpy")
    with pytest.raises(InputError, match=r"seed -1: .*; for a random one, give no seed"):
        noise.from_seeds([-1])
    for wrong in (True, 1.0, "1", None, 2**64):
        with pytest.raises(InputError, match="expected a whole number"):
            noise.from_seeds([wrong])  # type: ignore[list-item]
