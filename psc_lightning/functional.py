"""Tensor maths that two or more methods share. Pure functions; no state, no random numbers.

A *core* is the output-first tensor ``(O, …)`` that masks and levels act on. A *group* is the set of its entries that
share one scale (or one count of zeros): ``"tensor"`` all, ``"channel"`` an output row, an integer n: n consecutive
entries in memory order (a shorter last group is allowed).
"""

from __future__ import annotations

import math
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Group",
    "block_expand",
    "block_mean",
    "group_counts",
    "kmeans_1d",
    "largest",
    "masked",
    "split",
    "spread",
    "straight_through",
    "survivor_mean",
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


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, keep: Tensor, core: Tensor, scores: Tensor | None, dense: bool) -> Tensor:
        ctx.dense, ctx.learned = dense, scores is not None
        ctx.save_for_backward(keep, core) if ctx.learned else ctx.save_for_backward(keep)
        return torch.where(keep, value, 0.0)  # a product would leave -0.0

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, Tensor | None, Tensor | None, None]:
        keep, *rest = ctx.saved_tensors
        (grad,) = grads
        hidden = torch.where(keep, 0.0, grad) if ctx.dense else None
        return torch.where(keep, grad, 0.0), None, hidden, grad * rest[0] if rest else None, None


def masked(value: Tensor, keep: Tensor, core: Tensor, scores: Tensor | None = None, dense: bool = True) -> Tensor:
    """`value` where `keep`, else +0.0.

    Pseudo-gradient: ∂/∂value = g·keep, so that levels learn their steps and centroids from the survivors alone;
    ∂/∂core = g·(1 - keep) (`dense`: masked entries go on learning and may return) or 0;
    ∂/∂scores = g·core (straight through the mask: the mask entry m multiplies the core entry).

    >>> w = torch.tensor([-2.0, 3.0], requires_grad=True)
    >>> s = torch.zeros(2, requires_grad=True)
    >>> masked(w, torch.tensor([False, True]), w, s, dense=False).sum().backward()
    >>> w.grad.tolist(), s.grad.tolist()
    ([0.0, 1.0], [-2.0, 3.0])
    """
    out: Tensor = _Masked.apply(value, keep, core, scores, dense)  # type: ignore[no-untyped-call]  # torch's
    return out


# ------------------------------------------------------------------------------------------------------- groups


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


def survivor_mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean over the kept entries of each group; 0 for a group without any."""
    return torch.where(keep, values, 0.0).sum(1) / keep.sum(1).clamp_min(1)


# ------------------------------------------------------------------------------------------------------- blocks


def block_mean(matrix: Tensor, axis: int, size: int) -> Tensor:
    """Mean of each block of `size` neighbours along an axis of a matrix; the last block may be shorter.

    >>> block_mean(torch.tensor([[1.0, 3.0, 8.0]]), axis=1, size=2).tolist()
    [[2.0, 8.0]]
    """
    length = matrix.shape[axis]
    blocks = -(-length // size)
    missing = blocks * size - length
    if missing:
        matrix = F.pad(matrix, (0, missing) if axis == 1 else (0, 0, 0, missing))
    parts = (len(matrix), blocks, size) if axis == 1 else (blocks, size, matrix.shape[1])
    sums = matrix.reshape(parts).sum(axis + 1)
    counts = torch.full((blocks,), float(size), dtype=sums.dtype, device=sums.device)
    counts[-1] = size - missing
    return sums / (counts if axis == 1 else counts[:, None])


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


def largest(scores: Tensor, tiebreak: Tensor, zeros: int) -> Tensor:
    """Keep all but the `zeros` smallest entries of each row, in the order (score, tiebreak, index).

    Selection first, sorting only in rows where the cut runs through equal scores: a full sort is ten times dearer.

    >>> largest(torch.tensor([[0.0, 0.0, 0.0, 5.0]]), torch.tensor([[3.0, 1.0, 1.0, 0.0]]), 2).tolist()
    [[True, False, False, True]]
    """
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    cut = scores.kthvalue(zeros, dim=1, keepdim=True).values
    drop = scores <= cut
    for row in (drop.sum(1) != zeros).nonzero().flatten().tolist():
        below = scores[row] < cut[row]
        tied = (scores[row] == cut[row]).nonzero().flatten()
        chosen = tied[tiebreak[row][tied].argsort(stable=True)[: zeros - int(below.sum())]]
        drop[row] = below.index_fill(0, chosen, True)
    return ~drop


# ------------------------------------------------------------------------------------------------------- levels


def kmeans_1d(values: Tensor, keep: Tensor, k: int, iterations: int = 30) -> Tensor:
    """Centroids of k-means on a line, for each row of `values` over its kept entries, sorted: ``(rows, k)`` float32.

    Lloyd's iteration on sorted data: a cluster is an interval, its mean a difference of prefix sums, so an iteration
    costs k searches, not n distances. It starts half-way between evenly spaced values (which keep the few large
    weights apart) and quantiles (which follow the many small ones); a cluster that runs empty stays where it is.

    Source: Lloyd 1982; Han et al. 2016, "Deep Compression", §3 (linear start).

    >>> kmeans_1d(torch.tensor([[0.0, 0.1, 0.9, 1.0, 77.0]]), torch.tensor([[True] * 4 + [False]]), 2)
    tensor([[0.0500, 0.9500]])
    """
    # Entries that are left out sort to the end, where no interval reaches.
    ordered = torch.where(keep, values.double(), math.inf).sort(1).values
    count = keep.sum(1, keepdim=True)
    finite = torch.where(ordered.isinf(), 0.0, ordered)
    sums = F.pad(finite.cumsum(1), (1, 0))
    low = finite[:, :1]
    high = finite.gather(1, (count - 1).clamp_min(0))
    steps = (torch.arange(k, dtype=torch.float64, device=values.device) + 0.5) / k
    quantiles = finite.gather(1, (steps * count).long().clamp_max(values.shape[1] - 1))
    centroids = 0.5 * (low + (high - low) * steps) + 0.5 * quantiles
    for _ in range(iterations):
        middles = (centroids[:, 1:] + centroids[:, :-1]) / 2
        edges = F.pad(torch.searchsorted(ordered, middles, right=True), (1, 0))
        edges = torch.cat((edges, count), 1)
        inside = edges.diff(dim=1)
        means = sums.gather(1, edges).diff(dim=1) / inside.clamp_min(1)
        moved = torch.where(inside > 0, means, centroids).sort(1).values
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids.float()
