"""A matrix line by line, each entry under what the lines before say about its place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from psc_lightning.artifact.ans import PRECISION, Decoder, Encoder, Ints, model, table
from psc_lightning.artifact.codings.adaptive import UNIT
from psc_lightning.artifact.codings.coding import Proposal
from psc_lightning.artifact.errors import ArtifactError

__all__ = ["Lines", "Places"]

Bytes = npt.NDArray[np.uint8]

_SIZES = 16  # larger alphabets would have too many tables to learn
_PRIOR = 16  # weight of each symbol before any was seen, in thirty-seconds of a symbol
_FIRST = 8  # symbols that a context sees before its first table, and at least between two
# The borders of seven classes of places: how often one is marked, beside the average.
_BORDERS = ((1, 4), (1, 2), (3, 4), (4, 3), (2, 1), (4, 1))
_CONTEXTS = 4 * (len(_BORDERS) + 1)
_LINES = 8192  # a line costs a reader some 50 µs
_GAIN = 0.01  # the share of all bits that a glance must promise before the whole is tried


class Places:
    """What is known about each place of a line; the same for writer and reader, in whole numbers.

    An entry is *marked* where it is not the common symbol. Its context is 4 · class + 2 · (its place was marked one line
    before) + (two lines before). With N marks at its place in the j lines before, f = 1 + all marks before and e = 2 + all
    entries before, the class counts the borders a/b with b · (N · e + 2 · f) ≥ a · (j + 2) · f.

    Args:
        length: entries a line.
        size: of the alphabet.
        common: the symbol that marks nothing.
    """

    def __init__(self, length: int, size: int, common: int) -> None:
        self._size, self._common = size, common
        self._marks = np.zeros(length, dtype=np.int64)
        self._once = np.zeros(length, dtype=np.uint8)
        self._twice = np.zeros(length, dtype=np.uint8)
        self._lines = self._all = 0
        self._seen = np.zeros((_CONTEXTS, size), dtype=np.int64)
        self._due = [_FIRST] * _CONTEXTS
        first = table(np.full(size, _PRIOR))
        #: the table of each context; an array is replaced, never changed
        self.tables: list[Ints] = [first] * _CONTEXTS
        #: -log2 of their probabilities
        self.costs = np.tile(PRECISION - np.log2(first), (_CONTEXTS, 1))

    def next(self) -> tuple[Bytes, list[int]]:
        """The contexts of the next line's entries, and which contexts have a new table now."""
        f, e = 1 + self._all, 2 + self._lines * len(self._marks)
        # The smallest N of each class: exact, for Python's integers have no end.
        borders = [-(((2 * b - a * (self._lines + 2)) * f) // (b * e)) for a, b in _BORDERS]
        contexts = np.searchsorted(np.array(borders), self._marks, side="right").astype(np.uint8)
        contexts <<= 2
        contexts += 2 * self._once + self._twice
        new = [c for c, (seen, due) in enumerate(zip(self._seen.sum(1).tolist(), self._due)) if seen >= due]
        for c in new:
            seen = int(self._seen[c].sum())
            self._due[c] = seen + max(_FIRST, seen // 4)
            self.tables[c] = table(_PRIOR + UNIT * self._seen[c])
            self.costs[c] = PRECISION - np.log2(self.tables[c])
        return contexts, new

    def learn(self, symbols: Bytes, contexts: Bytes) -> float:
        """Take the line in; what it costs, in bits."""
        places = contexts.astype(np.int64) * self._size + symbols
        histogram = np.bincount(places, minlength=self._seen.size).reshape(self._seen.shape)
        self._seen += histogram
        marked = (symbols != self._common).astype(np.uint8)
        self._marks += marked
        self._all += int(marked.sum())
        self._lines += 1
        self._once, self._twice = marked, self._once
        return float((histogram * self.costs).sum())


def _runs(contexts: Bytes) -> tuple[npt.NDArray[np.intp], list[int], list[int]]:
    """A line's entries sorted by context, which contexts there are, and how many entries each has."""
    numbers = np.bincount(contexts, minlength=_CONTEXTS)
    present = numbers.nonzero()[0]
    return np.argsort(contexts, kind="stable"), present.tolist(), numbers[present].tolist()


class Lines:
    """For matrices whose zeros keep together: along rows, along columns, beside one another.

    Stored: two integers, whether the lines are rows (0) or columns (1), and the common symbol. Of a line the entries come
    in the order of their contexts, those of one context in the order of their places. The weights of a context's table
    are 16 for each symbol and 32 for each time that it was seen there; a table is made anew before a line if its context
    has seen 8 symbols, or 8 and a quarter of them more than when it was last made.
    """

    name = "lines"
    limits: tuple[int, ...] = (2, _SIZES)

    def propose(self, symbols: Tensor, histogram: Ints, columns: int) -> Iterator[Proposal]:
        """Offer the direction that a glance finds better, if any."""
        size = len(histogram)
        if size > _SIZES or columns < 2 or len(symbols) < 2 * columns:
            return
        matrix = symbols.numpy().reshape(-1, columns)
        common = int(histogram.argmax())
        present = histogram[histogram > 0]
        total = float((present * np.log2(len(symbols) / present)).sum())
        views = [view for view in ((0, matrix), (1, matrix.T)) if len(view[1]) <= _LINES]
        promised = {by: _glance((view != common).astype(np.uint8)) for by, view in views}
        by = max(promised, key=lambda by: promised[by], default=0)
        if promised.get(by, 0.0) <= _GAIN * total:
            return
        lines = np.ascontiguousarray(dict(views)[by])
        places = Places(lines.shape[1], size, common)
        parts: list[tuple[Bytes, list[int], list[Ints]]] = []
        cost = 0.0
        for line in lines:
            contexts, _ = places.next()
            order, present_here, numbers = _runs(contexts)
            parts.append((line[order], numbers, [places.tables[c] for c in present_here]))
            cost += places.learn(line, contexts)

        def write(encoder: Encoder) -> None:
            for part in parts:
                encoder.put_runs(*part)
            encoder.bits += cost

        yield Proposal(cost, (by, common), write)

    def read(self, decoder: Decoder, number: int, size: int, parameters: tuple[int, ...], columns: int) -> Tensor:
        """Read `number` symbols."""
        by, common = parameters
        rows = number // max(1, columns)
        if rows * columns != number or (columns, rows)[1 - by] > _LINES:
            raise ArtifactError(f"expected a matrix of at most {_LINES} lines, found {rows} × {columns}: {_ADVICE}")
        shape = (columns, rows) if by else (rows, columns)
        out = np.empty(shape, dtype=np.uint8)
        places = Places(shape[1], size, common)
        models = [model(k) for k in places.tables]
        for line in out:
            contexts, new = places.next()
            for c in new:
                models[c] = model(places.tables[c])
            order, present, numbers = _runs(contexts)
            line[order] = decoder.take_runs(numbers, [models[c] for c in present])
            decoder.bits += places.learn(line, contexts)
        return torch.from_numpy(np.ascontiguousarray(out.T if by else out).reshape(-1).astype(np.int32))


def _glance(marks: Bytes) -> float:
    """Bits that knowing the two lines before, or how often each place is marked, would save; about."""

    def entropy(marked: Ints, of: Ints) -> float:
        share = np.clip(marked / np.maximum(of, 1), 1e-9, 1 - 1e-9)
        return float(-(of * (share * np.log2(share) + (1 - share) * np.log2(1 - share))).sum())

    lines, length = marks.shape
    if lines < 3:
        return 0.0
    before = 2 * marks[1:-1] + marks[:-2]
    found = np.bincount((2 * before + marks[2:]).reshape(-1), minlength=8).reshape(4, 2)
    here = marks.sum(0, dtype=np.int64)
    whole = entropy(here.sum(keepdims=True), np.array([marks.size]))
    by_line = entropy(found[:, 1], found.sum(1))
    by_place = entropy(here, np.full(length, lines)) + length * np.log2(lines) / 2
    return whole - min(by_line, float(by_place))


_ADVICE = "the file is damaged or was not written by psc_lightning; get a fresh copy, or save the model again"
