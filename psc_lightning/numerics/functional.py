"""Tensor maths that two or more methods share. Pure functions; no state, no random numbers.

A *core* is the output-first tensor ``(O, …)`` that masks and levels act on. A *group* is the set of its entries that
share one scale (or one count of zeros): ``"tensor"`` all, ``"channel"`` an output row, an integer n: n consecutive
entries in memory order (a shorter last group is allowed).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psc_lightning.numerics.strips import STRIP, survivors

__all__ = [
    "Group",
    "block_expand",
    "block_mean",
    "block_sum",
    "doubled",
    "float32_by_default",
    "group_counts",
    "split",
    "spread",
    "straight_through",
    "survivor_magnitude",
    "zero_count",
]

Group = str | int


# ---------------------------------------------------------------------------------------------------- gradients


class _StraightThrough(torch.autograd.Function):
    """One Function, so that the value is the same with and without grad: ``w + (q - w).detach()`` is not always q."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


def straight_through(value: Tensor, source: Tensor) -> Tensor:
    """`value` in the forward pass; the gradient goes to `source` unchanged (and to `value`, where it wants one).

    Source: Bengio et al. 2013, "Estimating or propagating gradients through stochastic neurons".

    >>> w = torch.tensor([0.3, -0.7], requires_grad=True)
    >>> q = straight_through(w.detach().sign(), w)
    >>> (q * torch.tensor([2.0, 5.0])).sum().backward()
    >>> q.tolist(), w.grad.tolist()
    ([1.0, -1.0], [2.0, 5.0])
    """
    out: Tensor = _StraightThrough.apply(value, source)  # type: ignore[no-untyped-call]  # torch's
    return out


# ----------------------------------------------------------------------------------------------------- products


def doubled(factor: Tensor) -> Tensor:
    """In float64: on the CPU, where the device has no such numbers; differentiable."""
    return factor.double() if factor.device.type in ("cpu", "cuda") else factor.cpu().double()


# ------------------------------------------------------------------------------------------------------- groups


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Sidecars are float32 whatever the default is: Lightning changes it while a bf16-true model is built."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def group_counts(shape: tuple[int, ...], group: Group) -> tuple[int, int]:
    """Number of groups of a core of this shape, and entries in each (the last may be shorter).

    >>> group_counts((4, 3, 3, 3), "channel"), group_counts((4, 3, 3, 3), 50)
    ((4, 27), (3, 50))
    """
    entries = prod(shape)
    if group == "tensor":
        return 1, entries
    if group == "channel":
        return shape[0], entries // max(shape[0], 1)
    size = min(int(group), max(entries, 1))
    return -(-entries // size), size


def give_gradient(sidecar: nn.Parameter, gradient: Tensor) -> None:
    """Set the gradient of what is trained beside a weight, in its type and strides: a fused optimizer takes no others.

    >>> sidecar = nn.Parameter(torch.zeros(2, 3))
    >>> give_gradient(sidecar, torch.ones(3, 2).t())
    >>> sidecar.grad.stride()
    (3, 1)
    """
    found = gradient.detach().to(sidecar.dtype)
    alike = found.stride() == sidecar.stride()
    sidecar.grad = found if alike else torch.empty_like(sidecar, requires_grad=False).copy_(found)


def split(core: Tensor, group: Group) -> Tensor:
    """The core as ``(groups, entries)``; a shorter last group is filled up with zeros (False)."""
    count, size = group_counts(tuple(core.shape), group)
    flat = core.reshape(-1)
    missing = count * size - flat.numel()
    return (F.pad(flat, (0, missing)) if missing else flat).reshape(count, size)


def spread(values: Tensor, shape: tuple[int, ...], group: Group) -> Tensor:
    """One value a group, in a shape that broadcasts over the core; differentiable.

    >>> spread(torch.tensor([1.0, 2.0]), (2, 3), "channel").tolist()
    [[1.0], [2.0]]
    >>> spread(torch.tensor([1.0, 2.0]), (1, 3), 2).tolist()
    [[1.0, 1.0, 2.0]]
    """
    if group == "tensor":
        return values.reshape((1,) * len(shape))
    if group == "channel":
        return values.reshape(-1, *(1,) * (len(shape) - 1))
    _, size = group_counts(shape, group)
    return values[:, None].expand(-1, size).reshape(-1)[: prod(shape)].reshape(shape)


def survivor_magnitude(core: Tensor, keep: Tensor | None, group: Group) -> Tensor:
    """Mean of |x| over the kept entries (None: all) of each group of a core; 0 for a group without any.

    >>> survivor_magnitude(torch.tensor([[1.0, -2.0], [8.0, -6.0]]), None, "channel").tolist()
    [1.5, 7.0]
    """
    count, size = group_counts(tuple(core.shape), group)
    wide = core.dtype if core.element_size() >= 4 else torch.float32
    total, number = (torch.zeros(count, dtype=wide, device=core.device) for _ in range(2))
    for strip in survivors(core, keep, size):
        total[strip.groups].add_(torch.abs(strip.values, out=strip.spare()).sum(1))
        number[strip.groups].add_(strip.number())
    return total / number.clamp_min(1)


# ------------------------------------------------------------------------------------------------------- blocks


def block_mean(matrix: Tensor, axis: int, size: int) -> Tensor:
    """Mean of each block of `size` neighbours along an axis of a matrix; the last block may be shorter.

    The mean of equal numbers is that number, bit for bit: what is tied already stays as it is. Every member of a block
    of n gets g/n.

    >>> block_mean(torch.tensor([[1.0, 3.0, 8.0]]), axis=1, size=2).tolist()
    [[2.0, 8.0]]
    """
    if not (torch.is_grad_enabled() and matrix.requires_grad):
        return _block_mean(matrix, axis, size)
    length = matrix.shape[axis]
    blocks = -(-length // size)
    missing = blocks * size - length
    first = matrix.detach()[:, ::size] if axis == 1 else matrix.detach()[::size]
    below = block_expand(first, axis, size, length) - matrix
    if missing:
        below = F.pad(below, (0, missing) if axis == 1 else (0, 0, 0, missing))
    parts = (len(matrix), blocks, size) if axis == 1 else (blocks, size, matrix.shape[1])
    sums = below.reshape(parts).sum(axis + 1)
    counts = torch.full((blocks,), float(size), dtype=sums.dtype, device=sums.device)
    counts[-1] = size - missing
    return first - sums / (counts if axis == 1 else counts[:, None])


def _block_mean(matrix: Tensor, axis: int, size: int) -> Tensor:
    """The means alone, some rows at a time: a sum over a short last axis is slow, and its terms would all be written down."""
    length = matrix.shape[axis]
    full = length // size
    out = matrix.new_empty((len(matrix), -(-length // size)) if axis == 1 else (-(-length // size), matrix.shape[1]))
    if full < out.shape[axis]:  # the last block is shorter
        last = matrix.narrow(axis, full * size, length - full * size)
        out.narrow(axis, full, 1).copy_(_block_mean(last, axis, length - full * size))
    if not full:
        return out
    means = out.narrow(axis, 0, full)
    parts = matrix.narrow(axis, 0, full * size).unflatten(axis, (full, size))  # type: ignore[no-untyped-call]  # torch's
    rows = max(STRIP // max(parts[0].numel(), 1), 1) if matrix.device.type == "cpu" else len(parts)
    for start in range(0, len(parts), rows):
        torch.mul(*_mean_of(list(parts[start : start + rows].unbind(axis + 1))), out=means[start : start + rows])
    return out


def _mean_of(members: list[Tensor]) -> tuple[Tensor, float]:
    """A tensor and a factor that make the mean: of equal members, exactly that member."""
    size = len(members)
    if size & (size - 1) == 0:  # sums of equal pairs only move the exponent
        while len(members) > 1:
            members = [torch.add(one, other) for one, other in zip(members[::2], members[1::2])]
        return members[0], 1 / size
    first, *others = members
    total = torch.zeros_like(first)
    for other in others:
        total.add_(other).sub_(first)
    return total.div_(size).add_(first), 1.0


def block_sum(matrix: Tensor, axis: int, size: int) -> Tensor:
    """Sum of each block of `size` neighbours along an axis of a matrix; the last block may be shorter.

    >>> block_sum(torch.tensor([[1.0, 3.0, 8.0]]), axis=1, size=2).tolist()
    [[4.0, 8.0]]
    """
    length = matrix.shape[axis]
    blocks = -(-length // size)
    if missing := blocks * size - length:
        matrix = F.pad(matrix, (0, missing) if axis == 1 else (0, 0, 0, missing))
    parts = (len(matrix), blocks, size) if axis == 1 else (blocks, size, matrix.shape[1])
    return matrix.reshape(parts).sum(axis + 1)


def block_expand(core: Tensor, axis: int, size: int, length: int) -> Tensor:
    """Repeat each entry `size` times along an axis, cut to `length`; works on any dtype."""
    shape = [-1, -1, -1]
    shape[axis + 1] = size
    repeated: Tensor = core.unsqueeze(axis + 1).expand(shape).flatten(axis, axis + 1)
    return repeated.narrow(axis, 0, length)


# -------------------------------------------------------------------------------------------------------- masks


def zero_count(threshold: float, units: int) -> int:
    """How many of `units` a threshold sets to zero: ``floor(threshold · units + 0.5)``, at least one survives.

    >>> zero_count(0.5, 5), zero_count(0.9, 4), zero_count(0.0, 7)
    (3, 3, 0)
    """
    return max(0, min(math.floor(threshold * units + 0.5), units - 1))
