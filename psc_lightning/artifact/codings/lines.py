"""Bits of a matrix line by line, each under what the lines before say about its place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from psc_lightning.artifact.ans import PRECISION, Decoder, Encoder, Ints, table
from psc_lightning.artifact.codings.adaptive import UNIT
from psc_lightning.artifact.codings.coding import Grid, Plane, Proposal
from psc_lightning.artifact.errors import ADVICE, ArtifactError

__all__ = ["Lines", "Places", "direction"]

Bytes = npt.NDArray[np.uint8]

_PRIOR = 16  # weight of each bit before any was seen, in thirty-seconds of a bit
_FIRST = 8  # bits that a context sees before its first table, and at least between two
# The borders a/b of seven classes: how often something is 1, beside the average.
_BORDERS = ((1, 4), (1, 2), (3, 4), (4, 3), (2, 1), (4, 1))
_CLASSES = len(_BORDERS) + 1
_RUNS = 4 * _CLASSES  # contexts within a line
_LINES = 8192  # a line costs a reader some 100 µs
_GAIN = 0.01  # the share of all bits that a glance must promise before the whole is tried
_ENTRIES = 1 << 20  # larger matrices are not even glanced at
_WORTH = 1 << 16  # and a bit a line for so many entries of the matrix: large ones are to be read fast


class Places:
    """What is known about a matrix's places and lines; the same for writer and reader, in whole numbers.

    Of the entries read so far e - 2 there are, and f - 1 of them are 1; at a place K and N; in the last two lines with
    entries k and n. A share N of K is in a class by how many borders a/b it reaches: b · (N · e + 2 · f) ≥ a · (K + 2) · f.
    The context of an entry is 28 · (class of n of k) + 4 · (class of its place) + 2 · (the last bit read at its place) +
    (the one before that).

    Args:
        length: places in a line.
    """

    def __init__(self, length: int) -> None:
        self._all = self._ones = 0
        self._seen = np.zeros(length, dtype=np.int64)
        self._marks = np.zeros(length, dtype=np.int64)
        self._recent = np.zeros(length, dtype=np.uint8)  # 2 · last + the one before
        self._lines = [(0, 0), (0, 0)]
        self._histograms = np.zeros((_CLASSES * _RUNS, 2), dtype=np.int64)
        self._due = np.full(_CLASSES * _RUNS, _FIRST)
        first = table(np.full(2, _PRIOR))
        #: the table of each context; an array is replaced, never changed
        self.tables: list[Ints] = [first] * len(self._due)
        self._costs = np.tile(PRECISION - np.log2(first), (len(self._due), 1))

    def next(self, here: npt.NDArray[np.intp]) -> tuple[Bytes, int]:
        """For the entries at these places of the next line: contexts within the line, and what to add to them."""
        f, e = 1 + self._ones, 2 + self._all
        own = self._marks[here] * e + 2 * f
        average = (self._seen[here] + 2) * f
        contexts = np.zeros(len(here), dtype=np.uint8)
        for a, b in _BORDERS:
            contexts += b * own >= a * average
        contexts <<= 2
        contexts += self._recent[here]
        k, n = (sum(values) for values in zip(*self._lines))
        line = _RUNS * sum(b * (n * e + 2 * f) >= a * (k + 2) * f for a, b in _BORDERS)
        seen = self._histograms[line : line + _RUNS].sum(1)
        for c in (line + (seen >= self._due[line : line + _RUNS]).nonzero()[0]).tolist():
            seen_here = int(self._histograms[c].sum())
            self._due[c] = seen_here + max(_FIRST, seen_here // 4)
            self.tables[c] = table(_PRIOR + UNIT * self._histograms[c])
            self._costs[c] = PRECISION - np.log2(self.tables[c])
        return contexts, line

    def learn(self, here: npt.NDArray[np.intp], bits: Bytes, contexts: Bytes, line: int) -> float:
        """Take a line's entries in; what they cost, in bits."""
        found = np.bincount(2 * contexts + bits, minlength=2 * _RUNS).reshape(_RUNS, 2)
        self._histograms[line : line + _RUNS] += found
        self._marks[here] += bits
        self._seen[here] += 1
        self._recent[here] = self._recent[here] >> 1 | bits << 1
        ones = int(bits.sum())
        self._all += len(here)
        self._ones += ones
        self._lines = [self._lines[1], (len(here), ones)]
        return float((found * self._costs[line : line + _RUNS]).sum())


def _runs(contexts: Bytes) -> tuple[npt.NDArray[np.intp], list[int], list[int]]:
    """A line's entries sorted by context, which contexts there are, and how many entries each has."""
    numbers = np.bincount(contexts, minlength=_RUNS)
    present = numbers.nonzero()[0]
    return np.argsort(contexts, kind="stable"), present.tolist(), numbers[present].tolist()


class Lines:
    """For bits that keep together: along rows, along columns, beside one another.

    Stored: one integer, whether the lines are the matrix's rows (0) or its columns (1). Of a line the entries come in the
    order of their contexts, those of one context in the order of their places. The weights of a context's table are 16
    for each bit and 32 for each time that it was seen there; a table is made anew before a line of its class if its
    context has seen 8 bits, or 8 and a quarter of them more than when it was last made.
    """

    name = "lines"
    limits: tuple[int, ...] = (2,)

    def propose(self, plane: Plane, encoder: Encoder) -> Iterator[Proposal]:
        """Offer the direction that a glance finds better, if any."""
        if plane.size != 2 or plane.grid is None:
            return
        by = direction(plane)
        if by is None:
            return
        bits = np.zeros(plane.grid.shape, dtype=np.uint8)
        bits[plane.grid] = plane.symbols.numpy()
        grid, bits = (plane.grid.T, bits.T) if by else (plane.grid, bits)
        places = Places(grid.shape[1])
        parts: list[tuple[Bytes, list[int], list[Ints]]] = []
        cost = 0.0
        for marked, line in zip(grid, bits, strict=True):
            here = marked.nonzero()[0]
            if not len(here):
                continue
            contexts, first = places.next(here)
            order, present, numbers = _runs(contexts)
            symbols = line[here]
            parts.append((symbols[order], numbers, [places.tables[first + c] for c in present]))
            cost += places.learn(here, symbols, contexts, first)

        def write(encoder: Encoder) -> None:
            for part in parts:
                encoder.put_runs(*part)
            encoder.bits += cost

        yield Proposal(cost, (by,), write)

    def read(self, decoder: Decoder, number: int, size: int, parameters: tuple[int, ...], grid: Grid | None) -> Tensor:
        """Read `number` symbols."""
        if size != 2 or grid is None or grid.shape[parameters[0]] > _LINES:
            raise ArtifactError(f"expected bits of a matrix of at most {_LINES} lines, found others: {ADVICE}")
        out = np.zeros(grid.shape, dtype=np.uint8)
        view = (grid.T, out.T) if parameters[0] else (grid, out)
        places = Places(view[0].shape[1])
        for marked, line in zip(*view, strict=True):
            here = marked.nonzero()[0]
            if not len(here):
                continue
            contexts, first = places.next(here)
            order, present, numbers = _runs(contexts)
            symbols = np.empty(len(here), dtype=np.uint8)
            symbols[order] = decoder.take_runs(numbers, [places.tables[first + c] for c in present])
            line[here] = symbols
            decoder.bits += places.learn(here, symbols, contexts, first)
        return torch.from_numpy(out[grid].astype(np.int32))


def direction(plane: Plane) -> int | None:
    """Whether bits had better be read by rows (0) or by columns (1); None if a glance promises too little of either."""
    assert plane.grid is not None
    if min(plane.grid.shape) < 2 or plane.grid.size > _ENTRIES:
        return None
    bits = np.zeros(plane.grid.shape, dtype=np.uint8)
    bits[plane.grid] = plane.symbols.numpy()
    total = _entropy(plane.histogram[1], plane.histogram.sum())
    promised = {}
    for by, grid, view in ((0, plane.grid, bits), (1, plane.grid.T, bits.T)):
        if len(grid) <= _LINES:
            gain = _glance(np.ascontiguousarray(grid), np.ascontiguousarray(view))
            if gain > max(_GAIN * total, len(grid) * bits.size / _WORTH):
                promised[by] = gain
    return max(promised, key=lambda by: promised[by], default=None)


def _entropy(ones: Ints, of: Ints) -> float:
    share = np.clip(ones / np.maximum(of, 1), 1e-9, 1 - 1e-9)
    return float(-(of * (share * np.log2(share) + (1 - share) * np.log2(1 - share))).sum())


def _glance(grid: Grid, bits: Bytes) -> float:
    """Bits that knowing the last bit at a place, or how often it is 1 there, would save; about."""
    lines = np.arange(1, len(grid) + 1, dtype=np.int32)[:, None]
    last = np.maximum.accumulate(np.where(grid, lines, 0), axis=0)[:-1]
    before = np.where(last > 0, np.take_along_axis(bits, np.maximum(last - 1, 0), 0), 0)
    now = grid[1:]
    found = np.bincount(2 * before[now] + bits[1:][now], minlength=4).reshape(2, 2)
    ones, of = bits.sum(0, dtype=np.int64), grid.sum(0, dtype=np.int64)
    whole = _entropy(ones.sum(), of.sum())
    by_place = _entropy(ones, of) + float(np.log2(of + 1).sum()) / 2
    return whole - min(_entropy(found[:, 1], found.sum(1)), by_place)
