"""Half-precision levels: the numbers that float16 or bfloat16 can hold."""

from __future__ import annotations

import torch
from torch import Tensor

from psc_lightning.bits import read_bits, write_bits
from psc_lightning.functional import Group
from psc_lightning.levels.base import Levels, Shape
from psc_lightning.symbols import Reader, Writer

__all__ = ["BFloat16Levels", "Float16Levels"]


class _HalfLevels(Levels):
    """Round to the numbers of a narrower floating-point type, ``stored``."""

    stored: torch.dtype

    def __init__(self, shape: Shape, group: Group = "channel") -> None:
        super().__init__(shape, group)

    def refresh(self, core: Tensor, keep: Tensor) -> None:
        """Nothing to compute; an overflow is an error."""
        largest = float(torch.where(keep, core, 0.0).abs().max()) if core.numel() else 0.0
        limit = torch.finfo(self.stored).max
        if not largest <= limit:
            raise ValueError(f"{self.stored} holds numbers up to {limit:g}, a weight of size {largest:g} overflows")

    def code(self, core: Tensor) -> Tensor:
        """The rounded number."""
        return (core.to(self.stored) + 0.0).to(core.dtype)  # + 0.0: a tiny negative number rounds to -0.0

    def value(self, code: Tensor) -> Tensor:
        """The same number."""
        return code

    def encode(self, writer: Writer, core: Tensor, keep: Tensor) -> None:
        """Store the 16 bits of the kept entries."""
        write_bits(writer, self.code(core)[keep].to(self.stored))

    @classmethod
    def decode(cls, reader: Reader, keep: Tensor, dtype: torch.dtype) -> Tensor:
        """Read them."""
        values = torch.zeros(keep.shape, dtype=dtype)
        values[keep] = read_bits(reader, int(keep.sum()), cls.stored).to(dtype)
        return values


class Float16Levels(_HalfLevels):
    """``x̂ = float16(x)``: 11 significant bits.

    Pseudo-gradient: ∂/∂x = g. Stored: 16 bits an entry, its two bytes entropy-coded apart.

    Args:
        group: ignored; there is no scale.

    Raises:
        ValueError: where a weight is larger than 65504.

    >>> levels = Float16Levels((1, 4))
    >>> x = torch.tensor([[1.0, 0.1, -2.0, 1e-9]], requires_grad=True)
    >>> levels(x).sum().backward()
    >>> levels(x).tolist(), x.grad.tolist()
    ([[1.0, 0.0999755859375, -2.0, 0.0]], [[1.0, 1.0, 1.0, 1.0]])

    Source: IEEE 754-2008, binary16.
    """

    code_number = 1
    stored = torch.float16


class BFloat16Levels(_HalfLevels):
    """``x̂ = bfloat16(x)``: 8 significant bits, float32's range.

    Pseudo-gradient: ∂/∂x = g. Stored: 16 bits an entry, its two bytes entropy-coded apart.

    Args:
        group: ignored; there is no scale.

    >>> levels = BFloat16Levels((1, 4))
    >>> x = torch.tensor([[1.0, 0.1, -2.0, 3.0]], requires_grad=True)
    >>> levels(x).sum().backward()
    >>> levels(x).tolist(), x.grad.tolist()
    ([[1.0, 0.10009765625, -2.0, 3.0]], [[1.0, 1.0, 1.0, 1.0]])

    Source: Kalamkar et al. 2019, "A study of bfloat16 for deep learning training".
    """

    code_number = 7
    stored = torch.bfloat16
