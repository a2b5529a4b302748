"""Exact one-dimensional k-means over weighted values.

Clusters of an optimum are intervals of the sorted values, so a clustering is a path from node 0 to node n over the
gaps between values, where the edge (j, i) costs the weighted squared error of the values j … i - 1 about their
mean. That cost has the concave Monge property, from which follows all that is used here:

- the best k-edge path is convex in k, so that a penalty per edge finds it (Aggarwal, Schieber, Tokuyama: "Finding a
  minimum-weight k-link path in graphs with the concave Monge property and applications", 1994; for k-means
  Grønlund, Larsen, Mathiasen, Nielsen, Schneider, Song: "Fast exact k-means, k-medians and Bregman divergence
  clustering in 1D", 2017, section 3);
- where several lengths tie at one penalty, a path of each length between is spliced from two found ones (ibid.);
- the best last edge to a node moves right as the node does, which prunes the search for it.

The shortest path of one penalty is found for whole blocks of nodes at once, so that numpy does the work: up to a
node whose distance is at most one penalty more than the block's start, no edge that begins inside the block is of
use. A run takes about one and a half blocks per cluster. The result is the optimum up to float64's rounding.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

_FANOUT = 8
_INTERPOLATIONS = 12
_NEAR = 16


def cluster(values: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    """The boundaries of the best ``k`` clusters: int array b of ``k + 1`` with cluster m = values[b[m]:b[m + 1]].

    ``values`` (float64) are finite, distinct and ascending, ``counts`` their positive weights; where there are no
    more than ``k`` values, each is a cluster of its own.
    """
    count = len(values)
    if k >= count:
        return np.arange(count + 1)
    if k == 1:
        return np.array([0, count])
    line = _Line.of(values, counts)
    few, many = _Found(np.array([0, count])), _Found(np.arange(count + 1))
    penalty = 2 * line.cost(_companded(values, counts, k)) / k
    for attempt in itertools.count():
        chord = (line.cost(few.path) - line.cost(many.path)) / (many.edges - few.edges)
        at_chord = attempt >= _INTERPOLATIONS or not 0 < penalty < np.inf
        found = _Found(_shortest_path(line, chord if at_chord else penalty), penalty)
        if found.edges == k:
            return found.path
        if at_chord and not few.edges < found.edges < many.edges:
            break  # both ends are optimal at the penalty of their chord, and so is every length between
        few, many = (few, found) if found.edges > k else (found, many)
        penalty = _next_penalty(k, few, many)
    return _splice(few.path, many.path, k)


def nearly(values: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    """As `cluster`, with an error at most a percent above the best: where choices are made by it, not palettes.
    Values are taken together, `_NEAR` for each cluster, where they lie closest."""
    if len(values) <= _NEAR * k:
        return cluster(values, counts, k)
    bounds = _companded(values, counts, _NEAR * k, rounds=0)
    starts = bounds[:-1]
    taken = cluster(centroids(values, counts, bounds), np.add.reduceat(counts, starts), k)
    result: np.ndarray = bounds[taken]
    return result


def centroids(values: np.ndarray, counts: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
    """The weighted mean of each cluster, in float64; clusters may not be empty."""
    starts = boundaries[:-1]
    result: np.ndarray = np.add.reduceat(values * counts, starts) / np.add.reduceat(counts, starts)
    return result


@dataclass(frozen=True, slots=True)
class _Found:
    """A path that is optimal for its length, and a penalty at which it is the shortest (0: not looked for)."""

    path: np.ndarray
    penalty: float = 0.0

    @property
    def edges(self) -> int:
        return len(self.path) - 1


@dataclass(frozen=True, slots=True)
class _Line:
    """Sums over the first i values, i = 0 … n, of 1, x and x², with x about the mean to keep digits."""

    zeroth: np.ndarray
    first: np.ndarray
    second: np.ndarray

    @staticmethod
    def of(values: np.ndarray, counts: np.ndarray) -> _Line:
        centred = values - np.average(values, weights=counts)
        sums = (counts, counts * centred, counts * centred**2)
        return _Line(*(np.concatenate([[0.0], np.cumsum(terms)]) for terms in sums))

    def cost(self, path: np.ndarray) -> float:
        """The squared error of the clustering ``path``."""
        sizes, firsts = np.diff(self.zeroth[path]), np.diff(self.first[path])
        return float(max(self.second[-1] - np.sum(firsts**2 / sizes), 0.0))


def _companded(values: np.ndarray, counts: np.ndarray, k: int, rounds: int = 4) -> np.ndarray:
    """A good clustering: density of centroids as the cube root of the values' density (Panter and Dite, 1951)."""
    gaps = np.gradient(values)
    measure = np.cumsum(np.cbrt(counts * gaps * gaps))
    inner = np.searchsorted(measure, measure[-1] * np.arange(1, k) / k)
    boundaries = np.unique(np.concatenate([[0], inner, [len(values)]]))
    # A few of Lloyd's rounds: this is a start for the exact search, which needs an estimate of the penalty only.
    for _ in range(rounds):
        means = centroids(values, counts, boundaries)
        inner = np.searchsorted(values, (means[1:] + means[:-1]) / 2)
        boundaries = np.unique(np.concatenate([[0], inner, [len(values)]]))
    return boundaries


def _next_penalty(k: int, few: _Found, many: _Found) -> float:
    """The penalty at which ``k`` edges are expected: error falls with k to the second power, its slope (which is
    the penalty) with the third. Between two known lengths, the line through both on logarithmic scales."""
    if few.penalty and many.penalty:
        ends = np.log([few.edges, many.edges])
        return float(np.exp(np.interp(np.log(k), ends, np.log([few.penalty, many.penalty]))))
    known = few if few.penalty else many
    return float(known.penalty * (known.edges / k) ** 3)


def _shortest_path(line: _Line, penalty: float) -> np.ndarray:
    """The cheapest path from the first node to the last where each edge costs ``penalty`` more."""
    count = len(line.zeroth) - 1
    distance = np.zeros(count + 1)
    reduced = np.zeros(count + 1)  # distance less the second sums, which cancel in all comparisons
    parent = np.zeros(count + 1, np.int64)
    settled, step = 0, 1
    while settled < count:
        last = min(settled + step, count)
        rows = np.arange(settled + 1, last + 1)
        best, value = _row_minima(line, reduced, rows, int(parent[settled]), settled)
        reached = value + penalty + line.second[rows]
        beyond = reached > distance[settled] + penalty
        keep = max(1, int(beyond.argmax())) if beyond.any() else len(rows)
        block = slice(settled + 1, settled + keep + 1)
        distance[block], parent[block] = reached[:keep], best[:keep]
        reduced[block] = value[:keep] + penalty
        step = 2 * step if keep == len(rows) else keep + keep // 4 + 1
        settled += keep
    return _walk(parent)


def _walk(parent: np.ndarray) -> np.ndarray:
    path = [len(parent) - 1]
    while path[-1] > 0:
        path.append(int(parent[path[-1]]))
    return np.array(path[::-1])


def _row_minima(
    line: _Line, reduced: np.ndarray, rows: np.ndarray, left: int, right: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each end node in ``rows``, which lie right of ``right``: the best start in left … right, and its value.

    Coarse to fine: of every block of rows the last is solved first, and bounds those before it.
    """
    best = np.empty(len(rows), np.int64)
    value = np.empty(len(rows))
    stride = 1
    while stride * _FANOUT <= len(rows):
        stride *= _FANOUT
    bounds = np.array([left, right])
    while stride:
        at = np.arange(stride - 1, len(rows), stride)
        coarse = (at + 1) // (stride * _FANOUT)
        if len(bounds) > 2:
            unsolved = (at + 1) % (stride * _FANOUT) != 0
            at, coarse = at[unsolved], coarse[unsolved]
        else:
            coarse[:] = 0
        if len(at):
            best[at], value[at] = _ranges_minima(line, reduced, rows[at], bounds[coarse], bounds[coarse + 1])
        bounds = np.concatenate([[left], best[stride - 1 :: stride], [right]])
        stride //= _FANOUT
    return best, value


def _ranges_minima(
    line: _Line, reduced: np.ndarray, rows: np.ndarray, first: np.ndarray, last: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The leftmost best start in first … last (inclusive) for each of ``rows``, and its value."""
    # Called very often with little to do: array methods, which cost half of what numpy's functions around them do.
    lengths = last - first + 1
    ends = lengths.cumsum()
    begins = ends - lengths
    start = (first - begins).repeat(lengths)
    start += np.arange(len(start))
    sums = line.first[rows].repeat(lengths)
    sums -= line.first[start]
    sums *= sums
    sizes = line.zeroth[rows].repeat(lengths)
    sizes -= line.zeroth[start]
    sums /= sizes
    values = reduced[start]
    values -= sums
    lowest = np.minimum.reduceat(values, begins)
    # The leftmost of equal ones, as the Monge property needs it.
    hits = (values == lowest.repeat(lengths)).nonzero()[0]
    return start[hits[hits.searchsorted(begins)]], lowest


def _splice(few: np.ndarray, many: np.ndarray, k: int) -> np.ndarray:
    """A path of ``k`` edges from two that are optimal at one penalty: ``many``'s beginning, ``few``'s end, changed
    over where an edge of ``few`` spans an edge of ``many`` (the Monge property keeps the sum of both costs)."""
    shift = k - (len(few) - 1)
    edges = np.arange(len(few) - 1)
    spans = (few[edges] <= many[edges + shift]) & (many[edges + shift + 1] <= few[edges + 1])
    change = int(np.flatnonzero(spans)[0])
    return np.concatenate([many[: change + shift + 1], few[change + 1 :]])
