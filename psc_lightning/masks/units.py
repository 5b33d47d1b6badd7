"""What a mask keeps or drops as one: an entry, some neighbours in a row or a column, a whole output row."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from psc_lightning.numerics.functional import block_expand, block_sum
from psc_lightning.symbols import Reader, Writer

__all__ = ["GRANULARITIES", "Units", "read_keep"]

Shape = tuple[int, ...]

#: `row` and `column` are the blocks of row and column sharing.
GRANULARITIES = ("element", "row", "column", "channel")


class Units:
    """The units of a core of this shape, as a matrix: a row each row of the core, or each block of rows.

    Args:
        shape: the core's shape.
        granularity: `element`; `row`: neighbours in an output row; `column`: neighbouring outputs at one input position;
            `channel`: a whole output row.
        block: neighbours of `row` and `column`; None: 4, for `row` the kernel's width where there is one.

    >>> Units((4, 6), "row", 4).shape, Units((4, 6), "channel").mean(torch.ones(4, 6)).tolist()
    ((4, 2), [[1.0], [1.0], [1.0], [1.0]])
    """

    def __init__(self, shape: Shape, granularity: str = "element", block: int | None = None) -> None:
        kernel_row = granularity == "row" and len(shape) > 2 and shape[-1] > 1
        wanted = block or (shape[-1] if kernel_row else 4)
        self.core, self.granularity = shape, granularity
        self.block = min(wanted, max(1, shape[0] if granularity == "column" else prod(shape[1:])))
        self.rows, self.columns = shape[0], prod(shape[1:])

    @property
    def shape(self) -> tuple[int, int]:
        """How many there are."""
        return {
            "element": (self.rows, self.columns),
            "row": (self.rows, -(-self.columns // self.block)),
            "column": (-(-self.rows // self.block), self.columns),
            "channel": (self.rows, 1),
        }[self.granularity]

    def sum(self, core: Tensor) -> Tensor:
        """Sum over the entries of each unit."""
        matrix = core.reshape(self.rows, -1)
        if self.granularity == "element":
            return matrix
        if self.granularity == "channel":
            return matrix.sum(1, keepdim=True)
        return block_sum(matrix, 1 if self.granularity == "row" else 0, self.block)

    def mean(self, core: Tensor) -> Tensor:
        """Mean over the entries of each unit; units of equal sums have equal means."""
        sums = self.sum(core)
        if self.granularity == "element":
            return sums
        if self.granularity == "channel":
            return sums / self.columns
        axis, length = (1, self.columns) if self.granularity == "row" else (0, self.rows)
        counts = torch.full((sums.shape[axis],), float(self.block), dtype=sums.dtype, device=sums.device)
        counts[-1] = length - (len(counts) - 1) * self.block
        return sums / (counts if axis == 1 else counts[:, None])

    def expand(self, units: Tensor) -> Tensor:
        """Each unit's value at each of its entries: the core's shape."""
        units = units.reshape(self.shape)
        if self.granularity == "channel":
            units = units.expand(-1, self.columns)
        elif self.granularity == "row":
            units = block_expand(units, 1, self.block, self.columns)
        elif self.granularity == "column":
            units = block_expand(units, 0, self.block, self.rows)
        return units.reshape(self.core)

    def encode(self, writer: Writer, keep: Tensor) -> None:
        """Store granularity, block and one bit a unit: whether its entries are kept."""
        writer.integer(GRANULARITIES.index(self.granularity))
        writer.integer(self.block)
        units = keep.reshape(self.rows, -1)
        if self.granularity == "channel":
            units = units[:, :1]
        elif self.granularity == "row":
            units = units[:, :: self.block]
        elif self.granularity == "column":
            units = units[:: self.block]
        writer.symbols(units.reshape(-1).view(torch.uint8), 2, torch.ones_like(units, dtype=torch.bool))


def read_keep(reader: Reader, shape: Shape) -> Tensor:
    """Read what `Units.encode` stored: a boolean tensor of the core's shape."""
    granularity = GRANULARITIES[reader.integer(0, len(GRANULARITIES) - 1)]
    units = Units(shape, granularity, reader.integer(1, max(1, prod(shape))))
    marks = torch.ones(units.shape, dtype=torch.bool)
    return units.expand(reader.symbols(marks.numel(), 2, marks).view(torch.bool))
