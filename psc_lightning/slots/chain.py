"""Mask and levels of one core: the last two slots, as pure maths over what they have learned."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from psc_lightning.levels import Levels
from psc_lightning.masks import Mask
from psc_lightning.masks.units import Units
from psc_lightning.numerics.asking import Question
from psc_lightning.numerics.bits import write_bits
from psc_lightning.numerics.strips import blank_
from psc_lightning.symbols import Writer

__all__ = ["Chain", "Strengths"]


class Strengths(NamedTuple):
    """How hard mask and levels act, 0 (absent) … 1."""

    mask: float
    levels: float


class Chain(nn.Module):
    """Mask and levels of one core; either may be missing, and is then as if its strength were 0.

    Args:
        mask: the mask.
        levels: the levels.
        padding: a row that no level may make other than zero, where the core has zeros there.
    """

    mask: Mask | None
    levels: Levels | None

    def __init__(self, mask: Mask | None, levels: Levels | None, padding: int | None = None) -> None:
        super().__init__()
        self.mask, self.levels, self.padding = mask, levels, padding

    def _acting(self, at: Strengths) -> tuple[Mask | None, Levels | None]:
        return self.mask if at.mask else None, self.levels if at.levels else None

    def keep(self, at: Strengths) -> Tensor | None:
        """Which entries survive; None: all."""
        mask, _ = self._acting(at)
        return mask.keep if mask is not None and mask.threshold > 0 else None

    def hold_zeros(self, core: Tensor) -> float:
        """Let the mask keep the units that are zero already; the strength at which its share is theirs."""
        return 0.0 if self.mask is None else self.mask.hold_zeros(core)

    def survivors(self, core: Tensor, at: Strengths) -> Tensor | None:
        """`keep` without the padding row, if that is zero."""
        keep = self.keep(at)
        if self.padding is None:
            return keep
        filled = core[self.padding].any()
        if core.device.type == "cpu" and filled:  # a device would have to say
            return keep
        keep = torch.ones_like(core, dtype=torch.bool) if keep is None else keep.clone()
        keep[self.padding].logical_and_(filled)
        return keep

    def refreshing(self, core: Tensor, at: Strengths, begin: bool, due: tuple[bool, bool]) -> Question[None]:
        """Choose the survivors, then scales and tables over them.

        Args:
            core: what they act on.
            at: the strengths; a mask's scales its share.
            begin: whether the levels start now.
            due: which of the two are recomputed.
        """
        mask, levels = self._acting(at)
        if mask is not None and due[0]:
            yield from mask.refreshing(core, at.mask)
        if levels is not None and due[1]:
            keep = self.survivors(core, at)
            if begin:
                levels.begin(core, keep)
            yield from levels.refreshing(core, keep)

    @torch.no_grad()
    def value(self, core: Tensor, dtype: torch.dtype, at: Strengths, out: Tensor | None = None) -> Tensor:
        """What becomes of a core, in a new tensor (the core itself, where nothing acts) or in `out`.

        Args:
            core: float32 or float64.
            dtype: the Parameter's, in which unquantised cores are stored.
            at: the strengths; levels blend ``hard + (1 - strength)·(core - hard)``, zeros are always exact.
            out: where to write it.
        """
        mask, levels = self._acting(at)
        keep = self.keep(at)
        if levels is not None:
            soft = at.levels < 1
            value = levels.hard(core, out, None if soft else keep)
            if soft:
                value = blank_(value.add_((1 - at.levels) * (core - value)), keep)
            if self.padding is not None:  # found without a question that a device would have to answer
                value[self.padding].masked_fill_(~core[self.padding].any(), 0.0)
            return value
        value = core.to(dtype).to(core.dtype) if core.dtype != dtype else core
        if mask is not None and keep is not None:
            return mask.hard(value, out)
        return value if out is None else out.copy_(value)

    @torch.no_grad()
    def encode(self, writer: Writer, core: Tensor, dtype: torch.dtype, at: Strengths) -> None:
        """Store a core, as its value of this type is: which entries are not zero, and these."""
        mask, levels = self._acting(at)
        keep = self.survivors(core, at)
        masks = keep is not None and not bool(keep.all())
        writer.integer(int(masks))
        if masks and keep is not None:
            units = mask.units if mask is not None and mask.threshold > 0 else Units(tuple(core.shape), "channel")
            if self.padding is not None and units.granularity == "column":
                units = Units(tuple(core.shape))  # these blocks reach over the row
            units.encode(writer, keep)
        kept = torch.ones_like(core, dtype=torch.bool) if keep is None else keep
        writer.integer(levels.code_number if levels is not None else 0)
        if levels is not None:
            levels.encode(writer, core, kept)
        else:
            write_bits(writer, core.masked_select(kept).to(dtype))

    # -------------------------------------------------------------------------------------------- gradients

    def straight(self, at: Strengths) -> bool:
        """Whether a gradient passes unchanged and nothing is trained."""
        mask, levels = self._acting(at)
        idle = mask is None or mask.straight or (mask.threshold == 0 and mask.learned_scores() is None)
        return idle and (levels is None or levels.straight)

    @torch.no_grad()
    def pull(self, core: Tensor, gradient: Tensor, at: Strengths) -> Tensor:
        """The core's gradient from that of its value, which may be overwritten; sidecars get theirs, in `grad`."""
        mask, levels = self._acting(at)
        if mask is not None:
            gradient = mask.pull(core, gradient)  # scores learn from the gradient as it comes, not as levels clamp it
        return gradient if levels is None else levels.pull(core, gradient, self.keep(at), at.levels)
