"""Half-precision levels: the numbers that float16 or bfloat16 can hold."""

from __future__ import annotations

import torch
from torch import Tensor

from psc_lightning.levels.base import Levels, Shape, largest
from psc_lightning.numerics.asking import Question
from psc_lightning.numerics.bits import read_kept, write_bits
from psc_lightning.numerics.strips import survivors
from psc_lightning.symbols import Reader, Writer

__all__ = ["BFloat16Levels", "Float16Levels"]


class Float16Levels(Levels):
    """``x̂ = float16(x)``: 11 significant bits.

    Pseudo-gradient: ∂/∂x = g. Stored: 16 bits an entry, its two bytes entropy-coded apart.

    Shapes: see `Levels`.

    Raises:
        ValueError: where a weight is larger than 65504.

    >>> levels = Float16Levels((1, 4))
    >>> levels.hard(torch.tensor([[1.0, 0.1, -2.0, 1e-9]])).tolist()
    [[1.0, 0.0999755859375, -2.0, 0.0]]

    Source: IEEE 754-2008, binary16.
    """

    code_number = 1
    stored = torch.float16
    _snaps = (torch.float32, torch.float64)

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)

    def refreshing(self, core: Tensor, keep: Tensor | None = None) -> Question[None]:
        """Nothing to compute; an overflow is an error."""
        found = [largest(strip).max() for strip in survivors(core, keep, self.size)]
        size, limit = (yield torch.stack(found).max()) if found else 0.0, torch.finfo(self.stored).max
        if not size <= limit:
            raise ValueError(f"{self.stored} holds numbers up to {limit:g}, a weight of size {size:g} overflows")

    @property
    def value_bits(self) -> float:
        """All that are stored."""
        return 16.0

    def code(self, core: Tensor) -> Tensor:
        """The rounded number."""
        return self._rounded(core).to(core.dtype)

    def _rounded(self, core: Tensor) -> Tensor:
        return core.to(self.stored) + 0.0  # a tiny negative number rounds to -0.0

    def value(self, code: Tensor) -> Tensor:
        """The same number."""
        return code

    def _snap(self, values: Tensor, place: Tensor, *tables: Tensor) -> None:
        place.copy_(values.to(self.stored)).add_(0.0)

    def rescale(self, code: Tensor, factor: Tensor) -> Tensor:
        """Multiply the numbers themselves."""
        return self.code(code * factor.reshape(-1, *(1,) * (code.dim() - 1)))

    def encode(self, writer: Writer, core: Tensor, keep: Tensor) -> None:
        """Store the 16 bits of the kept entries."""
        write_bits(writer, self._rounded(core).masked_select(keep))

    @classmethod
    def decode(cls, reader: Reader, keep: Tensor, dtype: torch.dtype) -> Tensor:
        """Read them."""
        return read_kept(reader, keep, cls.stored, dtype)


class BFloat16Levels(Float16Levels):
    """``x̂ = bfloat16(x)``: 8 significant bits, float32's range.

    Pseudo-gradient: ∂/∂x = g. Stored: 16 bits an entry, its two bytes entropy-coded apart.

    Shapes: see `Levels`.

    >>> levels = BFloat16Levels((1, 4))
    >>> levels.hard(torch.tensor([[1.0, 0.1, -2.0, 3.0]])).tolist()
    [[1.0, 0.10009765625, -2.0, 3.0]]

    Source: Kalamkar et al. 2019, "A study of bfloat16 for deep learning training".
    """

    code_number = 7
    stored = torch.bfloat16
