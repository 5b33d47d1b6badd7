"""Optimal clustering of numbers on a line: where the centroids of a codebook start.

On a line a cluster is an interval of the sorted numbers, so the best k of them are found by dynamic programming: the
best end of q clusters at j is the best end of q-1 at some i before, and i only grows with j. All on the CPU in float64.

Source: Wang and Song 2011, "Ckmeans.1d.dp: optimal k-means clustering in one dimension by dynamic programming";
Grønlund et al. 2017, "Fast exact k-means, k-medians and Bregman divergence clustering in 1D" (divide and conquer).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["optimal_centroids"]

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

_EXACT = 4096  # distinct values of a group, and bins of a group that has more
_WORK = 10**8  # rows · values · clusters · log(values) that the dynamic programme may cost: some seconds
_BATCH = 1 << 19  # values, of several rows at once
_LLOYD = 50  # rounds
_NOTHING = 1e-300  # the weight of no points, whose sum is 0 too


def optimal_centroids(values: Tensor, keep: Tensor | None, k: int) -> Tensor:
    """The centroids with the least squared error for each row over its kept entries: ``(rows, k)`` float32, sorted.

    Optimal where a row has at most 4096 distinct values (fewer, where there are thousands of rows); else the best of so
    many bins, and some of Lloyd's rounds over all entries: within 0.1 % of the best. At most k distinct values are their
    own centroids, bit for bit; the largest is repeated. A row without a finite entry has zeros.

    Args:
        values: ``(rows, entries)``.
        keep: which entries count, of the same shape; None: all.
        k: 1 or more.

    >>> optimal_centroids(torch.tensor([[0.0, 0.1, 0.9, 1.0, 77.0]]), torch.tensor([[True] * 4 + [False]]), 2)
    tensor([[0.0500, 0.9500]])
    """
    rows = values.detach().to("cpu", torch.float32).numpy()
    marks = None if keep is None else keep.cpu().numpy()
    most = _EXACT
    while most > 4 * k and len(rows) * most * k * math.log2(most) > _WORK:
        most //= 2
    out = np.zeros((len(rows), k), dtype=np.float32)
    waiting: list[tuple[int, Floats, Floats, npt.NDArray[np.float32] | None]] = []
    size = 0
    for index, row in enumerate(rows):
        ordered = np.sort(row if marks is None else row[marks[index]])
        if len(ordered) and not (np.isfinite(ordered[0]) and np.isfinite(ordered[-1])):
            ordered = ordered[np.isfinite(ordered)]
        if not len(ordered):
            continue
        steps = ordered[1:] != ordered[:-1]
        if np.count_nonzero(steps) >= most:
            waiting.append((index, *_bins(ordered, most), ordered))
        else:
            starts = np.concatenate(([0], np.flatnonzero(steps) + 1))
            distinct = ordered[starts] + np.float32(0)  # never -0.0
            if len(distinct) <= k:
                out[index] = np.concatenate((distinct, np.repeat(distinct[-1:], k - len(distinct))))
                continue
            weights = np.diff(starts, append=len(ordered)).astype(np.float64)
            waiting.append((index, distinct.astype(np.float64), weights, None))
        size = max(size, len(waiting[-1][1]))
        if size * len(waiting) >= _BATCH:
            _solve(waiting, k, out)
            waiting, size = [], 0
    _solve(waiting, k, out)
    return torch.from_numpy(out).to(values.device)


def _bins(ordered: npt.NDArray[np.float32], most: int) -> tuple[Floats, Floats]:
    """Means and counts of bins, about as many of them in each of the clusters to come.

    Best clusters lie as close as the cube root of the density (Panter and Dite 1951): s entries with a gap g between
    the first and the last claim ``s^(1/3) · g^(2/3)`` of the bins. The outermost entries are looked at one by one.
    """
    n = len(ordered)
    ends = np.arange(min(most, n))
    places = np.unique(np.concatenate((ends, np.linspace(0, n - 1, 16 * most).astype(np.int64), n - 1 - ends)))
    gaps = np.diff(ordered[places].astype(np.float64))
    claims = np.cbrt(np.diff(places) * gaps**2)
    for _ in range(8):  # a wide gap needs the end of one bin, however far out an entry lies
        claims = np.minimum(claims, 2 * claims.sum() / most)
    claims = np.concatenate(([0.0], np.cumsum(claims)))
    starts = places[np.searchsorted(claims, np.linspace(0, claims[-1], most))]
    starts = np.unique(np.concatenate(([0], starts)))
    counts = np.diff(starts, append=n).astype(np.float64)
    return np.add.reduceat(ordered, starts, dtype=np.float64) / counts, counts


def _solve(
    waiting: list[tuple[int, Floats, Floats, npt.NDArray[np.float32] | None]], k: int, out: npt.NDArray[np.float32]
) -> None:
    """Find and write the centroids of some rows: (index, sorted values, weights, all entries where those are bins)."""
    if not waiting:
        return
    lengths = np.array([len(values) for _, values, _, _ in waiting])
    points = np.zeros((len(waiting), lengths.max()))
    weights = np.zeros_like(points)
    for i, (_, values, weight, _) in enumerate(waiting):
        points[i, : len(values)] = values - np.average(values, weights=weight)  # small sums cancel less
        weights[i, : len(values)] = weight
    for i, (ends, (index, values, weight, ordered)) in enumerate(zip(_partition(points, weights, lengths, k), waiting)):
        starts = np.unique(np.concatenate(([0], ends)))
        starts = starts[starts < lengths[i]]
        centroids = np.add.reduceat(values * weight, starts) / np.add.reduceat(weight, starts)
        if ordered is not None:
            centroids = _lloyd(ordered, centroids)
        out[index] = np.concatenate((centroids, np.repeat(centroids[-1:], k - len(centroids)))).astype(np.float32)


def _partition(points: Floats, weights: Floats, lengths: Places, k: int) -> Places:
    """Where the clusters 2 … k of each row begin, best for its first `length` points; a weight of 0 is a place to spare.

    ``D_q[j] = min_i D_(q-1)[i] + cost(i, j)`` for the first j points in q clusters, the last of them from i on;
    ``cost = Σ w·x² - (Σ w·x)² / Σ w``, by prefix sums. The middle j are solved first: their i bound those of the others.
    """
    rows, n = points.shape
    prefix = np.zeros((3, rows, n + 1))
    for total, terms in zip(prefix, (weights, weights * points, weights * points**2)):
        np.cumsum(terms, axis=1, out=total[:, 1:])
    weight, linear, square = (total.reshape(-1) for total in prefix)
    first = np.arange(rows) * (n + 1)
    cost = square - linear**2 / np.maximum(weight, _NOTHING)
    places = np.zeros((k + 1, rows * (n + 1)), dtype=np.int64)  # the best i of each j, both in the flat arrays
    for q in range(2, k + 1):
        before, place = cost - square, places[q]
        place[first] = first
        step = 1 << (n.bit_length() - 1)
        if q == k:  # of the last cluster only one end is asked for
            place[first + lengths], _ = _minima(first, first + lengths, first + lengths, weight, linear, before)
            step = 0
        while step:
            j = (first[:, None] + np.arange(step, n + 1, 2 * step)).reshape(-1)
            beyond = np.minimum(j + step, np.repeat(first + n, len(j) // rows))
            high = np.where(beyond == j + step, place[beyond], j)
            place[j], lowest = _minima(place[j - step], np.minimum(high, j), j, weight, linear, before)
            cost[j] = lowest + square[j]
            step //= 2
    ends = np.empty((rows, k - 1), dtype=np.int64)
    end = first + lengths
    for q in range(k, 1, -1):
        end = places[q][end]
        ends[:, q - 2] = end - first
    return ends


def _minima(
    low: Places, high: Places, j: Places, weight: Floats, linear: Floats, before: Floats
) -> tuple[Places, Floats]:
    """For each j the first i in low … high where ``before[i] - (Σ w·x)² / Σ w`` of the points i … j is least; and it."""
    lengths = high - low + 1
    starts = np.cumsum(lengths) - lengths
    i = np.repeat(low - starts, lengths)
    i += np.arange(len(i))
    terms = np.repeat(linear[j], lengths)
    terms -= linear[i]
    terms *= terms
    share = np.repeat(weight[j], lengths)
    share -= weight[i]
    terms /= np.maximum(share, _NOTHING, out=share)
    np.subtract(before[i], terms, out=terms)
    least = np.minimum.reduceat(terms, starts)
    at = np.flatnonzero(terms == np.repeat(least, lengths))
    return i[at[np.searchsorted(at, starts)]], least


def _lloyd(ordered: npt.NDArray[np.float32], centroids: Floats) -> Floats:
    """Lloyd's rounds over sorted entries: a cluster is an interval, its sum a difference of prefix sums."""
    prefix = np.zeros(len(ordered) + 1)
    np.cumsum(ordered, dtype=np.float64, out=prefix[1:])
    for _ in range(_LLOYD):
        middles = ((centroids[1:] + centroids[:-1]) / 2).astype(np.float32)  # of float64 all entries would be copied
        edges = np.concatenate(([0], np.searchsorted(ordered, middles, side="right"), [len(ordered)]))
        inside = np.diff(edges)
        moved = np.where(inside > 0, np.diff(prefix[edges]) / np.maximum(inside, 1), centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids
