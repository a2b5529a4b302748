"""The clustering is the optimum: against a search in exact arithmetic, and against coremltools' kmeans1d."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_convert.palettize import kmeans
from diffusion_runtime.coremltools_import import import_coremltools


def squared_error(values: np.ndarray, counts: np.ndarray, boundaries: np.ndarray) -> float:
    """Summed directly, without the prefix sums of the implementation."""
    means = kmeans.centroids(values, counts, boundaries)
    return float(np.sum(counts * (values - np.repeat(means, np.diff(boundaries))) ** 2))


def least_error(values: list[int], counts: list[int], k: int) -> Fraction:
    """The optimum by dynamic programming over all boundaries, in rational arithmetic."""
    count = len(values)

    def cost(start: int, end: int) -> Fraction:
        weight = sum(counts[start:end])
        first = sum(c * v for c, v in zip(counts[start:end], values[start:end], strict=True))
        second = sum(c * v * v for c, v in zip(counts[start:end], values[start:end], strict=True))
        return second - Fraction(first * first, weight)

    best: list[Fraction | None] = [Fraction(0)] + [None] * count
    for _ in range(k):
        best = [best[0]] + [
            min((best[s] + cost(s, e) for s in range(e) if best[s] is not None), default=None)  # type: ignore[operator]
            for e in range(1, count + 1)
        ]
        best[0] = None
    reached = best[count]
    assert reached is not None
    return reached


histograms = st.dictionaries(st.integers(-60, 60), st.integers(1, 9), min_size=1, max_size=14)


@settings(deadline=None)
@given(histograms, st.integers(1, 8))
def test_error_is_the_least_in_exact_arithmetic(histogram: dict[int, int], k: int) -> None:
    values = sorted(histogram)
    counts = [histogram[value] for value in values]
    k = min(k, len(values))
    [boundaries] = kmeans.cluster([(np.array(values, float), np.array(counts, float), k)])
    assert len(boundaries) == k + 1
    assert boundaries[0] == 0
    assert boundaries[-1] == len(values)
    assert (np.diff(boundaries) > 0).all()
    found = squared_error(np.array(values, float), np.array(counts, float), boundaries)
    assert found == pytest.approx(float(least_error(values, counts, k)), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("k", range(2, 30))
def test_every_length_is_found_where_many_tie(k: int) -> None:
    """Evenly spaced equal counts: only the splice of two paths gives most lengths."""
    values, counts = np.arange(32, dtype=float), np.ones(32)
    [boundaries] = kmeans.cluster([(values, counts, k)])
    assert len(boundaries) == k + 1
    expected = least_error(list(range(32)), [1] * 32, k)
    assert squared_error(values, counts, boundaries) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 16, 64, 256])
@pytest.mark.parametrize("law", ["normal", "uniform", "heavy", "two far groups"])
def test_never_worse_than_kmeans1d_on_large_histograms(law: str, k: int) -> None:
    kmeans1d = import_coremltools("_deps")._kmeans1d
    random = np.random.default_rng(7)
    drawn = {
        "normal": random.normal(0, 0.03, 20_000),
        "uniform": random.uniform(-0.02, 0.02, 20_000),
        "heavy": random.standard_t(2, 20_000),
        "two far groups": np.concatenate([random.normal(-30, 0.01, 9_000), random.normal(50, 1, 11_000)]),
    }[law]
    values, counts = np.unique(drawn.astype(np.float16).astype(np.float64), return_counts=True)
    theirs = kmeans1d.cluster(values, k, weights=counts.astype(float))
    entries = np.array(theirs.centroids)[np.array(theirs.clusters)]
    [boundaries] = kmeans.cluster([(values, counts.astype(float), k)])
    ours = squared_error(values, counts.astype(float), boundaries)
    assert ours <= float(np.sum(counts * (values - entries) ** 2)) * (1 + 1e-9)


def test_no_more_clusters_than_values() -> None:
    assert kmeans.cluster([(np.array([1.0, 2.0]), np.ones(2), 5)])[0].tolist() == [0, 1, 2]


def test_many_problems_together_are_each_solved_as_if_alone() -> None:
    random = np.random.default_rng(3)
    problems: list[kmeans.Problem] = []
    for index, k in enumerate((1, 2, 64, 7, 256, 3, 16, 64)):
        values, counts = np.unique(random.normal(index, 1, 40 << index).astype(np.float16), return_counts=True)
        problems.append((values.astype(float), counts.astype(float), k))
    together = kmeans.cluster(problems)
    assert [found.tolist() for found in together] == [kmeans.cluster([one])[0].tolist() for one in problems]
