"""Row sharing: neighbours along a row of the matrix view are one weight."""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Annotated

from torch import Tensor

from psc_lightning.numerics.functional import block_expand, block_mean
from psc_lightning.options import whole
from psc_lightning.symbols import Reader, Writer
from psc_lightning.tying.base import Shape, Tying

__all__ = ["RowSharing"]


class RowSharing(Tying):
    """``W[o, jn … jn+n-1]`` is one number: n neighbours in an output row, e.g. a row of a convolution kernel.

    Forward: core[o, j] = mean of the block, effective weight = each entry repeated n times.
    Gradient: every member gets the mean of the members' gradients, the projected step at the dense learning rate.
    Stored: O · ⌈N/n⌉ numbers; the block length.

    Args:
        shape: the matrix view's shape, ``(O, I, *kernel)``, N = I · prod(kernel).
        block: n ≥ 1; None: the kernel's width, 4 where that is 1 or there is none. Longer than N: the whole row.

    Shapes:
        weight ``(O, I, *kernel)`` → core ``(O, ⌈N/n⌉)``.

    Raises:
        ValueError: rows of fewer than two entries.

    >>> import torch
    >>> tying = RowSharing.build((1, 4), block=2)
    >>> w = torch.tensor([[1.0, 3.0, 5.0, 7.0]], requires_grad=True)
    >>> out = tying.expand(tying.reduce(w))
    >>> (out * torch.tensor([[1.0, 0.0, 0.0, 4.0]])).sum().backward()
    >>> out.tolist(), w.grad.tolist()
    ([[2.0, 2.0, 6.0, 6.0]], [[0.5, 0.5, 2.0, 2.0]])

    Source: the project's method description ("row sharing"); structured sharing in the manner of Chen et al. 2015,
    "Compressing neural networks with the hashing trick", with a fixed position map instead of a hash.
    """

    code_number = 2

    def __init__(self, shape: Shape, block: int) -> None:
        super().__init__()
        self.shape, self.block = shape, block
        self.entries = prod(shape[1:])

    @classmethod
    def build(cls, shape: Shape, block: Annotated[int | None, partial(whole, low=1)] = None) -> RowSharing:  # type: ignore[override]
        """The tying for a weight of this shape."""
        block = block or (shape[-1] if len(shape) > 2 and shape[-1] > 1 else 4)
        if prod(shape[1:]) < 2:
            raise ValueError(f"row sharing needs rows of two or more entries, this weight is {shape}")
        return cls(shape, min(block, prod(shape[1:])))

    def core_shapes(self) -> dict[str, Shape]:
        """One core, ``(O, ⌈N/n⌉)``."""
        return {"core": (self.shape[0], -(-self.entries // self.block))}

    def reduce(self, matrix: Tensor) -> dict[str, Tensor]:
        """Mean of each block."""
        return {"core": block_mean(matrix.reshape(self.shape[0], self.entries), 1, self.block)}

    def expand(self, cores: dict[str, Tensor]) -> Tensor:
        """Each entry repeated along its block."""
        return block_expand(cores["core"], 1, self.block, self.entries).reshape(self.shape)

    def encode(self, writer: Writer) -> None:
        """Store the block length."""
        writer.integer(self.block)

    @classmethod
    def decode(cls, reader: Reader, shape: Shape) -> RowSharing:
        """Read it."""
        return cls(shape, reader.integer(1, max(1, prod(shape[1:]))))
