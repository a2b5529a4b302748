"""Exact one-dimensional k-means over weighted values, for many sets of values at once.

Clusters of an optimum are intervals of the sorted values, so a clustering is a path from node 0 to node n over the
gaps between values, where the edge (j, i) costs the weighted squared error of the values j … i - 1 about their
mean. That cost has the concave Monge property, from which follows all that is used here:

- the best k-edge path is convex in k, so that a penalty per edge finds it (Aggarwal, Schieber, Tokuyama: "Finding a
  minimum-weight k-link path in graphs with the concave Monge property and applications", 1994; for k-means
  Grønlund, Larsen, Mathiasen, Nielsen, Schneider, Song: "Fast exact k-means, k-medians and Bregman divergence
  clustering in 1D", 2017, section 3);
- where a penalty finds e edges instead of k, it has shown where the best k-edge path runs: node m of that lies
  between nodes m - |k - e| and m of the shorter of both. What is left is searched node by node;
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

_FANOUT = 4  # a power of two
_RUNS = 12
_WIDE = 2
"""Times all nodes: searching so many node by node takes about as long as a run with another penalty."""
_NEAR = 16

Problem = tuple[np.ndarray, np.ndarray, int]
"""Values (float64, finite, distinct, ascending), their positive weights (float64), and k."""


def cluster(problems: Sequence[Problem]) -> list[np.ndarray]:
    """For each problem the boundaries of the best k clusters: int array b of k + 1 with cluster m =
    values[b[m]:b[m + 1]]; where there are no more than k values, each is a cluster of its own."""
    searches = [_Search.of(*problem) for problem in problems]
    for _ in range(_RUNS):
        if not (wide := [search for search in searches if search.is_wide]):
            break
        paths = _shortest_paths([search.line for search in wide], [search.penalty for search in wide])
        for search, path in zip(wide, paths, strict=True):
            search.learn(path)
    if unfinished := [search for search in searches if search.path is None]:
        for search, path in zip(unfinished, _paths_within(unfinished), strict=True):
            search.path = path
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

    @staticmethod
    def joined(lines: Sequence[_Line]) -> tuple[_Line, np.ndarray]:
        """One after the other, and where each begins."""
        bases = _begins(np.array([len(line.zeroth) for line in lines]))
        parts = zip(*((line.zeroth, line.first, line.second) for line in lines), strict=True)
        return _Line(*(np.concatenate(part) for part in parts)), bases

    def at(self, nodes: np.ndarray) -> _Line:
        """The sums at ``nodes`` alone."""
        return _Line(self.zeroth[nodes], self.first[nodes], self.second[nodes])

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


@dataclass(slots=True)
class _Search:
    """What is known of one problem: optimal paths of fewer and of more edges than ``k``, and ``path``, the best of
    ``k`` edges, once it is found."""

    line: _Line
    k: int
    few: _Found
    many: _Found
    penalty: float = 0.0
    path: np.ndarray | None = None

    @staticmethod
    def of(values: np.ndarray, counts: np.ndarray, k: int) -> _Search:
        count, line = len(values), _Line.of(values, counts)
        search = _Search(line, k, _Found(np.array([0, count])), _Found(np.arange(count + 1)))
        if k >= count:
            search.path = search.many.path
        elif k == 1:
            search.path = search.few.path
        else:
            search.penalty = 2 * line.cost(_companded(values, counts, k)) / k
        return search

    @property
    def is_wide(self) -> bool:
        """True where a run with another penalty is worth its time."""
        if self.path is not None or not 0 < self.penalty < np.inf:
            return False
        lowest, highest = self.bounds()
        return int((highest - lowest).sum()) > _WIDE * len(self.line.zeroth)

    def learn(self, path: np.ndarray) -> None:
        """Take in the shortest path at ``penalty``."""
        found = _Found(path, self.penalty)
        if found.edges == self.k:
            self.path = path
        elif found.edges < self.k:
            self.few = found
        else:
            self.many = found
        self.penalty = _next_penalty(self.k, self.few, self.many)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last place of each node of a best path."""
        few, many = self.few.path, self.many.path
        missing, surplus = self.k - self.few.edges, self.many.edges - self.k
        lowest = np.maximum(np.concatenate([np.zeros(missing, np.int64), few]), many[: self.k + 1])
        highest = np.minimum(np.concatenate([few, np.full(missing, few[-1])]), many[surplus:])
        # Among paths that tie, rounding may have chosen two that do not go together.
        return np.minimum(lowest, highest), np.maximum(lowest, highest)


def _shortest_paths(lines: Sequence[_Line], penalties: Sequence[float]) -> list[np.ndarray]:
    """For each line the cheapest path from its first node to its last where each edge costs its penalty more."""
    line, bases = _Line.joined(lines)
    ends = bases + np.array([len(each.zeroth) for each in lines]) - 1
    distance = np.zeros(len(line.zeroth))
    reduced = np.zeros(len(line.zeroth))  # distance less the second sums, which cancel in all comparisons
    parent = np.zeros(len(line.zeroth), np.int64)
    parent[bases] = bases
    settled, last, penalty, step = bases, ends, np.array(penalties), np.ones(len(bases), np.int64)
    while len(settled):
        lengths = np.minimum(step, last - settled)
        rows = _ranges(settled + 1, lengths)
        left, right = parent[settled].repeat(lengths), settled.repeat(lengths)
        best, value = _row_minima(line, reduced, rows, lengths, left, right)
        value += penalty.repeat(lengths)
        reached = value + line.second[rows]
        numbers = _ranges(np.zeros_like(lengths), lengths)
        beyond = reached > (distance[settled] + penalty).repeat(lengths)
        begins = lengths.cumsum() - lengths
        keep = np.minimum.reduceat(np.where(beyond, numbers, lengths.repeat(lengths)), begins).clip(1)
        kept = numbers < keep.repeat(lengths)
        block = rows[kept]
        distance[block], parent[block], reduced[block] = reached[kept], best[kept], value[kept]
        step = np.where(keep == lengths, 2 * step, keep + keep // 4 + 1)
        settled = settled + keep
        on = settled < last
        settled, last, penalty, step = settled[on], last[on], penalty[on], step[on]
    return [_walk(parent, end) - base for base, end in zip(bases.tolist(), ends.tolist(), strict=True)]


def _paths_within(searches: Sequence[_Search]) -> list[np.ndarray]:
    """For each search the best path within its bounds. The places of all nodes stand one after the other."""
    bounds = [search.bounds() for search in searches]
    places = [_ranges(lowest, highest - lowest + 1) for lowest, highest in bounds]
    line, bases = _Line.joined([search.line.at(nodes) for search, nodes in zip(searches, places, strict=True)])
    reduced, parent = np.zeros(len(line.zeroth)), np.zeros(len(line.zeroth), np.int64)
    begins = [base + _begins(highest - lowest + 1) for base, (lowest, highest) in zip(bases, bounds, strict=True)]
    place = np.concatenate(places)
    parent[bases] = bases
    for node in range(1, max(search.k for search in searches) + 1):
        on = [index for index, search in enumerate(searches) if node <= search.k]
        first, before = (np.array([begins[index][which] for index in on]) for which in (node, node - 1))
        lengths = np.array([bounds[index][1][node] - bounds[index][0][node] + 1 for index in on])
        rows = _ranges(first, lengths)
        left = before.repeat(lengths)
        right = np.minimum(first.repeat(lengths) - 1, left + place[rows] - 1 - place[left])
        parent[rows], reduced[rows] = _row_minima(line, reduced, rows, lengths, left, right)
    return [place[_walk(parent, int(begin[-1]))] for begin in begins]


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
    line: _Line, reduced: np.ndarray, rows: np.ndarray, lengths: np.ndarray, left: np.ndarray, right: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each end node in ``rows`` (of each line so many as ``lengths`` says) the best start in left … right, and
    its value.

    Coarse to fine: of every block of rows the last is solved first, and bounds those before it.
    """
    best = np.zeros(len(rows), np.int64)
    value = np.empty(len(rows))
    number, count = _ranges(np.ones_like(lengths), lengths), lengths.repeat(lengths)
    stride = 1
    while stride * _FANOUT <= lengths.max():
        stride *= _FANOUT
    while stride:
        block = stride * _FANOUT
        behind = number & (block - 1)
        at = ((behind & (stride - 1) == 0) & (behind != 0)).nonzero()[0]
        back = behind[at]
        first = np.where(back < number[at], best[at - back], left[at])
        after = at - back + block
        solved = number[at] - back + block <= count[at]
        last = np.minimum(np.where(solved, best[after.clip(max=len(best) - 1)], right[at]), right[at])
        # Rounding may have put the best starts of two rows that tie the wrong way round.
        best[at], value[at] = _ranges_minima(line, reduced, rows[at], first, np.maximum(first, last))
        stride //= _FANOUT
    return best, value


def _ranges_minima(
    line: _Line, reduced: np.ndarray, rows: np.ndarray, first: np.ndarray, last: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The leftmost best start in first … last (inclusive) for each of ``rows``, and its value."""
    lengths = last - first + 1
    begins = _begins(lengths)
    start = _ranges(first, lengths)
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
