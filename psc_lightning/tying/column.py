"""Column sharing: neighbours along a column of the matrix view are one weight."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Annotated

from torch import Tensor

from psc_lightning.numerics.functional import block_expand, block_mean
from psc_lightning.options import whole
from psc_lightning.symbols import Reader, Writer
from psc_lightning.tying.base import Shape, Tying

__all__ = ["ColumnSharing"]


class ColumnSharing(Tying):
    """``W[jn … jn+n-1, i]`` is one number: n neighbouring outputs weigh an input alike.

    Forward: core[j, i] = mean of the block, effective weight = each entry repeated n times.
    Gradient: every member gets the mean of the members' gradients.
    Stored: ⌈O/n⌉ · N numbers; the block length.

    Args:
        shape: the matrix view's shape, ``(O, I, *kernel)``.
        block: n ≥ 1; None: 4. Longer than O: the whole column.

    Shapes:
        weight ``(O, I, *kernel)`` → core ``(⌈O/n⌉, I, *kernel)``.

    Raises:
        ValueError: fewer than two outputs.

    >>> import torch
    >>> tying = ColumnSharing.build((3, 2), block=2)
    >>> w = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 7.0]], requires_grad=True)
    >>> out = tying.expand(tying.reduce(w))
    >>> (out * torch.tensor([[1.0, 0.0], [0.0, 4.0], [1.0, 1.0]])).sum().backward()
    >>> out.tolist(), w.grad.tolist()
    ([[2.0, 4.0], [2.0, 4.0], [5.0, 7.0]], [[0.5, 2.0], [0.5, 2.0], [1.0, 1.0]])

    Source: the project's method description ("column sharing").
    """

    code_number = 3
    ties_rows = True

    def __init__(self, shape: Shape, block: int) -> None:
        super().__init__()
        self.shape, self.block = shape, block

    @classmethod
    def build(cls, shape: Shape, block: Annotated[int | None, partial(whole, low=1)] = None) -> ColumnSharing:  # type: ignore[override]
        """The tying for a weight of this shape."""
        if shape[0] < 2:
            raise ValueError(f"column sharing needs two or more outputs, this weight is {shape}")
        return cls(shape, min(block or 4, shape[0]))

    def core_shapes(self) -> dict[str, Shape]:
        """One core, ``(⌈O/n⌉, I, *kernel)``."""
        return {"core": (-(-self.shape[0] // self.block), *self.shape[1:])}

    def reduce(self, matrix: Tensor) -> dict[str, Tensor]:
        """Mean of each block."""
        core = block_mean(matrix.reshape(self.shape[0], prod(self.shape[1:])), 0, self.block)
        return {"core": core.reshape(self.core_shapes()["core"])}

    def expand(self, cores: dict[str, Tensor]) -> Tensor:
        """Each entry repeated along its block."""
        flat = cores["core"].reshape(-1, prod(self.shape[1:]))
        return block_expand(flat, 0, self.block, self.shape[0]).reshape(self.shape)

    def encode(self, writer: Writer) -> None:
        """Store the block length."""
        writer.integer(self.block)

    @classmethod
    def decode(cls, reader: Reader, shape: Shape) -> ColumnSharing:
        """Read it."""
        return cls(shape, reader.integer(1, max(1, shape[0])))
