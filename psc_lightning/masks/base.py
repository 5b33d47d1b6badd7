"""What every mask is: a score for each unit of a core; the units with the smallest are zero."""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from psc_lightning.functional import Group, block_expand, block_sum, group_counts, masked, zero_count
from psc_lightning.selection import largest, magnitudes, mark_largest, numbers
from psc_lightning.strips import blank_, strips
from psc_lightning.symbols import Reader, Writer

__all__ = ["GRANULARITIES", "Mask", "read_keep"]

Shape = tuple[int, ...]

#: What is kept or dropped as one. `row` and `column` are the blocks of row and column sharing.
GRANULARITIES = ("element", "row", "column", "channel")


def _matrix(core: Tensor) -> Tensor:
    return core.reshape(core.shape[0], -1)


def units_shape(shape: Shape, granularity: str, block: int) -> Shape:
    """How many units a core of this shape has, as a matrix."""
    rows, columns = shape[0], prod(shape[1:])
    return {
        "element": (rows, columns),
        "row": (rows, -(-columns // block)),
        "column": (-(-rows // block), columns),
        "channel": (rows, 1),
    }[granularity]


def unit_sum(core: Tensor, granularity: str, block: int) -> Tensor:
    """Sum over the entries of each unit."""
    matrix = _matrix(core)
    if granularity == "element":
        return matrix
    if granularity == "channel":
        return matrix.sum(1, keepdim=True)
    return block_sum(matrix, 1 if granularity == "row" else 0, block)


def unit_mean(core: Tensor, granularity: str, block: int) -> Tensor:
    """Mean over the entries of each unit; units of equal sums have equal means."""
    sums = unit_sum(core, granularity, block)
    if granularity == "element":
        return sums
    columns = prod(core.shape[1:])
    if granularity == "channel":
        return sums / columns
    axis, length = (1, columns) if granularity == "row" else (0, core.shape[0])
    counts = torch.full((sums.shape[axis],), float(block), dtype=sums.dtype, device=sums.device)
    counts[-1] = length - (len(counts) - 1) * block
    return sums / (counts if axis == 1 else counts[:, None])


def unit_expand(units: Tensor, shape: Shape, granularity: str, block: int) -> Tensor:
    """Each unit's value at each of its entries."""
    columns = prod(shape[1:])
    if granularity == "channel":
        units = units.expand(-1, columns)
    elif granularity == "row":
        units = block_expand(units, 1, block, columns)
    elif granularity == "column":
        units = block_expand(units, 0, block, shape[0])
    return units.reshape(shape)


class Mask(nn.Module):
    """The second slot: entries of the core that are zero.

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
    """

    #: whether masked entries go on getting a gradient, so that they may return
    dense_gradient: ClassVar[bool] = True
    #: whether every entry gets the gradient of the weight that stands in its place, and nothing else is trained
    straight: ClassVar[bool] = False
    #: whether the score is the tiebreak, |weight|
    by_magnitude: ClassVar[bool] = False
    #: which labels (gradients of the user's loss) choose the mask: `none`, those `before` it begins, those `during` training
    labels: ClassVar[str] = "none"

    kept: Tensor

    def __init__(
        self,
        shape: Shape,
        threshold: float = 0.5,
        granularity: str = "element",
        group: Group = "tensor",
        block: int | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.threshold, self.granularity, self.group = shape, threshold, granularity, group
        kernel_row = granularity == "row" and len(shape) > 2 and shape[-1] > 1
        wanted = block or (shape[-1] if kernel_row else 4)
        self.block = min(wanted, shape[0] if granularity == "column" else max(1, prod(shape[1:])))
        # No bool: averaging callbacks subtract all buffers, which torch refuses to do with those.
        self.register_buffer("kept", torch.ones(shape, dtype=torch.uint8))

    @property
    def keep(self) -> Tensor:
        """Which entries survive, as a boolean view."""
        return self.kept.view(torch.bool)

    def units(self) -> Shape:
        """Shape of the matrix of units."""
        return units_shape(self.shape, self.granularity, self.block)

    def learned_scores(self) -> Tensor | None:
        """The trained score of each unit, where the method has one."""
        return None

    def score(self, core: Tensor) -> Tensor:
        """The score of each unit, as a matrix of units; the smallest are dropped."""
        raise NotImplementedError

    def observe(self, core: Tensor, gradient: Tensor) -> None:
        """Take in the gradient of one step (label-driven methods)."""

    def restart(self) -> None:
        """Forget the labels: another weight has taken the place of the one that they were of; |weight| decides again."""

    @torch.no_grad()
    def refresh(self, core: Tensor, strength: float = 1.0) -> None:
        """Choose which entries are zero now; `strength` scales the share."""
        if self.threshold == 0:
            self.kept.fill_(1)
            return
        share, count = self.threshold * strength, prod(self.units())
        _, size = group_counts(self.units(), self.group)
        if size == count and core.device.type == "cpu":
            self._refresh_row(core, zero_count(share, count))
            return
        scores = self.score(core).float()
        weights = None if self.by_magnitude else unit_mean(core.abs(), self.granularity, self.block).float()
        kept = torch.ones_like(scores, dtype=torch.bool).reshape(-1)
        full = (count // size) * size
        # All full groups at once, then the shorter last one: their counts of zeros differ.
        for part, width in ((slice(0, full), size), (slice(full, None), count - full)):
            if width:
                rows = (-1, width)
                chosen = largest(
                    scores.reshape(-1)[part].reshape(rows),
                    None if weights is None else weights.reshape(-1)[part].reshape(rows),
                    zero_count(share, width),
                )
                kept[part] = chosen.reshape(-1)
        self.keep.copy_(unit_expand(kept.reshape(scores.shape), self.shape, self.granularity, self.block))

    def _refresh_row(self, core: Tensor, zeros: int) -> None:
        """The same where all units are one group, on the CPU: nothing of the core's size is made but the mask."""
        if self.granularity == "element":
            weights = magnitudes(core.reshape(-1))
        else:
            weights = numbers(unit_mean(core.abs(), self.granularity, self.block).reshape(-1))
        direct = self.granularity == "element" and self.kept.is_contiguous()
        kept = self.keep.view(-1) if direct else torch.empty(prod(self.units()), dtype=torch.bool)
        if self.by_magnitude:
            mark_largest(weights, None, zeros, kept.numpy())
        else:
            mark_largest(numbers(self.score(core).reshape(-1)), weights, zeros, kept.numpy())
        if not direct:
            self.keep.copy_(unit_expand(kept.view(self.units()), self.shape, self.granularity, self.block))

    @torch.no_grad()
    def hard(self, core: Tensor, out: Tensor | None = None) -> Tensor:
        """The core, +0.0 where the mask drops, as of the last refresh.

        Args:
            core: of any strides.
            out: where to write it: the core's shape and dtype, any strides, no entry of the core; None: a new tensor.
        """
        if out is None:
            out = torch.empty_like(core)
        for strip in strips(core, max(core.numel(), 1), self.keep, out):
            assert strip.place is not None
            blank_(strip.place.copy_(strip.values), strip.keep)
        return out

    def forward(self, value: Tensor, core: Tensor) -> Tensor:
        """`value` where the mask keeps, else +0.0; gradients as `functional.masked` says."""
        scores = self.learned_scores()
        if self.threshold == 0 and scores is None:
            return value  # nothing of a run but its options decides which path it takes: a graph is compiled once
        if scores is not None:
            scores = unit_expand(scores, self.shape, self.granularity, self.block)
        keep = self.kept != 0  # not the view: inductor's C++ for a view of another type does not compile
        return masked(value, keep, core, scores, self.dense_gradient)

    @torch.no_grad()
    def pull(self, core: Tensor, gradient: Tensor) -> Tensor:
        """The core's gradient, from that of what the mask leaves, which may be overwritten: `forward` the other way."""
        return gradient if self.straight or self.threshold == 0 else blank_(gradient, self.keep)

    def encode(self, writer: Writer) -> None:
        """Store the granularity, the block and one bit a unit."""
        writer.integer(GRANULARITIES.index(self.granularity))
        writer.integer(self.block)
        units = self.keep.reshape(self.shape[0], -1)
        if self.granularity == "channel":
            units = units[:, :1]
        elif self.granularity == "row":
            units = units[:, :: self.block]
        elif self.granularity == "column":
            units = units[:: self.block]
        writer.symbols(units.reshape(-1).view(torch.uint8), 2, torch.ones_like(units, dtype=torch.bool))


def read_keep(reader: Reader, shape: Shape) -> Tensor:
    """Read what `Mask.encode` stored: a boolean tensor of the core's shape."""
    granularity = GRANULARITIES[reader.integer(0, len(GRANULARITIES) - 1)]
    block = reader.integer(1, max(1, prod(shape)))
    units = units_shape(shape, granularity, block)
    bits = reader.symbols(prod(units), 2, torch.ones(units, dtype=torch.bool)).view(torch.bool).reshape(units)
    return unit_expand(bits, shape, granularity, block)
