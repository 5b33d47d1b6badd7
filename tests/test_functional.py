from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from psc_lightning import functional as F

shapes = st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple)
groups = st.one_of(st.sampled_from(["tensor", "channel"]), st.integers(1, 60))


def rows_of(shape: tuple[int, ...], group: str | int) -> list[list[int]]:
    """Flat indices of each group, by a loop."""
    entries = math.prod(shape)
    size = {"tensor": entries, "channel": entries // shape[0]}.get(group, group)
    return [list(range(first, min(first + size, entries))) for first in range(0, entries, size)]


# ---------------------------------------------------------------------------------------------------- gradients


def test_straight_through_passes_value_and_gradient_bit_for_bit(same_bits):
    value = torch.tensor([-0.0, 0.1, 1e-40])
    source = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    out = F.straight_through(value, source)
    out.backward(torch.tensor([7.0, -0.25, 3.0]))
    assert same_bits(out, value)
    assert source.grad.tolist() == [7.0, -0.25, 3.0]
    with torch.no_grad():
        assert same_bits(F.straight_through(value, source), value)


def test_straight_through_gives_a_trained_value_its_gradient_too():
    value = torch.tensor([1.0, 2.0], requires_grad=True)
    source = torch.tensor([0.0, 0.0], requires_grad=True)
    F.straight_through(value, source).backward(torch.tensor([3.0, 4.0]))
    assert value.grad.tolist() == source.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize(("dense", "expected"), [(True, [5.0, 7.0, 11.0]), (False, [0.0, 7.0, 0.0])])
def test_masked_gradients(dense: bool, expected: list[float], same_bits):
    core = torch.tensor([-2.0, 3.0, 0.5], requires_grad=True)
    scores = torch.zeros(3, requires_grad=True)
    out = F.masked(core * 1, torch.tensor([False, True, False]), core, scores, dense)
    assert same_bits(out, torch.tensor([0.0, 3.0, 0.0]))
    out.backward(torch.tensor([5.0, 7.0, 11.0]))
    assert core.grad.tolist() == expected
    assert scores.grad.tolist() == [-10.0, 21.0, 5.5]


def test_masked_entries_learn_through_the_core_alone():
    """Levels stand between core and value; what they train must not hear of entries that are not stored."""
    core, value = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    F.masked(value, torch.tensor([False, True]), core).backward(torch.tensor([3.0, 5.0]))
    assert (value.grad.tolist(), core.grad.tolist()) == ([0.0, 5.0], [3.0, 0.0])


def test_masked_zeros_are_positive_even_of_infinities(same_bits):
    out = F.masked(torch.tensor([-1.0, -math.inf, math.nan]), torch.zeros(3, dtype=torch.bool), torch.zeros(3))
    assert same_bits(out, torch.zeros(3))


# ------------------------------------------------------------------------------------------------------- groups


@given(shapes, groups)
def test_split_and_spread_are_the_loops_groups(shape, group):
    rows = rows_of(shape, group)
    core = torch.arange(1.0, math.prod(shape) + 1).reshape(shape)
    count, size = F.group_counts(shape, group)
    assert (count, size) == (len(rows), len(rows[0]))
    parts = F.split(core, group)
    assert parts.tolist() == [[i + 1.0 for i in row] + [0.0] * (size - len(row)) for row in rows]
    whole = F.split(torch.ones(shape, dtype=torch.bool), group)
    assert whole.dtype == torch.bool
    assert whole.sum(1).tolist() == [len(row) for row in rows]
    full = F.spread(torch.arange(float(count)), shape, group).expand(shape).reshape(-1)
    assert [full[i].item() for row in rows for i in row] == [g for g, row in enumerate(rows) for _ in row]


def test_survivor_mean_by_hand():
    values = torch.tensor([[1.0, 2.0, 6.0], [1.0, 2.0, 3.0]])
    keep = torch.tensor([[True, False, True], [False, False, False]])
    assert F.survivor_mean(values, keep).tolist() == [3.5, 0.0]


# ------------------------------------------------------------------------------------------------------- blocks


@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 1), st.integers(1, 8))
def test_block_mean_and_expand_are_the_loop(rows, columns, axis, size):
    matrix = torch.from_numpy(np.random.default_rng(rows * 64 + columns * 8 + size).normal(size=(rows, columns)))
    length = matrix.shape[axis]
    expected = np.zeros((-(-length // size), columns) if axis == 0 else (rows, -(-length // size)))
    for j in range(-(-length // size)):
        part = matrix.numpy().take(range(j * size, min((j + 1) * size, length)), axis)
        expected[(j,) if axis == 0 else (slice(None), j)] = part.mean(axis)
    core = F.block_mean(matrix, axis, size)
    np.testing.assert_allclose(core.numpy(), expected, rtol=1e-12)
    back = F.block_expand(core, axis, size, length)
    assert back.shape == matrix.shape
    for i in range(rows):
        for j in range(columns):
            assert back[i, j] == (core[i // size, j] if axis == 0 else core[i, j // size])


# -------------------------------------------------------------------------------------------------------- masks


@given(st.integers(0, 999), st.integers(1, 1000))
def test_zero_count_is_the_formula_in_exact_arithmetic(thousandths, units):
    threshold = thousandths / 1000
    assert F.zero_count(threshold, units) == min(math.floor(threshold * units + 0.5), units - 1)
    exact = Fraction(thousandths, 1000) * units + Fraction(1, 2)
    assert abs(F.zero_count(threshold, units) - min(exact, units - 1)) < 1 + 1e-9


def test_zero_count_by_hand():
    assert [F.zero_count(t, n) for t, n in ((0.5, 3), (0.25, 2), (0.99, 1), (0.999, 10), (0.1, 4), (0.9, 64))] == [
        2,
        1,
        0,
        9,
        0,
        58,
    ]


@settings(deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 9))
def test_largest_is_the_stable_sort(data, rows, columns):
    small = st.integers(-2, 2).map(float)  # few values: many ties
    draw = st.lists(st.lists(small, min_size=columns, max_size=columns), min_size=rows, max_size=rows)
    scores, tiebreak = data.draw(draw), data.draw(draw)
    zeros = data.draw(st.integers(0, columns - 1))
    keep = F.largest(torch.tensor(scores), torch.tensor(tiebreak), zeros).tolist()
    for kept, score, second in zip(keep, scores, tiebreak, strict=True):
        order = sorted(range(columns), key=lambda i: (score[i], second[i], i))
        assert [i for i in range(columns) if not kept[i]] == sorted(order[:zeros])


# ------------------------------------------------------------------------------------------------------- levels


def lloyd(values: list[float], k: int, iterations: int = 30) -> list[float]:
    """k-means by loops, with the start that the docstring states."""
    ordered = sorted(values)
    low, high, n = ordered[0], ordered[-1], len(ordered)
    steps = [(j + 0.5) / k for j in range(k)]
    centroids = [0.5 * (low + (high - low) * s) + 0.5 * ordered[int(s * n)] for s in steps]
    for _ in range(iterations):
        clusters: list[list[float]] = [[] for _ in range(k)]
        for x in ordered:
            clusters[sum(x > (a + b) / 2 for a, b in itertools.pairwise(centroids))].append(x)
        centroids = sorted(sum(c) / len(c) if c else centroids[j] for j, c in enumerate(clusters))
    return centroids


@settings(max_examples=40, deadline=None, derandomize=True)  # an entry half-way between two centroids may go to either
@example([0.0, 4.38671875, 4.79296875, 6.8984375, 7.4609375, 7.16796875], 2, 0)
@given(st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=24), st.integers(2, 6), st.integers(0, 5))
def test_kmeans_is_lloyds_loop_over_the_kept(values, k, left_out):
    row = torch.tensor([[99.0] * left_out + values])
    keep = torch.arange(row.shape[1])[None] >= left_out
    found = F.kmeans_1d(row, keep, k)
    assert found.shape == (1, k)
    assert (found.diff(dim=1) >= 0).all()
    np.testing.assert_allclose(found[0].numpy(), lloyd(values, k), rtol=1e-5, atol=1e-6)


def test_kmeans_of_nothing_and_of_one_value():
    values = torch.tensor([[3.0, 4.0], [5.0, 5.0]])
    keep = torch.tensor([[False, False], [True, True]])
    assert F.kmeans_1d(values, keep, 3).tolist() == [[0.0] * 3, [5.0] * 3]
