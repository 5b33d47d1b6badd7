from __future__ import annotations

import itertools
import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psc_lightning.numerics import strips as module
from psc_lightning.numerics.strips import blank_, strips, survivors

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@settings(deadline=None, max_examples=200)
@given(shapes, st.sampled_from(["entries", "columns", 1, 2, 7]), st.integers(1, 40), st.booleans(), st.booleans())
def test_every_entry_once_with_its_group(shape, size, strip, turned, out_turned):
    entries = math.prod(shape)
    size = {"entries": entries, "columns": entries // shape[0]}.get(size, size)
    order = list(range(len(shape)))[::-1]
    core = torch.arange(entries).reshape(shape).float()
    keep = torch.arange(entries).reshape(shape) % 3 > 0
    out, plain = torch.full(shape, -1, dtype=torch.int64), torch.full(shape, math.nan)
    if turned:
        core = core.permute(order).contiguous().permute(order)
    if out_turned:
        out = out.permute(order).contiguous().permute(order)
    with patch.object(module, "STRIP", strip):
        for groups, values, kept, (place, other) in strips(core, size, keep, out, plain):
            assert values.shape == kept.shape == place.shape == other.shape
            assert len(values) == len(range(*groups.indices(10**6)))
            assert torch.equal(kept, values % 3 > 0)
            place.copy_(torch.arange(groups.start, groups.stop)[:, None].expand(values.shape))
            other.copy_(values)
    assert torch.equal(plain, core)
    assert torch.equal(out, torch.arange(entries).reshape(shape) // size)


def test_a_strip_has_as_many_groups_as_it_has_room_for():
    with patch.object(module, "STRIP", 7):
        assert [(s.groups, tuple(s.values.shape)) for s in strips(torch.zeros(5, 3), 3)] == [
            (slice(0, 2), (2, 3)),
            (slice(2, 4), (2, 3)),
            (slice(4, 5), (1, 3)),
        ]
        assert [(s.groups, tuple(s.values.shape)) for s in strips(torch.zeros(19), 9)] == [
            (slice(0, 1), (1, 7)),
            (slice(0, 1), (1, 2)),
            (slice(1, 2), (1, 7)),
            (slice(1, 2), (1, 2)),
            (slice(2, 3), (1, 1)),
        ]


def test_nothing_has_no_strips():
    assert not list(strips(torch.zeros(0, 3), 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("turned", [False, True])
def test_blank_zeros_are_positive_whatever_was_there(dtype: torch.dtype, turned: bool, same_bits):
    values = torch.tensor([[-1.0, math.nan, -0.0], [math.inf, -2.5, 7.0]], dtype=dtype)
    keep = torch.tensor([[False, False, True], [False, True, True]])
    if turned:
        values = values.t().contiguous().t()
    expected = torch.tensor([[0.0, 0.0, -0.0], [0.0, -2.5, 7.0]], dtype=dtype)
    assert blank_(values, keep) is values
    assert same_bits(values.contiguous(), expected)
    assert blank_(values, None) is values


@pytest.mark.parametrize("turned", list(itertools.product([False, True], repeat=3)))
def test_blanked_elsewhere_the_values_stay(turned: tuple[bool, ...], same_bits):
    """However values, marks and target lie."""
    values = torch.tensor([[-1.0, math.nan, -0.0], [math.inf, -2.5, 7.0]])
    keep = torch.tensor([[False, False, True], [False, True, True]])
    out, before = torch.full((2, 3), math.nan), values.clone()
    values, keep, out = (x.t().contiguous().t() if turn else x for x, turn in zip((values, keep, out), turned))
    assert blank_(values, keep, out) is out
    assert same_bits(out, torch.tensor([[0.0, 0.0, -0.0], [0.0, -2.5, 7.0]]))
    assert same_bits(values, before)
    assert blank_(values, None, out) is out
    assert same_bits(out, before)


def test_survivors_come_at_once_where_they_can():
    core = torch.arange(12.0).reshape(4, 3)
    with patch.object(module, "STRIP", 3):
        assert [part.values.shape for part in survivors(core, None, 3, at_once=True)] == [(4, 3)]
        assert len(list(survivors(core, None, 3))) == 4
        assert len(list(survivors(core, core > 5, 3, at_once=True))) == 4  # zeros would have to be written
        assert len(list(survivors(core, None, 5, at_once=True))) > 1  # the last group is shorter


@settings(deadline=None)
@given(shapes, st.integers(1, 9), st.integers(1, 20), st.booleans(), st.booleans(), st.integers(0, 99))
def test_survivors_sum_to_the_sum_over_the_kept(shape, size, strip, masked, at_once, seed):
    torch.manual_seed(seed)
    core, keep = torch.randint(-9, 9, shape).float(), torch.rand(shape) > 0.5 if masked else None
    total, number = torch.zeros(len(core.reshape(-1).split(size))), torch.zeros(len(core.reshape(-1).split(size)))
    with patch.object(module, "STRIP", strip):
        for part in survivors(core, keep, size, at_once):
            for spare in (part.spare(), part.spare(1)):
                assert spare.shape == part.values.shape
                spare.fill_(math.nan)
            assert part.spare().data_ptr() != part.spare(1).data_ptr()
            total[part.groups] += part.values.sum(1)
            number[part.groups] += part.number()
    marks = torch.ones(shape) if keep is None else keep.float()
    assert total.tolist() == [float(part.sum()) for part in (core * marks).reshape(-1).split(size)]
    assert number.tolist() == [float(part.sum()) for part in marks.reshape(-1).split(size)]
