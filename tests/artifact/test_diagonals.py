"""Coding 4: bits at the odds that rows, columns and neighbours make."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from read_with_numpy import Ans

from psc_lightning.artifact.ans import Coded, Decoder, Encoder
from psc_lightning.artifact.codings import Plane, diagonals
from psc_lightning.artifact.codings.diagonals import Diagonals, Evidence, Formula
from psc_lightning.artifact.codings.lines import Lines
from psc_lightning.artifact.errors import ArtifactError
from psc_lightning.artifact.streams import SymbolReader, SymbolWriter

Bits = npt.NDArray[np.uint8]


def image(rows: int, side: int, seed: int = 0) -> Bits:
    """Each row is an image, a disc of its own; some rows have more, some pixels are never there."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side]
    odds = random.normal(0, 1.5, (rows, 1)) + random.normal(0, 1, (1, side * side)) - 1
    for row in odds:
        a, b, radius = random.uniform(0, side, 3)
        row += 8 * (np.hypot(y - a, x - b) < radius / 2).reshape(-1) - 4
    return (random.random((rows, side * side)) < 1 / (1 + np.exp(-odds))).astype(np.uint8)


def coded(bits: Bits, grid: npt.NDArray[np.bool_], formula: Formula) -> tuple[Coded, float]:
    """A file of one plane under this formula, its coding's number and the limits of the symbols before it."""
    plane = Plane(torch.from_numpy(bits[grid]), 2, grid)
    with mock.patch.object(diagonals, "fit", return_value=formula), mock.patch.object(diagonals, "promise"):
        (proposal,) = Diagonals().propose(plane, Encoder())
    encoder = Encoder()
    proposal.write(encoder)
    return encoder.finish(), encoder.bits


def test_evidence_by_hand() -> None:
    """A 2 × 3 matrix without its upper right corner; the first column is 1, 0, the second 1, 1."""
    grid = np.array([[True, True, False], [True, True, True]])
    evidence = Evidence(grid, [(1, 0), (0, 1)])
    assert evidence.spans == [(0, 1), (1, 3), (3, 4), (4, 5)]
    row, column, beside = evidence.of(0, 1)
    assert (row.tolist(), column.tolist(), beside.tolist()) == ([0], [0], [[0, 0]])
    evidence.learn(0, 1, np.array([1], np.uint8))
    # (0, 1) and (1, 0): L(12) - L(4) = 16 · 3 + 24 - 16 - 32 = 24 for the row of the one, the column of the other.
    row, column, beside = evidence.of(1, 3)
    assert (row.tolist(), column.tolist(), beside.tolist()) == ([24, 0], [0, 24], [[0, 1], [1, 0]])
    evidence.learn(1, 3, np.array([1, 0], np.uint8))
    # (1, 1): its row has a 0, its column a 1; above it is a 1, to the left a 0.
    row, column, beside = evidence.of(3, 4)
    assert (row.tolist(), column.tolist(), beside.tolist()) == ([-24], [24], [[1, -1]])
    evidence.learn(3, 4, np.array([1], np.uint8))
    # (1, 2): one of both in its row; nothing in its column, nothing above it.
    row, column, beside = evidence.of(4, 5)
    assert (row.tolist(), column.tolist(), beside.tolist()) == ([0], [0], [[0, 1]])


def test_contexts_by_hand() -> None:
    formula = Formula(bias=2, row=16, column=-8, neighbours={(0, 1): 5, (3, 0): -7})
    row, column = np.array([24, -24, 0, 4000, -4000]), np.array([0, 24, 0, 0, 0])
    beside = np.array([[1, 0], [1, 1], [-1, -1], [0, 0], [0, 0]])
    # odds 32 + 384 + 80 = 496; 32 - 384 - 192 + 80 - 112 = -576; 32 - 80 + 112 = 64; beyond both ends.
    assert (formula.contexts(row, column, beside).astype(int) - 24).tolist() == [7, -9, 1, 23, -24]
    assert formula.numbers == [2, 4, 32, 15, 0, 1, 10, 3, 0, 13]


def test_first_weights_by_hand() -> None:
    first = diagonals._first_weights()
    assert len(first) == 48
    assert first[24].tolist() == [1 + 96 * 8 // 17, 1 + 96 * 9 // 17]
    assert first[23].tolist() == [1 + 96 * 16 // 31, 1 + 96 * 15 // 31]  # q = -1: q mod 4 is 3, ⌊q / 4⌋ is -1
    assert first[47].tolist() == [1 + 96 * 8 // 488, 1 + 96 * 480 // 488]
    ratios = np.log2(first[:, 1] / first[:, 0])
    assert np.all(np.diff(ratios) >= 0)
    assert ratios[28] == pytest.approx(4.5 / 4, abs=0.1)


@pytest.mark.parametrize("holes", [False, True])
def test_images_in_rows(holes: bool) -> None:
    """What is beside a pixel, and what is above it in the image, is found; rows and columns count at once."""
    bits = image(120, 16)
    grid = np.random.default_rng(1).random(bits.shape) < (0.5 if holes else 2)
    plane = Plane(torch.from_numpy(bits[grid]), 2, grid)
    by_lines = min(proposal.bits for proposal in Lines().propose(plane, Encoder()))
    writer = SymbolWriter()
    writer.symbols(torch.from_numpy(bits[grid]).int(), 2, torch.from_numpy(grid))
    assert writer.streams[0].coding == "diagonals"
    assert writer.bits < (0.9 if holes else 0.8) * by_lines
    formula = diagonals.fit(grid, bits)
    assert {(0, 1), (0, 16)} <= set(formula.neighbours)
    assert formula.column > 0
    data = writer.finish()
    assert Ans(data.stack, data.plain).array(int(grid.sum()), 2, grid) == bits[grid].tolist()
    reader = SymbolReader(data)
    assert reader.symbols(int(grid.sum()), 2, torch.from_numpy(grid)).tolist() == bits[grid].tolist()
    reader.finish()
    assert reader.bits == pytest.approx(writer.bits)


weights = st.integers(-1023, 1023)


@given(st.data(), st.integers(1, 12), st.integers(1, 40), st.integers(0, 99), st.floats(0.05, 1))
@settings(max_examples=60, deadline=None)
def test_any_formula_returns_what_was_written(data, rows: int, columns: int, seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    grid = random.random((rows, columns)) < share
    grid[0, 0] = True
    bits = np.where(grid, random.random((rows, columns)) < random.random(), 0).astype(np.uint8)
    places = st.tuples(st.integers(0, rows - 1), st.integers(0, columns - 1)).filter(any)
    chosen = data.draw(st.lists(places, unique=True, max_size=8)) if rows * columns > 1 else []
    formula = Formula(*(data.draw(weights) for _ in range(3)), {place: data.draw(weights) for place in chosen})
    stored, cost = coded(bits, grid, formula)
    decoder = Decoder(stored)
    read = Diagonals().read(decoder, int(grid.sum()), 2, (), grid)
    decoder.finish()
    assert read.dtype == torch.int32
    assert read.tolist() == bits[grid].tolist()
    assert decoder.bits == pytest.approx(cost)
    assert Ans(stored.stack).diagonals(int(grid.sum()), 2, grid).tolist() == bits[grid].tolist()


def numbers(*values: int) -> Decoder:
    encoder = Encoder()
    for value in values:
        encoder.integer(value, "diagonals")
    return Decoder(encoder.finish())


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ((9,), "below 9 .*found 9"),
        ((0, 2047), "below 2047 .*found 2047"),
        ((1, 0, 0, 0, 4), "below 4 .*found 4"),
        ((1, 0, 0, 0, 0, 5), "below 5 .*found 5"),
        ((1, 0, 0, 0, 0, 0), r"each once, found \(0, 0\)"),
        ((2, 0, 0, 0, 1, 1, 6, 1, 1), r"each once, found \(1, 1\)"),
    ],
)
def test_a_formula_that_cannot_be_is_refused(written: tuple[int, ...], found: str) -> None:
    with pytest.raises(ArtifactError, match=found):
        Diagonals().read(numbers(*written), 20, 2, (), np.ones((4, 5), bool))


@pytest.mark.parametrize("shape", [(1, 4096), (4096, 1), (1024, 513)])
def test_a_matrix_that_takes_long_is_refused(shape: tuple[int, int]) -> None:
    """And is not offered: who writes keeps to what is read."""
    grid = np.ones(shape, bool)
    with pytest.raises(ArtifactError, match="at most 524288 entries and 4096 rows and columns"):
        Diagonals().read(numbers(0, 0, 0, 0), math.prod(shape), 2, (), grid)
    bits = np.random.default_rng(0).random(shape) < np.linspace(0, 1, shape[1])
    assert not diagonals.promise(Plane(torch.from_numpy(bits.astype(np.uint8).reshape(-1)), 2, grid))


def test_symbols_without_places_are_refused() -> None:
    with pytest.raises(ArtifactError, match="found others"):
        Diagonals().read(numbers(0, 0, 0, 0), 20, 2, (), None)
    with pytest.raises(ArtifactError, match="found others"):
        Diagonals().read(numbers(0, 0, 0, 0), 20, 3, (), np.ones((4, 5), bool))
