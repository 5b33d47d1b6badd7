"""What all levels have in common: hard values by strips are those of code and value, and a second time nothing moves."""

from __future__ import annotations

import math
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from graph import levelled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from psc_lightning.levels import LEVELS, ROOTS, Levels
from psc_lightning.levels.codebook import CodebookLevels
from psc_lightning.levels.uniform import UniformLevels
from psc_lightning.numerics import strips

METHODS: dict[str, Callable[..., Levels]] = {
    "uniform8": LEVELS["uniform"],
    "uniform3": lambda shape, group: LEVELS["uniform"](shape, 3, group),
    "uniform1": lambda shape, group: LEVELS["uniform"](shape, 1, group),
    "learned step": lambda shape, group: LEVELS["uniform"](shape, 4, group, learned_step=True),
    "learned step 1": lambda shape, group: LEVELS["uniform"](shape, 1, group, learned_step=True),
    "sign": LEVELS["binary"],
    "01": lambda shape, group: LEVELS["binary"](shape, group, form="01"),
    "ternary": LEVELS["ternary"],
    "ttq": LEVELS["ttq"],
    "ttq log8": lambda shape, group: LEVELS["ttq"](shape, group, scales="log8"),
    **{f"log root {r}": lambda shape, group, r=r: LEVELS["log"](shape, 4, group, root=r) for r in ROOTS},
    "log8": lambda shape, group: LEVELS["log"](shape, 8, group),
    "codebook": lambda shape, group: LEVELS["codebook"](shape, 5, group),
    "codebook 100": lambda shape, group: LEVELS["codebook"](shape, 100, group),
    "float16": lambda shape, group: LEVELS["float16"](shape),
    "bfloat16": lambda shape, group: LEVELS["bfloat16"](shape),
}

shapes = st.one_of(
    st.tuples(st.integers(1, 9)),
    st.tuples(st.integers(1, 7), st.integers(1, 9)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
)
groups = st.one_of(st.sampled_from(["tensor", "channel"]), st.integers(1, 40))
LAYOUTS = ("contiguous", "channels last", "permuted", "strided")


def make(method: str, shape: tuple[int, ...], group: str | int) -> Levels:
    return METHODS[method](shape, group=group)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers with other strides."""
    if layout == "channels last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "permuted":
        order = list(range(x.dim()))[::-1]
        return x.permute(order).contiguous().permute(order)
    if layout == "strided":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x.contiguous()


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=40, deadline=None)
@given(
    shapes,
    groups,
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(LAYOUTS),
    st.sampled_from([*LAYOUTS, None]),
    st.sampled_from([None, 0.0, 0.5]),
    st.sampled_from([1, 5, 1 << 16]),
    st.integers(0, 99),
)
def test_hard_is_the_value_of_the_code(method, same_bits, shape, group, dtype, layout, target, share, strip, seed):
    torch.manual_seed(seed)
    # few values, so that some lie on edges; small ones, zeros of both signs, and numbers below the normal ones
    x = torch.randn(shape, dtype=dtype) * 10.0 ** torch.randint(-3, 2, shape)
    x = torch.where(torch.rand(shape) < 0.3, torch.randint(-4, 5, shape) / 4 * -1.0, x)
    x = torch.where(torch.rand(shape) < 0.1, torch.randn(shape) * 2e-38, x).to(dtype)
    x = laid_out(x, layout)
    keep = None if share is None else torch.rand(shape) >= share
    levels = make(method, shape, group)
    with patch.object(strips, "STRIP", strip):
        levels.begin(x, keep)
        levels.refresh(x, keep)
        out = None if target is None else laid_out(torch.full(shape, math.nan, dtype=dtype), target)
        found = levels.hard(x, out, keep)
    if out is not None:
        assert found is out
    expected = levels.value(levels.code(x)).to(dtype)
    if keep is not None:
        expected = torch.where(keep, expected, 0.0)
    assert same_bits(torch.empty(shape, dtype=dtype).copy_(found), torch.empty(shape, dtype=dtype).copy_(expected))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=30, deadline=None)
@given(shapes, groups, st.sampled_from([None, 0.0, 0.5]), st.sampled_from([1, 5, 1 << 16]), st.integers(0, 99))
def test_the_tables_do_not_depend_on_how_entries_are_reached(method, shape, group, share, strip, seed):
    torch.manual_seed(seed)
    x, keep = torch.randn(shape), None if share is None else torch.rand(shape) >= share
    tables = []
    for layout, size, kept in (
        ("contiguous", 1 << 16, torch.ones(shape, dtype=torch.bool) if keep is None else keep),
        ("permuted", strip, keep),
    ):
        levels = make(method, shape, group)
        with patch.object(strips, "STRIP", size):
            levels.begin(laid_out(x, layout), kept)
            levels.refresh(laid_out(x, layout), kept)
        tables.append({name: value.float() for name, value in levels.state_dict().items() if name != "codes"})
    for name, value in tables[0].items():
        # a mean's last bits depend on the order of its terms, and what it is rounded to may be the next half precision
        torch.testing.assert_close(tables[1][name], value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=40, deadline=None)
@given(shapes, groups, st.sampled_from([None, 0.5]), st.integers(0, 99))
def test_a_second_time_nothing_moves(method, same_bits, shape, group, share, seed):
    torch.manual_seed(seed)
    x, keep = torch.randn(shape) * 0.05, None if share is None else torch.rand(shape) >= share
    first = make(method, shape, group)
    first.begin(x, keep)
    first.refresh(x, keep)
    hard = first.hard(x, keep=keep)
    second = make(method, shape, group)
    second.begin(hard, keep)
    second.refresh(hard, keep)
    assert same_bits(second.hard(hard, keep=keep), hard)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_twice_for_a_trained_weight(method, same_bits):
    """A Parameter with a gradient is neither changed nor made part of a graph."""
    weight = torch.nn.Parameter(torch.randn(300, 7))
    before = weight.detach().clone()
    found = []
    for _ in range(2):
        levels = make(method, (300, 7), "tensor")
        levels.begin(weight)
        levels.refresh(weight)
        found.append(levels.hard(weight))
    assert not found[0].requires_grad
    assert same_bits(*found)
    assert same_bits(weight.detach(), before)


def test_half_precision_cores_come_back_as_such():
    x = torch.randn(3, 5).bfloat16()
    levels = UniformLevels((3, 5))
    levels.refresh(x)
    assert levels.hard(x).dtype == torch.bfloat16


def test_nothing_is_no_trouble():
    x = torch.zeros(0, 3)
    for method in ("uniform8", "ternary", "01"):
        levels = make(method, (0, 3), "channel")
        levels.refresh(x)
        assert levels.hard(x).shape == (0, 3)


def test_straight():
    straight = {name for name in METHODS if make(name, (2, 3), "tensor").straight}
    assert set(METHODS) - straight == {"learned step", "learned step 1", "codebook", "codebook 100", "ttq", "ttq log8"}
    for name in straight:
        assert not list(make(name, (2, 3), "tensor").parameters())


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=40, deadline=None)
@given(
    shapes,
    groups,
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(LAYOUTS),
    st.sampled_from(LAYOUTS),
    st.sampled_from([None, 0.0, 0.5, 1.0]),
    st.sampled_from([1.0, 0.25]),
    st.integers(0, 99),
)
def test_gradients_are_those_that_autograd_finds(
    method, same_bits, shape, group, dtype, layout, other, share, strength, seed
):
    """The core's, and those of what is trained, which hears of the kept entries alone; what came in stays as it is."""
    torch.manual_seed(seed)
    x, keep = torch.randn(shape, dtype=dtype), None if share is None else torch.rand(shape) >= share
    gradient = torch.randn(shape, dtype=dtype)
    levels = make(method, shape, group)
    levels.begin(x, keep)
    with torch.no_grad():
        for trained in levels.parameters():  # so that some entries lie beyond the last level
            trained.mul_(1 - torch.rand(trained.shape) / 2)
    levels.refresh(x, keep)
    leaf = x.clone().requires_grad_()
    value = levelled(levels, leaf)
    value = value + (1 - strength) * (leaf - value)
    (value if keep is None else torch.where(keep, value, leaf)).backward(gradient)
    wanted = [leaf.grad, *(trained.grad for trained in levels.parameters())]
    given_ = laid_out(gradient, other)
    found = levels.pull(laid_out(x, layout), given_, keep, strength)
    assert torch.equal(given_, gradient)
    assert found.dtype == dtype
    if strength == 1 or levels.straight:
        assert torch.equal(found, wanted[0] if strength == 1 else gradient)
    for one, expected in zip([found, *(trained.grad for trained in levels.parameters())], wanted, strict=True):
        assert one.dtype == expected.dtype
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-5)


def test_a_gradient_of_a_step_by_hand_of_the_kept_and_of_half_the_strength():
    levels = UniformLevels((1, 4), bits=2, learned_step=True, group="tensor")  # -s, 0, s
    x, gradient = torch.tensor([[0.25, 3.0, -2.0, -5.0]]), torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    keep = torch.tensor([[True, True, True, False]])
    # ∂s = 1·(0 - 0.25) + 2·1 + 4·(-1); 3 and -2 lie outside, -5 is not kept
    assert levels.pull(x, gradient, keep).tolist() == [[1.0, 0.0, 0.0, 8.0]]
    assert levels.step.grad.tolist() == [-2.25]
    assert levels.pull(x, gradient, keep, strength=0.5).tolist() == [[1.0, 1.0, 2.0, 8.0]]
    assert levels.step.grad.tolist() == [-1.125]


def test_a_gradient_of_each_centroid_by_hand():
    levels = CodebookLevels((2, 3), k=2, group="channel")
    x = torch.tensor([[0.0, 1.0, 1.0], [5.0, 5.0, 7.0]])
    levels.begin(x)
    levels.refresh(x)
    gradient = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, math.inf]])
    keep = torch.tensor([[True, True, False], [True, True, False]])
    assert levels.centroid_gradient(gradient, keep).tolist() == [[1.0, 2.0], [24.0, 0.0]]


@settings(max_examples=40, deadline=None)
@given(shapes, groups, st.sampled_from(LAYOUTS), st.booleans(), st.sampled_from([1, 5, 1 << 16]), st.integers(0, 99))
def test_a_gradient_of_each_centroid_is_what_autograd_finds(shape, group, layout, masked, strip, seed):
    torch.manual_seed(seed)
    x, keep = torch.randn(shape), torch.rand(shape) > 0.4 if masked else None
    gradient = torch.randn(shape)
    levels = CodebookLevels(shape, k=3, group=group)
    levels.begin(x, keep)
    levels.refresh(x, keep)
    levelled(levels, x).backward(gradient if keep is None else gradient * keep)
    with patch.object(strips, "STRIP", strip):
        found = levels.centroid_gradient(laid_out(gradient, layout), keep)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, levels.centroids.grad, rtol=1e-5, atol=1e-5)
