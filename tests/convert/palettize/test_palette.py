"""Palettes: least error, nearest entries, and every kind of value that a weight can hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from diffusion_convert.palettize.palette import (
    Palette,
    decode,
    energies,
    palettize,
    palettize_groups,
    snr_db,
)
from diffusion_convert.palettize.palettize_options import PER_GROUPED_CHANNEL, PER_TENSOR, PalettizeOptions
from diffusion_convert.palettize.palettize_package import errors_as, palettize_as
from diffusion_convert.palettize.select import Weight
from diffusion_runtime.coremltools_import import import_coremltools
from diffusion_runtime.errors import InputError
from diffusion_runtime.families import PALETTE_BITS
from diffusion_runtime.mil.packing import pack, packed_size, unpack
from diffusion_runtime.mil.program import DType, TensorType, Value

finite_halves = arrays.arrays(
    np.float16,
    st.integers(1, 300),
    elements=st.floats(-60000, 60000, width=16) | st.floats(-(2.0**-14), 2.0**-14, width=16) | st.just(-0.0),
)
bits_of = st.sampled_from(PALETTE_BITS)


def weight_of(palette: Palette) -> np.ndarray:
    return decode(palette.lut, palette.indices)


def error_of(weight: np.ndarray, decoded: np.ndarray) -> float:
    return float(np.sum((weight.astype(np.float64) - decoded.astype(np.float64)) ** 2))


@settings(deadline=None)
@given(finite_halves, bits_of)
def test_never_worse_than_kmeans1d_on_the_raw_values(weight: np.ndarray, bits: int) -> None:
    """coremltools' own exact clustering of the elements, its entries rounded to float16 as it stores them."""
    kmeans1d = import_coremltools("_deps")._kmeans1d
    theirs = kmeans1d.cluster(weight.astype(np.float64), 1 << bits)
    stored = np.array(theirs.centroids).astype(np.float16)[np.array(theirs.clusters)]
    ours = error_of(weight, weight_of(palettize(weight, bits)))
    # Its prefix sums and ours are of float64: they lose what is 2⁻⁴⁰ of the weight's energy.
    assert ours <= error_of(weight, stored) * (1 + 1e-9) + float(np.sum(weight.astype(np.float64) ** 2)) * 2.0**-40


@settings(deadline=None)
@given(finite_halves, bits_of)
def test_every_element_decodes_to_its_nearest_entry(weight: np.ndarray, bits: int) -> None:
    palette = palettize(weight, bits)
    assert palette.lut.dtype == weight.dtype
    assert palette.lut.shape == (1 << bits,)
    assert palette.indices.max() < 1 << bits
    distances = np.abs(weight.astype(np.float64)[:, None] - palette.lut.astype(np.float64)[None])
    chosen = np.abs(weight.astype(np.float64) - weight_of(palette).astype(np.float64))
    assert np.array_equal(chosen, distances.min(axis=1))
    assert palette.squared_error == pytest.approx(error_of(weight, weight_of(palette)), rel=1e-9)


@settings(deadline=None)
@given(finite_halves, bits_of)
def test_few_distinct_values_are_kept_exactly(weight: np.ndarray, bits: int) -> None:
    few = weight[np.arange(weight.size) % (1 << bits)] if weight.size > 1 << bits else weight
    assert np.array_equal(weight_of(palettize(few, bits)), few)


@settings(deadline=None)
@given(bits_of, st.integers(1, 999), st.integers(0, 2**32 - 1))
def test_unpacking_is_the_inverse_of_packing(bits: int, count: int, seed: int) -> None:
    indices = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint8)
    packed = pack(indices, bits)
    assert packed.size == packed_size(count, bits) == math.ceil(count * bits / 8)
    assert np.array_equal(unpack(packed, bits, count), indices)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    ("elements", "bits"),
    [
        pytest.param([0.0, -0.0, 0.0], 1, id="signed zeros"),
        pytest.param([7.0] * 5, 1, id="constant"),
        pytest.param([6e-8, -6e-8, 0.0, 1.2e-7], 2, id="subnormals"),
        pytest.param([65504.0, -65504.0], 1, id="largest"),
        pytest.param([math.inf, 1.0], 1, id="an infinity and a value"),
        pytest.param([math.inf, -math.inf, 1.0, 2.0], 2, id="both infinities"),
        pytest.param([math.inf] * 3, 1, id="only infinities"),
        pytest.param([-math.inf, math.inf], 1, id="nothing finite"),
    ],
)
def test_special_values_are_kept(elements: list[float], bits: int, dtype: type) -> None:
    weight: np.ndarray = np.array(elements, dtype)
    palette = palettize(weight, bits)
    assert np.array_equal(weight_of(palette), weight)
    assert palette.squared_error == 0
    assert not np.isnan(palette.lut).any()


def test_finite_values_beside_infinities_get_the_entries_that_are_left() -> None:
    weight = np.array([-math.inf, 0.0, 1.0, 10.0, 11.0, math.inf], np.float16)
    assert palettize(weight, 2).lut.tolist() == [-math.inf, 0.5, 10.5, math.inf]


@pytest.mark.parametrize(
    ("elements", "message"),
    [([1.0, math.nan], "up.weight: 1 elements are NaN"), ([math.inf, -math.inf, 1.0], "up.weight.*no room")],
)
def test_what_cannot_be_held_is_refused_by_name(elements: list[float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        palettize(np.array(elements, np.float16), 1, "up.weight")


def test_other_types_are_refused() -> None:
    with pytest.raises(InputError, match="int8"):
        palettize(np.zeros(4, np.int8), 2)


@pytest.mark.parametrize("bits", [1, 4, 6, 8])
def test_float32_is_as_good_as_kmeans_on_its_elements(bits: int) -> None:
    kmeans1d = import_coremltools("_deps")._kmeans1d
    weight: np.ndarray = (np.random.default_rng(5).standard_normal(4000) * 3e4).astype(np.float32)
    theirs = kmeans1d.cluster(weight.astype(np.float64), 1 << bits)
    stored = np.array(theirs.centroids).astype(np.float32)[np.array(theirs.clusters)]
    palette = palettize(weight, bits)
    assert palette.lut.dtype == np.float32
    assert palette.squared_error <= error_of(weight, stored) * 1.005  # bins are not divided


@pytest.mark.parametrize("axis", [0, 1])
def test_each_group_has_the_best_palette_of_its_own(axis: int) -> None:
    weight = np.random.default_rng(1).standard_normal((8, 12, 3)).astype(np.float16)
    palette = palettize_groups(weight, 2, axis, 4)
    groups = weight.shape[axis] // 4
    assert palette.lut.shape == (*(groups if i == axis else 1 for i in range(3)), 4, 1)
    for group, part in enumerate(np.split(weight, groups, axis)):
        alone = palettize(part, 2)
        assert np.array_equal(np.split(weight_of(palette), groups, axis)[group], weight_of(alone))
        assert palette.squared_error == pytest.approx(error_of(weight, weight_of(palette)), rel=1e-6)
    with pytest.raises(InputError, match="not a multiple of the group size 5"):
        palettize_groups(weight, 2, axis, 5)


def test_signal_to_noise() -> None:
    signal, noise = energies(np.array([3.0, 4.0], np.float16), np.array([3.0, 3.5], np.float16))
    assert (signal, noise) == (25.0, 0.25)
    assert snr_db(signal, noise) == pytest.approx(20.0)
    assert snr_db(25.0, 0.0) == math.inf


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("granularity", [PER_TENSOR, PER_GROUPED_CHANNEL])
def test_errors_alone_are_nearly_those_of_the_palettes(dtype: type, granularity: str) -> None:
    array: np.ndarray = np.random.default_rng(0).standard_normal((32, 40, 3, 3)).astype(dtype)
    array[3, 5] = np.inf
    weight = Weight("weight", Value(TensorType(DType.FLOAT16, array.shape), array), array.shape, 0)
    options = PalettizeOptions(granularity=granularity, group_size=8)
    [found] = errors_as(options, [(weight, array)], PALETTE_BITS[1:])
    best = {bits: palettize_as(options, weight, array, bits).squared_error for bits in PALETTE_BITS[1:]}
    assert found.keys() == best.keys()
    assert all(best[bits] * (1 - 1e-9) <= found[bits] <= best[bits] * 1.01 for bits in best)
