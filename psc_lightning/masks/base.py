"""What every mask is: a score for each unit of a core; the units with the smallest are zero."""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from psc_lightning.functional import Group, block_expand, block_mean, group_counts, largest, masked, zero_count
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


def unit_mean(core: Tensor, granularity: str, block: int) -> Tensor:
    """Mean over the entries of each unit."""
    matrix = _matrix(core)
    if granularity == "element":
        return matrix
    if granularity == "channel":
        return matrix.mean(1, keepdim=True)
    return block_mean(matrix, 1 if granularity == "row" else 0, block)


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

    @torch.no_grad()
    def refresh(self, core: Tensor, strength: float = 1.0) -> None:
        """Choose which entries are zero now; `strength` scales the share."""
        if self.threshold == 0:
            self.kept.fill_(1)
            return
        share = self.threshold * strength
        scores = self.score(core).float()
        weights = unit_mean(core.abs(), self.granularity, self.block).float()
        kept = torch.ones_like(scores, dtype=torch.bool).reshape(-1)
        _, size = group_counts(tuple(scores.shape), self.group)
        full = (scores.numel() // size) * size
        # All full groups at once, then the shorter last one: their counts of zeros differ.
        for part, width in ((slice(0, full), size), (slice(full, None), scores.numel() - full)):
            if width:
                rows = (-1, width)
                chosen = largest(
                    scores.reshape(-1)[part].reshape(rows),
                    weights.reshape(-1)[part].reshape(rows),
                    zero_count(share, width),
                )
                kept[part] = chosen.reshape(-1)
        self.keep.copy_(unit_expand(kept.reshape(scores.shape), self.shape, self.granularity, self.block))

    def forward(self, value: Tensor, core: Tensor) -> Tensor:
        """`value` where the mask keeps, else +0.0; gradients as `functional.masked` says."""
        scores = self.learned_scores()
        if self.threshold == 0 and scores is None:
            return value  # nothing of a run but its options decides which path it takes: a graph is compiled once
        if scores is not None:
            scores = unit_expand(scores, self.shape, self.granularity, self.block)
        keep = self.kept != 0  # not the view: inductor's C++ for a view of another type does not compile
        return masked(value, keep, core, scores, self.dense_gradient)

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
