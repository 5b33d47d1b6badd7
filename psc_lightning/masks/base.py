"""What every mask is: a score for each unit of a core; the units with the smallest are zero."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from psc_lightning.masks.units import GRANULARITIES, Units
from psc_lightning.numerics.asking import Question, answer
from psc_lightning.numerics.functional import Group, group_counts, zero_count
from psc_lightning.numerics.selection import choose, magnitudes, mark_largest, numbers
from psc_lightning.numerics.strips import blank_, strips
from psc_lightning.options import grouping, one_of, share, whole

__all__ = ["Mask"]

Shape = tuple[int, ...]


class Mask(nn.Module):
    """The second slot: `threshold` is the share of the core's entries that are zero, 0 ≤ threshold < 1.

    In each group exactly ``floor(threshold · units + 0.5)`` units are zero (at least one survives), the smallest in the
    order (score, |weight|, index). A method says only where the score comes from and which gradients flow.

    Stored: one bit a unit, entropy-coded.

    Args:
        shape: the core's shape.
        threshold: share of the units set to zero, 0 ≤ threshold < 1.
        granularity: `element`; `row`: n neighbours in an output row; `column`: n neighbouring outputs at one input
            position; `channel`: a whole output row. A unit's score and weight are the means over its entries.
        group: the share holds for the `tensor`, for each `channel`, or for each n consecutive units.
        block: n of `row` and `column`; None: 4, for `row` the kernel's width where there is one.

    Shapes:
        cores and `kept`: `shape`; scores: a matrix of units, ``(O, N)`` for `element`.
    """

    #: whether every entry gets the gradient of the weight that stands in its place (so that masked ones may return), and
    #: nothing else is trained
    straight: ClassVar[bool] = False
    #: whether the score is the tiebreak, |weight|
    by_magnitude: ClassVar[bool] = False
    #: which labels (gradients of the user's loss) choose the mask: `none`, those `before` it begins, those `during` training
    labels: ClassVar[str] = "none"

    kept: Tensor

    def __init__(
        self,
        shape: Shape,
        threshold: Annotated[float, share] = 0.5,
        granularity: Annotated[str, partial(one_of, allowed=GRANULARITIES)] = "element",
        group: Annotated[Group, grouping] = "tensor",
        block: Annotated[int | None, partial(whole, low=1)] = None,
    ) -> None:
        super().__init__()
        self.shape, self.threshold, self.group = shape, threshold, group
        self.units = Units(shape, granularity, block)
        # No bool: averaging callbacks subtract all buffers, which torch refuses to do with those.
        self.register_buffer("kept", torch.ones(shape, dtype=torch.uint8))

    @classmethod
    def trains(cls, options: Mapping[str, Any]) -> bool:
        """Whether, with these options, something is trained beside the weight."""
        return cls.labels == "during"

    @classmethod
    def calibrates(cls, options: Mapping[str, Any]) -> bool:
        """Whether, with these options, labels are seen before it begins."""
        return cls.labels == "before"

    @property
    def keep(self) -> Tensor:
        """Which entries survive, as a boolean view."""
        return self.kept.view(torch.bool)

    def learned_scores(self) -> Tensor | None:
        """The trained score of each unit, where the method has one."""
        return None

    def score(self, core: Tensor) -> Tensor:
        """The score of each unit, as a matrix of units; the smallest are dropped."""
        raise NotImplementedError

    def observe(self, core: Tensor, gradient: Tensor) -> None:
        """Take in the gradient of one step (label-driven methods)."""

    def hold_zeros(self, core: Tensor) -> float:
        """Keep the units of a core that are zero before the mask begins, for it has been pruned before.

        Returns:
            The strength at which the mask's share is theirs, 0 … 1; 0 where all are: so weights are initialised.
        """
        zeros, count = int((self.units.mean(core.abs()) == 0).sum()), prod(self.units.shape)
        return min(zeros / count / self.threshold, 1.0) if self.threshold and zeros < count else 0.0

    def restart(self) -> None:
        """Forget the labels: another weight has taken the place of the one that they were of; |weight| decides again."""

    def refresh(self, core: Tensor, strength: float = 1.0) -> None:
        """Choose which entries are zero now; `strength` scales the share."""
        answer(self.refreshing(core, strength))

    def refreshing(self, core: Tensor, strength: float = 1.0) -> Question[None]:
        """`refresh`, which may have to ask."""
        if self.threshold == 0:
            self.kept.fill_(1)
            return
        share, count = self.threshold * strength, prod(self.units.shape)
        _, size = group_counts(self.units.shape, self.group)
        if size == count and core.device.type == "cpu":
            self._refresh_row(core, zero_count(share, count))
            return
        full, kept = (count // size) * size, []
        # All full groups at once, then the shorter last one: their counts of zeros differ.
        for part, width in ((slice(0, full), size), (slice(full, None), count - full)):
            if width:

                def score(part: slice = part, width: int = width) -> Tensor:
                    return self.score(core).float().reshape(-1)[part].reshape(-1, width)

                def weights(part: slice = part, width: int = width) -> Tensor:
                    return self.units.mean(core.abs()).float().reshape(-1)[part].reshape(-1, width)

                chosen = yield from choose(score, None if self.by_magnitude else weights, zero_count(share, width))
                kept.append(chosen.reshape(-1))
        self.keep.copy_(self.units.expand(torch.cat(kept) if len(kept) > 1 else kept[0]))

    def _refresh_row(self, core: Tensor, zeros: int) -> None:
        """The same where all units are one group, on the CPU: nothing of the core's size is made but the mask."""
        if self.units.granularity == "element":
            weights = magnitudes(core.reshape(-1))
        else:
            weights = numbers(self.units.mean(core.abs()).reshape(-1))
        direct = self.units.granularity == "element" and self.kept.is_contiguous()
        kept = self.keep.view(-1) if direct else torch.empty(prod(self.units.shape), dtype=torch.bool)
        if self.by_magnitude:
            mark_largest(weights, None, zeros, kept.numpy())
        else:
            mark_largest(numbers(self.score(core).reshape(-1)), weights, zeros, kept.numpy())
        if not direct:
            self.keep.copy_(self.units.expand(kept))

    @torch.no_grad()
    def hard(self, core: Tensor, out: Tensor | None = None) -> Tensor:
        """The core, +0.0 where the mask drops, as of the last refresh.

        Args:
            core: of any strides.
            out: where to write it: the core's shape and dtype, any strides, no entry of the core; None: a new tensor.
        """
        if out is None:
            out = torch.empty_like(core)
        for _, values, kept, (place,) in strips(core, max(core.numel(), 1), self.keep, out):
            blank_(values, kept, place)
        return out

    @torch.no_grad()
    def pull(self, core: Tensor, gradient: Tensor) -> Tensor:
        """The core's gradient, from that of what the mask leaves, which may be overwritten."""
        return gradient if self.straight or self.threshold == 0 else blank_(gradient, self.keep)
