"""Counts, granularities and groups: what every mask has in common, by loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from graph import masked
from hypothesis import given, settings
from hypothesis import strategies as st

from psc_lightning.masks import GRANULARITIES, MASKS, read_keep
from psc_lightning.masks.magnitude import MagnitudeMask


def units_of(shape: tuple[int, ...], granularity: str, block: int) -> list[list[int]]:
    """Flat indices of each unit, in the order of the matrix of units."""
    rows, columns = shape[0], math.prod(shape[1:])
    at = np.arange(rows * columns).reshape(rows, columns)
    if granularity == "element":
        return [[i] for i in range(rows * columns)]
    if granularity == "channel":
        return at.tolist()
    if granularity == "row":
        return [at[o, c : c + block].tolist() for o in range(rows) for c in range(0, columns, block)]
    return [at[o : o + block, c].tolist() for o in range(0, rows, block) for c in range(columns)]


def units_in_a_channel(shape: tuple[int, ...], granularity: str, block: int) -> int:
    columns = math.prod(shape[1:])
    return {"element": columns, "row": -(-columns // block), "column": columns, "channel": 1}[granularity]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple),
    st.sampled_from(GRANULARITIES),
    st.one_of(st.sampled_from(["tensor", "channel"]), st.integers(1, 20)),
    st.integers(1, 5),
    st.integers(0, 99),
    st.integers(0, 99),
)
def test_the_smallest_units_of_each_group_are_zero_and_their_number_is_exact(
    shape, granularity, group, block, percent, seed
):
    core = torch.from_numpy(np.random.default_rng(seed).integers(-3, 4, size=shape).astype(np.float32))
    mask = MagnitudeMask(shape, threshold=percent / 100, granularity=granularity, group=group, block=block)
    mask.refresh(core)
    block = mask.units.block
    flat, keep = core.reshape(-1).double().abs(), mask.keep.reshape(-1)
    units = units_of(shape, granularity, block)
    size = {"tensor": len(units), "channel": units_in_a_channel(shape, granularity, block)}.get(group, group)
    for first in range(0, len(units), size):
        part = units[first : first + size]
        zeros = min(math.floor(percent / 100 * len(part) + 0.5), len(part) - 1)
        means = [float(flat[unit].mean()) for unit in part]
        dropped = [not bool(keep[unit].any()) for unit in part]
        assert all(bool(keep[unit].all()) != gone for unit, gone in zip(part, dropped, strict=True))
        assert sum(dropped) == zeros
        order = sorted(range(len(part)), key=lambda i: (round(means[i], 5), i))
        assert [i for i, gone in enumerate(dropped) if gone] == sorted(order[:zeros])


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("block", [None, 1, 3, 99])
def test_stored_as_one_bit_a_unit(granularity: str, block: int | None, tape):
    for shape in ((5, 2, 3, 3), (4, 7), (1, 1), (3, 1, 1)):
        mask = MagnitudeMask(shape, threshold=0.4, granularity=granularity, block=block)
        mask.refresh(torch.randn(shape))
        written = tape()
        mask.units.encode(written, mask.keep)
        bits, size = written.items[-1]
        assert (len(bits), size) == (math.prod(mask.units.shape), 2)
        assert torch.equal(read_keep(written, shape), mask.keep)
        assert written.finished


@pytest.mark.parametrize(
    ("shape", "granularity", "block", "expected"),
    [
        ((8, 4, 3, 5), "row", None, 5),  # the kernel's width
        ((8, 4, 1, 1), "row", None, 4),
        ((8, 20), "row", None, 4),
        ((8, 4, 3, 5), "column", None, 4),
        ((2, 9), "column", None, 2),
        ((8, 9), "row", 99, 9),
    ],
)
def test_block_length(shape: tuple[int, ...], granularity: str, block: int | None, expected: int):
    assert MagnitudeMask(shape, granularity=granularity, block=block).units.block == expected


def test_strength_scales_the_share():
    mask, core = MagnitudeMask((1, 10), threshold=0.8), torch.arange(1.0, 11.0)[None]
    for strength, zeros in ((0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)):
        mask.refresh(core, strength)
        assert int((~mask.keep).sum()) == zeros


@pytest.mark.parametrize("method", MASKS)
def test_a_mask_that_keeps_all_leaves_core_and_gradient_alone(method: str, same_bits):
    mask, core = MASKS[method]((2, 3), threshold=0.0), torch.tensor([[-0.0, math.inf, 1.0], [-2.0, 3.0, 1e-40]])
    gradient = torch.tensor([[-0.0, 1.0, math.inf], [-2.0, 3.0, 1e-40]])
    mask.refresh(core)
    assert same_bits(mask.hard(core), core)
    assert same_bits(mask.pull(core, gradient.clone()), gradient)


def test_a_mask_follows_a_checkpoint():
    mask = MagnitudeMask((1, 4), threshold=0.5)
    mask.refresh(torch.arange(4.0)[None])
    other = MagnitudeMask((1, 4), threshold=0.5)
    other.load_state_dict(mask.state_dict())
    assert other.hard(torch.ones(1, 4)).tolist() == [[0.0, 0.0, 1.0, 1.0]]


@pytest.mark.parametrize("method", MASKS)
def test_hard_is_the_core_with_positive_zeros(method: str, same_bits):
    mask, core = MASKS[method]((3, 2, 2, 2), threshold=0.5), -torch.rand(3, 2, 2, 2)
    mask.refresh(core)
    expected = torch.where(mask.keep, core, 0.0)
    assert same_bits(mask.hard(core), expected)
    last = core.contiguous(memory_format=torch.channels_last)
    out = torch.full_like(last, math.nan)
    assert mask.hard(last, out) is out
    assert same_bits(out.contiguous(), expected)


@pytest.mark.parametrize("method", MASKS)
def test_zeros_are_positive_even_of_infinities(method: str, same_bits):
    """In the core, and in a gradient that it does not get."""
    mask, core = MASKS[method]((1, 4), threshold=0.75), torch.tensor([[-1.0, -2.0, -0.0, 5.0]])
    mask.refresh(core)
    odd = torch.tensor([[-math.inf, math.nan, -1.0, -7.0]])
    assert same_bits(mask.hard(odd), torch.tensor([[0.0, 0.0, 0.0, -7.0]]))
    if not mask.straight:
        assert same_bits(mask.pull(core, odd.clone()), torch.tensor([[0.0, 0.0, 0.0, -7.0]]))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", MASKS)
def test_gradients_are_those_that_autograd_finds(method: str, granularity: str, same_bits):
    mask = MASKS[method]((4, 3, 2, 2), threshold=0.5, granularity=granularity, block=3)
    core = torch.randn(4, 3, 2, 2, requires_grad=True)
    mask.refresh(core)
    gradient = torch.randn(core.shape)
    masked(mask, core, core).backward(gradient)
    scores = mask.learned_scores()
    wanted = None if scores is None else scores.grad
    assert same_bits(mask.pull(core.detach(), gradient), core.grad)
    if scores is not None:
        torch.testing.assert_close(scores.grad, wanted)


def test_straight():
    assert [name for name, method in MASKS.items() if method((2, 3)).straight] == ["magnitude"]


@pytest.mark.parametrize("method", MASKS)
def test_how_the_core_lies_in_memory_does_not_matter(method: str):
    """Nor that the mask's own buffer lies as a network in channels-last has it."""
    core = torch.randint(-2, 3, (4, 3, 2, 2)).float()
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        mask = MASKS[method]((4, 3, 2, 2), threshold=0.4).to(memory_format=layout)
        mask.refresh(core.contiguous(memory_format=layout))
        found.append(mask.keep)
    assert torch.equal(*found)


def test_movement_scores_that_are_equal_fall_back_to_the_weight():
    mask = MASKS["movement"]((200, 100), threshold=0.6)
    core = torch.randn(200, 100)
    with torch.no_grad():
        mask.scores[:, :10] = torch.randn(200, 10)  # no row is without an opinion
    mask.refresh(core)
    order = np.lexsort((np.arange(20_000), core.abs().reshape(-1), mask.scores.detach().reshape(-1)))
    assert (~mask.keep).reshape(-1).nonzero().flatten().tolist() == sorted(order[:12_000].tolist())
