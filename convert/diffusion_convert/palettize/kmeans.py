"""Exact one-dimensional k-means over weighted values, for many sets of values at once.

Clusters of an optimum are intervals of the sorted values, so a clustering is a path from node 0 to node n over the
gaps between values, where the edge (j, i) costs the weighted squared error of the values j … i - 1 about their
mean. That cost has the concave Monge property, from which follows all that is used here:

- the best k-edge path is convex in k, so that a penalty per edge finds it (Aggarwal, Schieber, Tokuyama: "Finding a
  minimum-weight k-link path in graphs with the concave Monge property and applications", 1994; for k-means
  Grønlund, Larsen, Mathiasen, Nielsen, Schneider, Song: "Fast exact k-means, k-medians and Bregman divergence
  clustering in 1D", 2017, section 3);
- where no penalty finds k edges, two shortest paths of one penalty, with fewer and with more edges, can be spliced
  to one of k edges that is as short;
- the best last edge to a node moves right as the node does, which prunes the search for it.

The shortest path of one penalty is found for whole blocks of nodes at once, so that numpy does the work: up to a
node whose distance is at most one penalty more than the block's start, no edge that begins inside the block is of
use. A run takes about one and a half blocks per cluster. Blocks of many sets of values are one call of numpy, which
otherwise would cost more than its work. The result is the optimum up to float64's rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_FANOUT = 4
_GUESSES = 4
"""Penalties to try for a path on the other side of k edges than the first one found."""
_NEAR = 16

Problem = tuple[np.ndarray, np.ndarray, int]
"""Values (float64, finite, distinct, ascending), their positive weights (float64), and k."""


def cluster(problems: Sequence[Problem]) -> list[np.ndarray]:
    """For each problem the boundaries of the best k clusters: int array b of k + 1 with cluster m =
    values[b[m]:b[m + 1]]; where there are no more than k values, each is a cluster of its own."""
    searches = [_Search.of(*problem) for problem in problems]
    while unfinished := [search for search in searches if search.path is None]:
        paths = _shortest_paths([search.line for search in unfinished], [search.penalty for search in unfinished])
        for search, path in zip(unfinished, paths, strict=True):
            search.learn(path)
    return [search.path for search in searches if search.path is not None]


def nearly(problems: Sequence[Problem]) -> list[np.ndarray]:
    """As `cluster`, with an error at most a percent above the best: where choices are made by it, not palettes.
    Values are taken together, `_NEAR` for each cluster, where they lie closest."""
    taken = [_taken_together(*problem) for problem in problems]
    found = cluster([problem for _, problem in taken])
    return [bounds[boundaries] for (bounds, _), boundaries in zip(taken, found, strict=True)]


def _taken_together(values: np.ndarray, counts: np.ndarray, k: int) -> tuple[np.ndarray, Problem]:
    """The boundaries of small groups of values, and the problem of the groups' means."""
    if len(values) <= _NEAR * k:
        return np.arange(len(values) + 1), (values, counts, k)
    bounds = _companded(values, counts, _NEAR * k, rounds=0)
    return bounds, (centroids(values, counts, bounds), np.add.reduceat(counts, bounds[:-1]), k)


def centroids(values: np.ndarray, counts: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
    """The weighted mean of each cluster, in float64; clusters may not be empty."""
    starts = boundaries[:-1]
    result: np.ndarray = np.add.reduceat(values * counts, starts) / np.add.reduceat(counts, starts)
    return result


@dataclass(frozen=True, slots=True)
class _Found:
    """A path that is optimal for its length, its squared error, and a penalty at which it is the shortest (0: not
    looked for)."""

    path: np.ndarray
    error: float
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


@dataclass(slots=True)
class _Search:
    """What is known of one problem: optimal paths of fewer and of more edges than ``k``, and ``path``, the best of
    ``k`` edges, once it is found."""

    line: _Line
    k: int
    few: _Found
    many: _Found
    penalty: float = 0.0
    guesses: int = _GUESSES
    path: np.ndarray | None = None

    @staticmethod
    def of(values: np.ndarray, counts: np.ndarray, k: int) -> _Search:
        count, line = len(values), _Line.of(values, counts)
        whole = np.array([0, count])
        search = _Search(line, k, _Found(whole, line.cost(whole)), _Found(np.arange(count + 1), 0.0))
        if k >= count:
            search.path = search.many.path
        elif k == 1:
            search.path = search.few.path
        else:
            # Error falls with about (k + 1) to the second power, and its slope is the penalty.
            search.penalty = 2 * line.cost(_companded(values, counts, k)) / (k + 1)
        return search

    def learn(self, path: np.ndarray) -> None:
        """Take in the shortest path at ``penalty``, and set the next penalty."""
        found = _Found(path, self.line.cost(path), self.penalty)
        if found.edges == self.k:
            self.path = path
        elif not (self.guesses or self.few.edges < found.edges < self.many.edges):
            self.path = _spliced(self.few.path, self.many.path, self.k)
        elif found.edges < self.k:
            self.few = found
        else:
            self.many = found
        self.guesses = 0 if self.few.penalty and self.many.penalty else max(self.guesses - 1, 0)
        self.penalty = self._next_penalty()

    def _next_penalty(self) -> float:
        """Between two lengths the penalty at which both are as short: where no other path is shorter then,
        `_spliced` goes on. Until both are known, one at which rather fewer or more edges are expected: the penalty
        is the slope of the error, which falls with the third power of the edges."""
        few, many = self.few, self.many
        if self.guesses:
            penalty, edges = (few.penalty, few.edges + 2 / 3) if few.penalty else (many.penalty, many.edges - 2 / 3)
            return penalty * (edges / self.k) ** 3
        return (few.error - many.error) / (many.edges - few.edges)


def _spliced(few: np.ndarray, many: np.ndarray, k: int) -> np.ndarray:
    """The path of ``k`` edges that begins as ``many`` and ends as ``few``: both are shortest at one penalty, and
    so is it, for where an edge of ``few`` spans one of ``many`` the Monge property lets them be exchanged."""
    ahead = k + 1 - len(few)
    spans = (few[:-1] <= many[ahead:k]) & (many[ahead + 1 : k + 1] <= few[1:])
    at = int(spans.argmax())
    return np.concatenate([many[: at + ahead + 1], few[at + 1 :]])


def _shortest_paths(lines: Sequence[_Line], penalties: Sequence[float]) -> list[np.ndarray]:
    """For each line the cheapest path from its first node to its last where each edge costs its penalty more."""
    sizes = np.array([len(line.zeroth) for line in lines])
    bases, ends = _begins(sizes), sizes.cumsum() - 1
    line = _Line(*(np.concatenate([getattr(one, name) for one in lines]) for name in ("zeroth", "first", "second")))
    distance, parent = np.zeros(sizes.sum()), np.zeros(sizes.sum(), np.int64)
    reduced = np.zeros(sizes.sum())  # distance less the second sums, which cancel in all comparisons
    parent[bases] = bases
    settled, last, penalty, step = bases, ends, np.array(penalties), np.ones(len(bases), np.int64)
    while len(settled):
        lengths = np.minimum(step, last - settled)
        best, value = _row_minima(line, reduced, settled + 1, lengths, parent[settled], settled)
        value += penalty.repeat(lengths)
        rows, numbers = _ranges(settled + 1, lengths), _ranges(np.zeros_like(lengths), lengths)
        reached = value + line.second[rows]
        beyond = reached > (distance[settled] + penalty).repeat(lengths)
        keep = np.minimum.reduceat(np.where(beyond, numbers, lengths.repeat(lengths)), _begins(lengths)).clip(1)
        kept = numbers < keep.repeat(lengths)
        block = rows[kept]
        distance[block], parent[block], reduced[block] = reached[kept], best[kept], value[kept]
        step = np.where(keep == lengths, 2 * step, keep + keep // 8 + 1)
        settled = settled + keep
        on = settled < last
        settled, last, penalty, step = settled[on], last[on], penalty[on], step[on]
    return [_walk(parent, end) - base for base, end in zip(bases.tolist(), ends.tolist(), strict=True)]


def _ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """begin … begin + length - 1 for each, one after the other."""
    result: np.ndarray = (begins - _begins(lengths)).repeat(lengths)
    result += np.arange(len(result))
    return result


def _begins(lengths: np.ndarray) -> np.ndarray:
    result: np.ndarray = lengths.cumsum() - lengths
    return result


def _walk(parent: np.ndarray, end: int) -> np.ndarray:
    path = [end]
    while (before := int(parent[path[-1]])) != path[-1]:
        path.append(before)
    return np.array(path[::-1])


def _row_minima(
    line: _Line, reduced: np.ndarray, begin: np.ndarray, lengths: np.ndarray, left: np.ndarray, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For the end nodes begin … begin + length - 1 of each line the best start in left … right, and its value.

    Coarse to fine: the last row of each line is solved first. Then rows are parted into `_FANOUT` bands again and
    again, where the last of each is solved, between the best starts of those that are solved on both sides.
    """
    ends = lengths.cumsum()
    best, value = np.empty(ends[-1], np.int64), np.empty(ends[-1])
    right, value[ends - 1] = (
        found[0] for found in _band_minima(line, reduced, (begin + lengths - 1)[None], left, right)
    )
    best[ends - 1] = right
    at, stride = ends - lengths, 1  # where each band's rows begin; the bands' length
    shift = begin - at
    while stride < lengths.max():
        stride *= _FANOUT
    while stride > 1:
        stride //= _FANOUT
        inner = np.minimum(at + np.arange(1, _FANOUT)[:, None] * stride, ends) - 1
        best[inner], value[inner] = _band_minima(line, reduced, inner + shift, left, right)
        # Rounding may have put the best starts of two rows that tie the wrong way round.
        bounds = np.maximum.accumulate(np.concatenate([left[None], best[inner], right[None]]))
        at = (at + np.arange(_FANOUT)[:, None] * stride).T.reshape(-1)
        ends, shift = ends.repeat(_FANOUT), shift.repeat(_FANOUT)
        on = at + 1 < ends
        at, ends, shift = at[on], ends[on], shift[on]
        left, right = bounds[:-1].T.reshape(-1)[on], bounds[1:].T.reshape(-1)[on]
    return best, value


def _band_minima(
    line: _Line, reduced: np.ndarray, rows: np.ndarray, left: np.ndarray, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The leftmost best start in left … right of each band for ``rows`` (any number, bands), and its value."""
    lengths = right - left + 1
    begins = _begins(lengths)
    start = _ranges(left, lengths)
    values = line.first[rows].repeat(lengths, axis=1)
    values -= line.first[start]
    values *= values
    sizes = line.zeroth[rows].repeat(lengths, axis=1)
    sizes -= line.zeroth[start]
    values /= sizes
    np.subtract(reduced[start], values, out=values)
    lowest = np.minimum.reduceat(values, begins, axis=1)
    # The leftmost of equal ones, as the Monge property needs it.
    hits = (values == lowest.repeat(lengths, axis=1)).reshape(-1).nonzero()[0]
    each = begins + np.arange(len(rows))[:, None] * len(start)
    return start[hits[hits.searchsorted(each)] % len(start)], lowest
