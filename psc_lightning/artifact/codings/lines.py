"""Bits of a matrix line by line, each under what the lines before say about its place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from psc_lightning.artifact.allowance import LINE
from psc_lightning.artifact.ans import Decoder, Encoder, Ints
from psc_lightning.artifact.codings.coding import Grid, Plane, Proposal, matrix
from psc_lightning.artifact.codings.contexts import Bytes, Contexts, runs
from psc_lightning.artifact.errors import ADVICE, ArtifactError

__all__ = ["Lines", "direction", "entropy"]

Here = npt.NDArray[np.intp] | slice  # places of a line

_PRIOR = 16  # weight of each bit before any was seen, in thirty-seconds of a bit
# The borders a/b of seven classes: how often something is 1, beside the average.
_BORDERS = ((1, 4), (1, 2), (3, 4), (4, 3), (2, 1), (4, 1))
_CLASSES = len(_BORDERS) + 1
_RUNS = 4 * _CLASSES  # contexts within a line
_LINES = 8192  # a line costs a reader some 100 µs
_GAIN = 0.01  # the share of all bits that a glance must promise before the whole is tried
_ENTRIES = 1 << 18  # of larger matrices with holes only the places are looked at
_OF_ENTRY, _OF_PLACE = 4, 48  # bytes that a reader takes
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
        self.contexts = Contexts(np.full((_CLASSES * _RUNS, 2), _PRIOR, dtype=np.int64))

    def next(self, here: Here) -> tuple[Bytes, int]:
        """For the entries at these places of the next line: contexts within the line, and what to add to them."""
        f, e = 1 + self._ones, 2 + self._all
        own = self._marks[here] * e + 2 * f
        average = (self._seen[here] + 2) * f
        contexts = np.zeros(len(own), dtype=np.uint8)
        for a, b in _BORDERS:
            contexts += b * own >= a * average
        contexts <<= 2
        contexts += self._recent[here]
        k, n = (sum(values) for values in zip(*self._lines))
        line = _RUNS * sum(b * (n * e + 2 * f) >= a * (k + 2) * f for a, b in _BORDERS)
        self.contexts.renew(line, _RUNS)
        return contexts, line

    def learn(self, here: Here, bits: Bytes, contexts: Bytes, line: int) -> float:
        """Take a line's entries in; what they cost, in bits."""
        found = np.bincount(2 * contexts + bits, minlength=2 * _RUNS).reshape(_RUNS, 2)
        self._marks[here] += bits
        self._seen[here] += 1
        self._recent[here] = self._recent[here] >> 1 | bits << 1
        ones = int(bits.sum())
        self._all += len(bits)
        self._ones += ones
        self._lines = [self._lines[1], (len(bits), ones)]
        return self.contexts.learn(found, line)


def _places(marked: Grid) -> Here | None:
    """Where a line has entries; None if nowhere. A slice, which is read faster, where they are everywhere."""
    if marked.all():
        return slice(None)
    here: npt.NDArray[np.intp] = marked.nonzero()[0]
    return here if len(here) else None


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
        grid, bits = (np.ascontiguousarray(view.T if by else view) for view in (plane.grid, matrix(plane)))
        places = Places(grid.shape[1])
        parts: list[tuple[Bytes, list[int], list[Ints]]] = []
        cost = 0.0
        for marked, line in zip(grid, bits, strict=True):
            here = _places(marked)
            if here is None:
                continue
            contexts, first = places.next(here)
            order, present, numbers = runs(contexts, _RUNS)
            symbols = line[here]
            parts.append((symbols[order], numbers, [places.contexts.tables[first + c] for c in present]))
            cost += places.learn(here, symbols, contexts, first)

        steps = LINE * len(parts) + places.contexts.renewed

        def write(encoder: Encoder) -> None:
            encoder.choose(steps)
            for part in parts:
                encoder.put_runs(*part)
            encoder.bits += cost

        yield Proposal(cost, (by,), write, steps=steps)

    def read(self, decoder: Decoder, number: int, size: int, parameters: tuple[int, ...], grid: Grid | None) -> Tensor:
        """Read `number` symbols."""
        if size != 2 or grid is None or grid.shape[parameters[0]] > _LINES:
            raise ArtifactError(f"expected bits of a matrix of at most {_LINES} lines, found others: {ADVICE}")
        decoder.allowance.step(LINE * int(grid.any(1 - parameters[0]).sum()))
        with decoder.allowance.holding(_OF_ENTRY * grid.size + _OF_PLACE * grid.shape[1 - parameters[0]]):
            turned = np.ascontiguousarray(grid.T if parameters[0] else grid)
            out = np.zeros(turned.shape, dtype=np.uint8)
            _read(decoder, turned, out)
            return torch.from_numpy((out.T if parameters[0] else out)[grid])


def _read(decoder: Decoder, grid: Grid, out: Bytes) -> None:
    """Fill a matrix line by line."""
    places = Places(grid.shape[1])
    for marked, line in zip(grid, out, strict=True):
        here = _places(marked)
        if here is None:
            continue
        before = places.contexts.renewed
        contexts, first = places.next(here)
        decoder.allowance.step(places.contexts.renewed - before)
        order, present, numbers = runs(contexts, _RUNS)
        symbols = np.empty(len(contexts), dtype=np.uint8)
        symbols[order] = decoder.take_runs(numbers, [places.contexts.tables[first + c] for c in present])
        line[here] = symbols
        decoder.bits += places.learn(here, symbols, contexts, first)


def direction(plane: Plane) -> int | None:
    """Whether bits had better be read by rows (0) or by columns (1); None if a glance promises too little of either."""
    assert plane.grid is not None
    if min(plane.grid.shape) < 2:
        return None
    bits = matrix(plane)
    total = entropy(plane.histogram[1], plane.histogram.sum())
    promised = {}
    for by, grid, view in ((0, plane.grid, bits), (1, plane.grid.T, bits.T)):
        if len(grid) <= _LINES:
            gain = _glance(grid, view)
            if gain > max(_GAIN * total, len(grid) * bits.size / _WORTH):
                promised[by] = gain
    return max(promised, key=lambda by: promised[by], default=None)


def entropy(ones: Ints, of: Ints) -> float:
    """Bits that groups of `of` bits cost together, `ones` of each being 1, if that is known."""
    share = np.clip(ones / np.maximum(of, 1), 1e-9, 1 - 1e-9)
    return float(-(of * (share * np.log2(share) + (1 - share) * np.log2(1 - share))).sum())


def _glance(grid: Grid, bits: Bytes) -> float:
    """Bits that knowing how often a bit is 1 at its place, or the last one there, would save; about."""
    ones, of = bits.sum(0, dtype=np.int64), grid.sum(0, dtype=np.int64)
    coded = entropy(ones, of) + float(np.log2(of + 1).sum()) / 2
    if grid.all():
        coded = min(coded, _in_the_context_of(bits[:-1], bits[1:]))
    elif grid.size <= _ENTRIES:
        coded = min(coded, _by_the_last(np.ascontiguousarray(grid), np.ascontiguousarray(bits)))
    return entropy(ones.sum(), of.sum()) - coded


def _by_the_last(grid: Grid, bits: Bytes) -> float:
    """What the bits cost, each in the context of the last one at its place."""
    lines = np.arange(1, len(grid) + 1, dtype=np.int32)[:, None]
    last = np.maximum.accumulate(np.where(grid, lines, 0), axis=0)[:-1]
    before = np.where(last > 0, np.take_along_axis(bits, np.maximum(last - 1, 0), 0), 0)
    now = grid[1:]
    return _in_the_context_of(before[now], bits[1:][now])


def _in_the_context_of(before: Bytes, bits: Bytes) -> float:
    """What bits cost, each in the context of another bit."""
    ones, both = int(before.sum(dtype=np.int64)), int((before & bits).sum(dtype=np.int64))
    found = np.array([int(bits.sum(dtype=np.int64)) - both, both])
    return entropy(found, np.array([before.size - ones, ones]))
