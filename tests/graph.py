"""The hard weight as one graph of all that makes it, for autograd: what each `pull` is held to.

It is put together from the gradients that the methods' own texts promise, and knows nothing of how `pull` finds them: of
the slots it uses what they make (cores, codes, levels, which entries are kept), never a gradient of theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from psc_lightning.levels import Levels
from psc_lightning.levels.codebook import CodebookLevels
from psc_lightning.levels.ttq import TrainedTernaryLevels
from psc_lightning.levels.uniform import UniformLevels
from psc_lightning.masks import Mask
from psc_lightning.numerics.functional import spread
from psc_lightning.slots.chain import Chain, Strengths
from psc_lightning.slots.slots import Slots

__all__ = ["chained", "levelled", "masked", "straight", "through_all"]


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


def straight(value: Tensor, source: Tensor) -> Tensor:
    """A value, bit for bit, whose gradient goes to what it was rounded from (and to itself, where it wants one)."""
    out: Tensor = _Straight.apply(value, source)
    return out


def levelled(levels: Levels, core: Tensor) -> Tensor:
    """The levels of a core, with gradients to it and to what they train."""
    with torch.no_grad():
        code = levels.code(core)
        hard = levels.value(code).to(core.dtype)
    if isinstance(levels, CodebookLevels):
        table = straight(levels._table(), levels.centroids)
        entries = torch.arange(core.numel()).reshape(core.shape)
        at = entries // levels.size * levels.k + code
        return straight(table.flatten().index_select(0, at.flatten()).reshape(core.shape).to(core.dtype), core)
    if isinstance(levels, TrainedTernaryLevels):
        sizes = straight(levels._rounded(), levels.sizes)
        n, p = (spread(side, levels.shape, levels.group) for side in sizes.unbind(1))
        return straight(torch.where(code > 0, p, torch.where(code < 0, -n, 0.0)).to(core.dtype), core)
    if isinstance(levels, UniformLevels) and levels.learned_step:
        (scale,) = levels._tables()
        step = spread(straight(scale, levels.step), levels.shape, levels.group)
        # x = (what it is rounded to, less what is rounded off) · s: that share of a step stays, and x or s moves.
        ratio = (core / step).detach()
        inside = ratio.abs() <= levels.top
        moved = torch.where(inside, core, 0.0) + torch.where(inside, code - ratio, code) * step
        return straight(hard, moved)
    assert not list(levels.parameters()), f"{type(levels).__name__} trains something: say here what gradient it gets"
    return straight(hard, core)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, core: Tensor, scores: Tensor | None, keep: Tensor, dense: bool) -> Tensor:
        ctx.dense, ctx.learned = dense, scores is not None
        ctx.save_for_backward(keep, core)
        return torch.where(keep, value, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        (grad,), (keep, core) = grads, ctx.saved_tensors
        hidden = torch.where(keep, 0.0, grad) if ctx.dense else None
        return torch.where(keep, grad, 0.0), hidden, grad * core if ctx.learned else None, None, None


def masked(mask: Mask, value: Tensor, core: Tensor) -> Tensor:
    """A core's value where the mask keeps, else zero.

    Levels in between hear of what is kept alone; the rest goes on learning by the core itself, where the method says so.
    A score multiplies its core's entries, as the mask that it is straight through does.
    """
    scores = mask.learned_scores()
    if scores is not None:
        scores = mask.units.expand(scores)
    out: Tensor = _Masked.apply(value, core, scores, mask.keep, mask.straight)
    return out


def chained(chain: Chain, core: Tensor, at: Strengths) -> Tensor:
    """What becomes of a core; soft levels let through what they lack in strength."""
    value = core
    if chain.levels is not None and at.levels:
        value = levelled(chain.levels, core)
        if at.levels < 1:
            value = value + (1 - at.levels) * (core - value)
    return value if chain.mask is None or not at.mask else masked(chain.mask, value, core)


def through_all(slots: Slots, latent: Tensor) -> Tensor:
    """The hard weight as a graph of everything that makes it, nothing left out."""
    with torch.no_grad():
        exact = slots.reduce(latent.detach())  # a graph may sum in another order
    cores = {
        name: core if isinstance(core, nn.Parameter) else straight(exact[name], core)
        for name, core in slots.reduce(latent).items()
    }
    made = {name: chained(slots.chain(name), core, slots.strengths) for name, core in cores.items()}
    return slots._expand(made, latent)
