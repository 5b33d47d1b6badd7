"""Ternary levels: minus, zero, plus."""

from __future__ import annotations

import torch
from torch import Tensor

from psc_lightning.functional import (
    Group,
    group_counts,
    spread,
    survivor_magnitude,
    survivor_room,
)
from psc_lightning.levels.base import Levels, Shape, read_codes, read_group, write_codes, write_group
from psc_lightning.precision import read_numbers, write_numbers
from psc_lightning.strips import survivors, whole
from psc_lightning.symbols import Reader, Writer

__all__ = ["TernaryLevels"]


class TernaryLevels(Levels):
    """``x̂ ∈ {-s, 0, s}``: zero where |x| ≤ Δ = 0.7 · mean |x|; s = mean |x| of the others.

    Means run over the kept entries of the group. Pseudo-gradient: ∂/∂x = g.
    Stored: one of three codes an entry, entropy-coded (at most 1.58 bits); 16 bits a group for s; one exponent.

    Args:
        group: which entries share s and Δ.
        scales: what s is stored as, and rounded to: `float32`, `float16` or `log8`.

    >>> levels = TernaryLevels((1, 4), group="tensor")
    >>> x = torch.tensor([[0.25, -2.0, 1.0, 0.75]], requires_grad=True)
    >>> levels.refresh(x, torch.ones(1, 4, dtype=torch.bool))
    >>> levels(x).sum().backward()
    >>> levels(x).tolist(), x.grad.tolist()
    ([[0.0, -1.25, 1.25, 1.25]], [[1.0, 1.0, 1.0, 1.0]])

    Source: Li et al. 2016, "Ternary weight networks", eq. 4-6; here per group, over survivors, s rounded.
    """

    code_number = 4
    _snaps = (torch.float32, torch.float64)

    unit: Tensor
    scale: Tensor
    limit: Tensor

    def __init__(self, shape: Shape, group: Group = "channel", scales: str = "float16") -> None:
        super().__init__(shape, group, scales)
        count, _ = group_counts(shape, group)
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("scale", torch.ones(count))
        self.register_buffer("limit", torch.ones(count))

    @torch.no_grad()
    def refresh(self, core: Tensor, keep: Tensor | None = None) -> None:
        """Set Δ and s from the kept entries."""
        count, size = group_counts(self.shape, self.group)
        total, number = survivor_room(core, count), survivor_room(core, count)
        at_once = whole(core, size)  # Δ and s from one look at the entries
        limit = total.clone() if at_once else 0.7 * survivor_magnitude(core, keep, self.group)
        large = torch.empty(0, dtype=total.dtype, device=core.device)
        for groups, values, kept, spare in survivors(core, keep, size):
            torch.abs(values, out=spare)
            if at_once:
                limit[groups] = 0.7 * (spare.sum(1) / kept().clamp_min(1))
            torch.gt(spare, limit[groups, None], out=large.resize_(spare.shape))
            number[groups].add_(large.sum(1))
            total[groups].add_(spare.mul_(large).sum(1))
        self.limit.copy_(limit)
        self._settle(total / number.clamp_min(1))

    def code(self, core: Tensor) -> Tensor:
        """-1, 0, 1."""
        return core.sign() * (core.abs() > spread(self.limit, self.shape, self.group))

    def value(self, code: Tensor) -> Tensor:
        """code · s."""
        return (code * spread(self.scale, self.shape, self.group)).add_(0.0)

    def _tables(self) -> tuple[Tensor, ...]:
        return self.limit, self.scale

    def _snap(self, values: Tensor, place: Tensor, *tables: Tensor) -> None:
        limit, scale = tables
        torch.abs(values, out=place).gt_(limit).mul_(scale)
        torch.copysign(place, values, out=place).add_(0.0)

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
