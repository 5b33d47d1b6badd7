"""Bits of a matrix diagonal by diagonal, each under what its row, its column and its neighbours say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from psc_lightning.artifact.allowance import DIAGONAL
from psc_lightning.artifact.ans import Decoder, Encoder, Ints
from psc_lightning.artifact.codings.coding import Grid, Plane, Proposal, matrix
from psc_lightning.artifact.codings.contexts import Bytes, Contexts, runs
from psc_lightning.artifact.codings.lines import entropy
from psc_lightning.artifact.errors import ADVICE, ArtifactError
from psc_lightning.symbols import unzigzag, zigzag

__all__ = ["Diagonals", "Formula", "promise"]

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]
T = TypeVar("T", bound=np.generic)

_HALF = 24  # contexts on either side of even odds, a quarter of a bit each
_START = 96  # what the weights of a context's table sum to before any bit was seen
_ENTRIES = 1 << 19  # a larger matrix takes too long to read this way,
_DIAGONALS = 4096  # and so does a longer one: a diagonal costs a reader some 200 µs
_BYTES = 48  # that a reader takes for each entry, beside the neighbours
_TOLL = 4.0  # bits that a diagonal must save to be worth that
_SAMPLE = 1 << 15  # entries that neighbours are chosen by
_NEIGHBOURS = 8
_WORTH = 16  # bits that a neighbour must save: its own numbers cost about as many
_LARGEST = 1023  # of a weight's size
_ITERATIONS = 5  # of Newton's method, which goes on from where it was


def log2(x: Ints) -> Ints:
    """The binary logarithm of positive integers in sixteenths, straight between powers of two.

    >>> log2(np.array([1, 2, 3, 4, 5, 1000])).tolist()
    [0, 16, 24, 32, 36, 159]
    """
    exponent = np.frexp(x)[1].astype(np.int64) - 1
    return (exponent << 4) + ((x << 4) >> exponent) - 16


def _first_weights() -> Ints:
    """Weights of both bits in each context, before any was seen: about 2^((c + 0.5) / 4) to 1 for the bit 1."""
    c = np.arange(-_HALF, _HALF)
    ones = (9 + 2 * (c & 3)) << np.maximum(c >> 2, 0)
    zeros = np.int64(8) << np.maximum(-(c >> 2), 0)
    both = np.stack([zeros, ones], 1)
    first: Ints = 1 + _START * both // both.sum(1, keepdims=True)
    return first


@dataclass(frozen=True)
class Formula:
    """How the odds of a bit follow from what was read before: integer weights, in sixteenths.

    Attributes:
        bias: of every bit.
        row: of the odds among the bits of its row so far.
        column: of those in its column.
        neighbours: (rows above, columns to the left) → weight, which counts as it is beside a 1, negative beside a 0, and
            not at all where there is no entry.
    """

    bias: int
    row: int
    column: int
    neighbours: dict[tuple[int, int], int]

    def contexts(self, row: Ints, column: Ints, beside: Ints) -> Bytes:
        """The contexts of bits, from the evidence of their rows, their columns and (last axis) their neighbours."""
        odds = 16 * self.bias + self.row * row + self.column * column
        if self.neighbours:
            odds += 16 * (beside @ np.array(list(self.neighbours.values()), dtype=np.int64))
        contexts: Bytes = (np.clip(odds >> 6, -_HALF, _HALF - 1) + _HALF).astype(np.uint8)
        return contexts

    @property
    def numbers(self) -> list[int]:
        """What is stored: how many neighbours, the three weights, and of each neighbour its place and its weight."""
        places = [n for (up, left), weight in self.neighbours.items() for n in (up, left, zigzag(weight))]
        return [len(self.neighbours), *map(zigzag, (self.bias, self.row, self.column)), *places]


def in_order(grid: Grid) -> tuple[Places, Places, list[tuple[int, int]]]:
    """Rows and columns of a grid's entries by diagonals, those of one by rows; and where each diagonal begins and ends.

    >>> in_order(np.array([[True, True], [True, False]]))
    (array([0, 0, 1]), array([0, 1, 0]), [(0, 1), (1, 3)])
    """
    rows, columns = grid.nonzero()
    order = np.argsort(rows + columns, kind="stable")
    ends = np.bincount(rows + columns, minlength=1).cumsum().tolist()
    return rows[order], columns[order], [(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True) if a < b]


class Evidence:
    """What the bits so far say about the entries of each diagonal.

    A row, or a column, with n ones and m zeros says log2(8 n + 4) - log2(8 m + 4). A neighbour says 1, -1, or 0 where there
    is none.

    Args:
        grid: where there are bits.
        neighbours: (rows above, columns to the left) of each.
    """

    def __init__(self, grid: Grid, neighbours: Iterable[tuple[int, int]]) -> None:
        self._rows, self._columns, self.spans = in_order(grid)
        steps = list(neighbours)
        up, left = (max((step[axis] for step in steps), default=0) for axis in (0, 1))
        # With a margin, so that every neighbour is somewhere.
        self._beside = np.zeros((grid.shape[0] + up) * (grid.shape[1] + left), dtype=np.int64)
        width = grid.shape[1] + left
        self._at = (self._rows + up) * width + self._columns + left
        self._steps = np.array([a * width + b for a, b in steps], dtype=np.int64)
        self._ones = [np.zeros(length, dtype=np.int64) for length in grid.shape]
        self._zeros = [np.zeros(length, dtype=np.int64) for length in grid.shape]
        self._log2 = log2(8 * np.arange(max(grid.shape) + 1, dtype=np.int64) + 4)
        self._shape = grid.shape

    def of(self, start: int, stop: int) -> tuple[Ints, Ints, Ints]:
        """What is known of one diagonal's entries: by row, by column, by neighbours."""
        odds = [
            self._log2[ones[here]] - self._log2[zeros[here]]
            for ones, zeros, here in zip(
                self._ones, self._zeros, (self._rows[start:stop], self._columns[start:stop]), strict=True
            )
        ]
        return odds[0], odds[1], self._beside[self._at[start:stop, None] - self._steps]

    def learn(self, start: int, stop: int, bits: Bytes) -> None:
        """Take a diagonal in."""
        for ones, zeros, here in zip(
            self._ones, self._zeros, (self._rows[start:stop], self._columns[start:stop]), strict=True
        ):
            ones[here] += bits  # a diagonal meets a row once
            zeros[here] += 1 - bits
        self._beside[self._at[start:stop]] = 2 * bits.astype(np.int64) - 1

    def matrix(self) -> npt.NDArray[np.bool_]:
        """The ones so far, at their places."""
        out = np.zeros(self._shape, dtype=np.bool_)
        out[self._rows, self._columns] = self._beside[self._at] > 0
        return out


class Diagonals:
    """For bits with a shape: dense and sparse rows and columns at once, and neighbours that are alike.

    On a diagonal, rows and columns and all that is above and to the left are known. A bit's odds are a weighted sum of the
    odds in its row, those in its column, and its neighbours; they choose one of 48 contexts. The writer finds the weights
    by logistic regression, neighbour by neighbour; a reader only adds integers.

    Stored: how many neighbours (0 … 8), weights of 1, row and column, and of each neighbour how far above and to the left it
    is, and its weight. Of a diagonal the entries come in the order of their contexts, those of one context by rows. A
    context's table starts at its own odds, and learns as in `Contexts`.
    """

    name = "diagonals"
    limits: tuple[int, ...] = ()

    def propose(self, plane: Plane, encoder: Encoder) -> Iterator[Proposal]:
        """Offer the best formula, if a glance promises something of one."""
        if not promise(plane):
            return
        assert plane.grid is not None
        bits = matrix(plane)
        formula = fit(plane.grid, bits)
        rows, columns, spans = in_order(plane.grid)
        symbols, marks = bits[rows, columns], np.where(plane.grid, 2 * bits.astype(np.int64) - 1, 0)
        beside = [_shifted(marks, *place)[rows, columns] for place in formula.neighbours]
        row, column = (odds[rows, columns] for odds in _odds(plane.grid, bits))
        all_contexts = formula.contexts(
            row, column, np.stack(beside, 1) if beside else np.zeros((len(row), 0), np.int64)
        )
        contexts = Contexts(_first_weights())
        parts: list[tuple[Bytes, list[int], list[Ints]]] = []
        cost = 0.0
        for start, stop in spans:
            found, here = all_contexts[start:stop], symbols[start:stop]
            contexts.renew()
            order, present, numbers = runs(found, len(contexts))
            parts.append((here[order], numbers, [contexts.tables[c] for c in present]))
            cost += contexts.learn(_histogram(found, here))

        steps = DIAGONAL * len(spans) + contexts.renewed + len(formula.numbers)

        def write(encoder: Encoder) -> None:
            encoder.choose(steps - len(formula.numbers))  # these count themselves
            for number in formula.numbers:
                encoder.integer(number, self.name)
            for part in parts:
                encoder.put_runs(*part)
            encoder.bits += cost

        bits_of_all = cost + encoder.price(formula.numbers, self.name)
        yield Proposal(bits_of_all, (), write, _toll(cost, len(spans)), steps)

    def read(self, decoder: Decoder, number: int, size: int, parameters: tuple[int, ...], grid: Grid | None) -> Tensor:
        """Read `number` symbols."""
        if size != 2 or grid is None or grid.size > _ENTRIES or sum(grid.shape) > _DIAGONALS:
            raise ArtifactError(
                f"expected bits of a matrix of at most {_ENTRIES} entries and {_DIAGONALS} rows and columns, found "
                f"others: {ADVICE}"
            )
        formula = _read_formula(decoder, grid)
        up, left = (max((place[axis] for place in formula.neighbours), default=0) for axis in (0, 1))
        with decoder.allowance.holding(_BYTES * number + 8 * (grid.shape[0] + up) * (grid.shape[1] + left)):
            evidence, contexts = Evidence(grid, formula.neighbours), Contexts(_first_weights())
            decoder.allowance.step(DIAGONAL * len(evidence.spans))
            for start, stop in evidence.spans:
                found, before = formula.contexts(*evidence.of(start, stop)), contexts.renewed
                contexts.renew()
                decoder.allowance.step(contexts.renewed - before)
                order, present, numbers = runs(found, len(contexts))
                symbols = np.empty(stop - start, dtype=np.uint8)
                symbols[order] = decoder.take_runs(numbers, [contexts.tables[c] for c in present])
                decoder.bits += contexts.learn(_histogram(found, symbols))
                evidence.learn(start, stop, symbols)
            return torch.from_numpy(evidence.matrix()[grid].astype(np.int32))


def _read_formula(decoder: Decoder, grid: Grid) -> Formula:
    def below(limit: int) -> int:
        value = decoder.integer(Diagonals.name)
        if value >= limit:
            raise ArtifactError(f"expected a number below {limit} ({Diagonals.name}), found {value}: {ADVICE}")
        return value

    def weight() -> int:
        return unzigzag(below(2 * _LARGEST + 1))

    number = below(_NEIGHBOURS + 1)
    bias, row, column = weight(), weight(), weight()
    neighbours = {}
    for _ in range(number):
        place = below(grid.shape[0]), below(grid.shape[1])
        if place == (0, 0) or place in neighbours:
            raise ArtifactError(f"expected neighbours, each once, found {place} above and to the left: {ADVICE}")
        neighbours[place] = weight()
    return Formula(bias, row, column, neighbours)


def _histogram(contexts: Bytes, bits: Bytes) -> Ints:
    found: Ints = np.bincount(2 * contexts + bits, minlength=4 * _HALF).reshape(-1, 2)
    return found


# ------------------------------------------------------------------------------------- what only the writer does


def promise(plane: Plane) -> bool:
    """Whether a glance finds that rows, columns and one neighbour together tell enough more than rows or columns alone."""
    grid = plane.grid
    if plane.size != 2 or grid is None or grid.size > _ENTRIES or sum(grid.shape) > _DIAGONALS or min(grid.shape) < 2:
        return False
    bits = matrix(plane)
    whole = float(entropy(plane.histogram[1], plane.histogram.sum()))
    alone, expected = whole, np.full(grid.shape, -plane.histogram[1] / plane.histogram.sum())
    for axis in (0, 1):
        ones, of = bits.sum(axis, dtype=np.int64, keepdims=True), grid.sum(axis, dtype=np.int64, keepdims=True)
        alone = min(alone, entropy(ones, of) + float(np.log2(of + 1).sum()) / 2)
        expected = expected + ones / np.maximum(of, 1)
    wanted = bits[grid].astype(np.float64)
    some = slice(None, None, 1 + len(wanted) // _SAMPLE)
    known = [column[some] for column in _rows_and_columns(grid, bits)]
    chances = _expected(np.stack(known, 1), _regress(known, wanted[some], np.zeros(len(known))))
    hits = np.where(wanted[some] > 0, chances, 1 - chances)
    together = -float(np.log2(hits).mean()) * len(wanted)
    slab = slice(1 + _SAMPLE // grid.shape[1])
    found = _best_pair(grid[slab], np.where(grid, bits - expected, 0.0)[slab])
    return bool(alone - together + found * len(wanted) > _toll(whole, sum(grid.shape)))


def _best_pair(grid: Grid, rest: Floats) -> float:
    """Bits an entry that the best neighbour in a row, or the one above, would save where so much is unexplained; about."""
    there = grid.astype(np.float64)
    alike, pairs = _correlations(rest, rest)[1:], _correlations(there, there)[1:]
    above = float((rest[1:] * rest[:-1]).sum()), float((there[1:] * there[:-1]).sum())
    alike, pairs = np.append(alike, above[0]), np.append(pairs, above[1])
    number = float(there.sum()) + 1
    variance = float((rest**2).sum() / number) + 1e-6
    return float((alike**2 / (pairs + 1)).max()) / (2 * math.log(2) * variance**2 * number)


def _toll(bits: float, diagonals: int) -> float:
    """Bits to save: some for each diagonal, but of a small matrix no more than a 64th of all."""
    return min(_TOLL * diagonals, bits / 64)


def fit(grid: Grid, bits: Bytes) -> Formula:
    """Weights by logistic regression; neighbours one by one, always the one that promises most."""
    marks = np.where(grid, 2.0 * bits - 1.0, 0.0)
    wanted = bits[grid].astype(np.float64)
    some = slice(None, None, 1 + len(wanted) // _SAMPLE)
    known = _rows_and_columns(grid, bits)
    weights = _regress(known, wanted, np.zeros(len(known)), some)
    places: list[tuple[int, int]] = []
    while len(places) < _NEIGHBOURS:
        place, gain = _best_neighbour(grid, marks, wanted, _expected(np.stack(known, 1), weights), places)
        if gain < _WORTH:
            break
        places.append(place)
        known.append(_shifted(marks, *place)[grid])
        weights = _regress(known, wanted, np.append(weights, 0.0), some)
    weights = _regress(known, wanted, weights)
    rounded = np.clip(np.rint(16 * weights / np.log(2)), -_LARGEST, _LARGEST).astype(int).tolist()
    return Formula(rounded[0], rounded[1], rounded[2], dict(zip(places, rounded[3:], strict=True)))


def _odds(grid: Grid, bits: Bytes) -> list[Ints]:
    """What `Evidence` knows of each entry's row, and of its column, for all entries at once."""
    found = []
    for axis in (1, 0):
        ones, of = (table.cumsum(axis, dtype=np.int32) - table for table in (bits, grid))
        odds = log2(8 * np.arange(grid.shape[axis] + 1, dtype=np.int64) + 4)
        found.append(odds[ones] - odds[of - ones])
    return found


def _rows_and_columns(grid: Grid, bits: Bytes) -> list[Floats]:
    """Of each entry 1, and the logarithms of the odds in its row and in its column."""
    return [np.ones(int(grid.sum())), *(odds[grid] / 16 for odds in _odds(grid, bits))]


def _regress(known: list[Floats], wanted: Floats, weights: Floats, some: slice = slice(None)) -> Floats:
    """Weights of logistic regression, by Newton's method from where they are; of some of the entries."""
    columns, wanted = np.stack([column[some] for column in known], 1), wanted[some]
    for _ in range(_ITERATIONS):
        expected = _expected(columns, weights)
        curvature = (columns * (expected * (1 - expected))[:, None]).T @ columns + np.eye(len(weights)) / 100
        weights = weights + np.linalg.solve(curvature, columns.T @ (wanted - expected) - weights / 100)
    return weights


def _expected(columns: Floats, weights: Floats) -> Floats:
    """How likely each bit is 1."""
    expected: Floats = 1 / (1 + np.exp(-np.clip(columns @ weights, -30, 30)))
    return expected


def _best_neighbour(
    grid: Grid, marks: Floats, wanted: Floats, expected: Floats, but: list[tuple[int, int]]
) -> tuple[tuple[int, int], float]:
    """The neighbour in the same row, or one of the nearest above, that would save most bits; and how many, about."""
    rest, spread = np.zeros(grid.shape), np.zeros(grid.shape)
    rest[grid], spread[grid] = wanted - expected, expected * (1 - expected)
    slope, curvature = _correlations(rest, marks), _correlations(spread, marks**2)
    gains = {(0, left): slope[left] ** 2 / (curvature[left] + 1e-2) for left in range(1, grid.shape[1])}
    for up, left in ((1, 0), (2, 0), (1, 1)):
        if up < grid.shape[0] and left < grid.shape[1]:
            there = _shifted(marks, up, left)
            gains[up, left] = float((rest * there).sum() ** 2 / ((spread * there**2).sum() + 1e-2))
    best = max((place for place in gains if place not in but), key=lambda place: gains[place], default=(0, 0))
    return best, float(gains.get(best, 0.0)) / (2 * np.log(2))


def _correlations(here: Floats, there: Floats) -> Floats:
    """Sum over a matrix of here · (what is b columns to the left of it there), for each b."""
    length = 2 * here.shape[1]
    product = (np.fft.rfft(here, length) * np.fft.rfft(there, length).conj()).sum(0)
    found: Floats = np.fft.irfft(product, length)[: here.shape[1]]
    return found


def _shifted(marks: npt.NDArray[T], up: int, left: int) -> npt.NDArray[T]:
    """What is that far above and to the left of each entry, 0 beyond the edge."""
    out = np.zeros_like(marks)
    out[up:, left:] = marks[: marks.shape[0] - up, : marks.shape[1] - left]
    return out
