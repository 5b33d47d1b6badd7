"""Mask and levels of one core: the last two slots, as pure maths over what they have learned."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from psc_lightning.levels import Levels
from psc_lightning.masks import Mask
from psc_lightning.strips import blank_

__all__ = ["Chain", "Strengths"]


class Strengths(NamedTuple):
    """How hard mask and levels act, 0 (absent) … 1."""

    mask: float
    levels: float


class Chain(nn.Module):
    """Mask and levels of one core; either may be missing, and is then as if its strength were 0."""

    mask: Mask | None
    levels: Levels | None

    def __init__(self, mask: Mask | None, levels: Levels | None) -> None:
        super().__init__()
        self.mask, self.levels = mask, levels

    def _acting(self, at: Strengths) -> tuple[Mask | None, Levels | None]:
        return self.mask if at.mask else None, self.levels if at.levels else None

    def keep(self, at: Strengths) -> Tensor | None:
        """Which entries survive; None: all."""
        mask, _ = self._acting(at)
        return mask.keep if mask is not None and mask.threshold > 0 else None

    def hold_zeros(self, core: Tensor) -> float:
        """Let the mask keep the units that are zero already; the strength at which its share is theirs."""
        return 0.0 if self.mask is None else self.mask.hold_zeros(core)

    def refresh(self, core: Tensor, at: Strengths, begin: bool, due: tuple[bool, bool]) -> None:
        """Choose the survivors, then scales and tables over them.

        Args:
            core: what they act on.
            at: the strengths; a mask's scales its share.
            begin: whether the levels start now.
            due: which of the two are recomputed.
        """
        mask, levels = self._acting(at)
        if mask is not None and due[0]:
            mask.refresh(core, at.mask)
        if levels is not None and due[1]:
            keep = self.keep(at)
            if begin:
                levels.begin(core, keep)
            levels.refresh(core, keep)

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
            return blank_(value.add_((1 - at.levels) * (core - value)), keep) if soft else value
        value = core.to(dtype).to(core.dtype) if core.dtype != dtype else core
        if mask is not None and keep is not None:
            return mask.hard(value, out)
        return value if out is None else out.copy_(value)

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
