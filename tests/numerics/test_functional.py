from __future__ import annotations

import math
from fractions import Fraction
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psc_lightning.levels.base import largest
from psc_lightning.numerics import functional as F
from psc_lightning.numerics import strips
from psc_lightning.numerics.strips import survivors

shapes = st.lists(st.integers(1, 5), min_size=2, max_size=4).map(tuple)
seeds = st.integers(0, 99)
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


@settings(deadline=None)
@given(shapes, groups, st.sampled_from([None, 0.0, 0.5, 1.0]), st.sampled_from([1, 4, 1 << 16]), st.booleans(), seeds)
def test_magnitudes_of_the_survivors_are_the_loop(shape, group, share, strip, at_once, seed):
    random = np.random.default_rng(seed)
    count, size = F.group_counts(shape, group)
    top = torch.zeros(count, dtype=torch.float64)
    core = random.normal(size=shape)
    keep = random.random(shape) >= (share or 0.0)
    kept = None if share is None else torch.from_numpy(keep)
    with patch.object(strips, "STRIP", strip):
        mean = F.survivor_magnitude(torch.from_numpy(core), kept, group)
        for part in survivors(torch.from_numpy(core), kept, size, at_once):
            top[part.groups] = torch.maximum(top[part.groups], largest(part))
    parts = [np.abs(core.reshape(-1)[row])[keep.reshape(-1)[row]] for row in rows_of(shape, group)]
    np.testing.assert_allclose(mean.numpy(), [part.mean() if len(part) else 0.0 for part in parts], rtol=1e-12)
    assert top.tolist() == [part.max(initial=0.0) for part in parts]


def test_survivors_of_half_precision_are_summed_in_single():
    core = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    core[0, 0] = 2.0
    assert F.survivor_magnitude(core, None, "tensor").tolist() == [4097 / 4096]


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


@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 9)), axis=st.integers(0, 1), size=st.integers(1, 10), seed=seeds
)
def test_equal_members_have_themselves_as_their_mean_and_share_the_gradient(shape, axis, size, seed, same_bits):
    rows, columns = shape
    torch.manual_seed(seed)
    shape = (-(-rows // size), columns) if axis == 0 else (rows, -(-columns // size))
    core = torch.where(torch.rand(shape) < 0.2, -0.0, torch.randn(shape))
    tied = F.block_expand(core, axis, size, (rows, columns)[axis]).clone().requires_grad_()
    mean = F.block_mean(tied, axis, size)
    assert same_bits(mean, core)
    gradient = torch.randn(shape)
    mean.backward(gradient)
    length = (rows, columns)[axis]
    members = torch.tensor([float(min(size, length - first)) for first in range(0, length, size)])
    each = gradient / (members[:, None] if axis == 0 else members)
    assert torch.equal(tied.grad, F.block_expand(each, axis, size, length))  # g/n, the first member as the others


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
