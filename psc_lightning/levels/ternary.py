"""Ternary levels: minus, zero, plus."""

from __future__ import annotations

import torch
from torch import Tensor

from psc_lightning.levels.base import Grouping, Levels, Scales, Shape, read_codes, read_group, write_codes, write_group
from psc_lightning.numerics.functional import spread
from psc_lightning.numerics.precision import read_numbers, write_numbers
from psc_lightning.numerics.strips import Survivors
from psc_lightning.symbols import Reader, Writer

__all__ = ["TernaryLevels"]


class TernaryLevels(Levels):
    """``x̂ ∈ {-s, 0, s}``: zero where |x| ≤ Δ = 0.7 · mean |x|; s = mean |x| of the others.

    Means run over the kept entries of the group. Pseudo-gradient: ∂/∂x = g.
    Stored: one of three codes an entry, entropy-coded (at most 1.58 bits); 16 bits a group for s; one exponent.

    Args:
        group: which entries share s and Δ.
        scales: what s is stored as, and rounded to: `float32`, `float16` or `log8`.

    Shapes: see `Levels`.

    >>> levels = TernaryLevels((1, 4), group="tensor")
    >>> x = torch.tensor([[0.25, -2.0, 1.0, 0.75]])
    >>> levels.refresh(x)
    >>> levels.hard(x).tolist()
    [[0.0, -1.25, 1.25, 1.25]]

    Source: Li et al. 2016, "Ternary weight networks", eq. 4-6; here per group, over survivors, s rounded.
    """

    code_number = 4
    passes = 2
    _snaps = (torch.float32, torch.float64)

    unit: Tensor
    scale: Tensor
    limit: Tensor

    def __init__(self, shape: Shape, group: Grouping = "channel", scales: Scales = "float16") -> None:
        super().__init__(shape, group, scales)
        self.tables = {"limit": None, "scale": "unit"}
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("scale", torch.ones(self.count))
        self.register_buffer("limit", torch.ones(self.count))

    def _sums(self, index: int, strip: Survivors, *found: Tensor) -> tuple[Tensor, ...]:
        sizes = torch.abs(strip.values, out=strip.spare())
        if index == 0:
            return sizes.sum(1), strip.number()
        large = torch.gt(sizes, found[0][:, None], out=strip.spare(1))
        return sizes.mul_(large).sum(1), large.sum(1)

    def _found(self, index: int, *sums: Tensor) -> tuple[Tensor, ...]:
        total, number = sums
        mean = total / number.clamp_min(1)
        return (0.7 * mean,) if index == 0 else (mean,)

    def code(self, core: Tensor) -> Tensor:
        """-1, 0, 1."""
        return core.sign() * (core.abs() > spread(self.limit, self.shape, self.group))

    def value(self, code: Tensor) -> Tensor:
        """code · s."""
        return (code * spread(self.scale, self.shape, self.group)).add_(0.0)

    def _snap(self, values: Tensor, place: Tensor, *tables: Tensor) -> None:
        limit, scale = tables
        torch.abs(values, out=place).gt_(limit).mul_(scale)
        torch.copysign(place, values, out=place).add_(0.0)

    @property
    def rungs(self) -> int:
        """One."""
        return 1

    def ladder(self, core: Tensor) -> tuple[Tensor, Tensor]:
        """x/2Δ, which is half way up where x = Δ, and 1/2Δ."""
        slope = spread(2 * self.limit, self.shape, self.group).reciprocal()
        return core * slope, slope

    @torch.no_grad()
    def rescale(self, code: Tensor, factor: Tensor) -> Tensor:
        """Multiply s."""
        self._by_channel()
        self._settle(self.scale * factor)
        self.limit.copy_(self.scale / 2)
        return self.value(code)

    def encode(self, writer: Writer, core: Tensor, keep: Tensor) -> None:
        """Store group, scales, codes."""
        write_group(writer, self.group)
        write_numbers(writer, self.scales, self.scale, self.unit)
        write_codes(writer, self.code(core), keep, -1, 3)

    @classmethod
    def decode(cls, reader: Reader, keep: Tensor, dtype: torch.dtype) -> Tensor:
        """Read them: the core's values."""
        levels = cls(tuple(keep.shape), read_group(reader, keep))
        levels.scale = read_numbers(reader, levels.scale.numel())
        return levels.value(read_codes(reader, keep, -1, 3, dtype))
