"""Binary levels: two values a group."""

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
from psc_lightning.levels.base import Levels, Shape, read_codes, read_group, read_values, write_codes, write_group
from psc_lightning.precision import read_numbers, write_numbers
from psc_lightning.strips import survivors, whole
from psc_lightning.symbols import Reader, Writer

__all__ = ["FORMS", "BinaryLevels"]

#: ±s, or 0/1 with a scale and an offset
FORMS = ("sign", "01")


class BinaryLevels(Levels):
    """``x̂ = ±s`` (form `sign`), or ``x̂ = offset + s·b`` with b = 0 or 1 (form `01`).

    sign: s = mean |x| over the kept entries of the group, the best for signs in squared error; b = [x ≥ 0].
    01: b = [x > mean x]; offset = mean of the lower entries, offset + s = mean of the upper.
    Pseudo-gradient: ∂/∂x = g.
    Stored: 1 bit an entry; 16 bits a group for s (and 16 for the offset); an exponent each.

    Args:
        group: which entries share s.
        form: `sign` or `01`.
        scales: what s (and the offset) is stored as, and rounded to: `float32`, `float16` or `log8`.

    >>> levels = BinaryLevels((1, 4), group="tensor")
    >>> x = torch.tensor([[0.5, -1.5, 1.0, -1.0]], requires_grad=True)
    >>> levels.refresh(x, torch.ones(1, 4, dtype=torch.bool))
    >>> levels(x).sum().backward()
    >>> levels(x).tolist(), x.grad.tolist()
    ([[1.0, -1.0, 1.0, -1.0]], [[1.0, 1.0, 1.0, 1.0]])
    >>> levels = BinaryLevels((1, 4), group="tensor", form="01")
    >>> levels.refresh(x, torch.ones(1, 4, dtype=torch.bool))
    >>> levels(x).tolist()
    [[0.75, -1.25, 0.75, -1.25]]

    Source: Rastegari et al. 2016, "XNOR-Net", eq. 6 (scale); Courbariaux et al. 2015, "BinaryConnect" (straight-through);
    0/1 with scale and offset: the project's method description ("binary parameter sharing").
    """

    code_number = 3
    _snaps = (torch.float32, torch.float64)

    unit: Tensor
    scale: Tensor
    offset_unit: Tensor
    offset: Tensor
    middle: Tensor

    def __init__(self, shape: Shape, group: Group = "channel", form: str = "sign", scales: str = "float16") -> None:
        super().__init__(shape, group, scales)
        self.form = form
        count, _ = group_counts(shape, group)
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("scale", torch.ones(count))
        if form == "01":
            self.register_buffer("offset_unit", torch.ones(()))
            self.register_buffer("offset", torch.zeros(count))
            self.register_buffer("middle", torch.zeros(count))

    @torch.no_grad()
    def refresh(self, core: Tensor, keep: Tensor | None = None) -> None:
        """Set scale (and offset) from the kept entries."""
        if self.form == "sign":
            self._settle(survivor_magnitude(core, keep, self.group))
            return
        count, size = group_counts(self.shape, self.group)
        lower, upper, above, number = (survivor_room(core, count) for _ in range(4))
        at_once = whole(core, size)
        middle = lower.clone() if at_once else self._mean(core, keep, size)
        for groups, values, kept, spare in survivors(core, keep, size):
            here = kept()
            if at_once:
                middle[groups] = values.sum(1) / here.clamp_min(1)
            torch.gt(values, middle[groups, None], out=spare)
            # Those that are not kept are zeros here: they add nothing to a sum, but were counted where zero is above.
            above[groups].add_(spare.sum(1)).sub_((middle[groups] < 0) * (values.shape[1] - here))
            number[groups].add_(here)
            spare.mul_(values)
            upper[groups].add_(spare.sum(1))
            lower[groups].add_(torch.sub(values, spare, out=spare).sum(1))
        low = lower / (number - above).clamp_min(1)
        self.middle.copy_(middle)
        self._settle(low, "offset", "offset_unit", positive=False)
        self._settle(torch.where(above > 0, upper / above.clamp_min(1) - low, 0.0))

    def _mean(self, core: Tensor, keep: Tensor | None, size: int) -> Tensor:
        total, number = survivor_room(core, len(self.scale)), survivor_room(core, len(self.scale))
        for groups, values, kept, _ in survivors(core, keep, size):
            total[groups].add_(values.sum(1))
            number[groups].add_(kept())
        return total / number.clamp_min(1)

    def code(self, core: Tensor) -> Tensor:
        """1 for the upper level, 0 for the lower."""
        if self.form == "sign":
            return (core >= 0).to(core.dtype)
        return (core > spread(self.middle, self.shape, self.group)).to(core.dtype)

    def value(self, code: Tensor) -> Tensor:
        """The two levels."""
        scale = spread(self.scale, self.shape, self.group)
        if self.form == "sign":
            return (2 * code).sub_(1).mul_(scale)
        return (code * scale).add_(spread(self.offset, self.shape, self.group))

    def _tables(self) -> tuple[Tensor, ...]:
        return (self.scale,) if self.form == "sign" else (self.scale, self.middle, self.offset)

    def _snap(self, values: Tensor, place: Tensor, *tables: Tensor) -> None:
        scale, *rest = tables
        if self.form == "sign":
            torch.add(values, 0.0, out=place)  # -0.0 counts as positive
            torch.copysign(scale, place, out=place)
        else:
            middle, offset = rest
            torch.gt(values, middle, out=place).mul_(scale).add_(offset)

    @torch.no_grad()
    def rescale(self, code: Tensor, factor: Tensor) -> Tensor:
        """Multiply s (and the offset)."""
        self._by_channel()
        self._settle(self.scale * factor)
        if self.form == "01":
            self._settle(self.offset * factor, "offset", "offset_unit", positive=False)
            self.middle.copy_(self.offset + self.scale / 2)
        return self.value(code)

    def encode(self, writer: Writer, core: Tensor, keep: Tensor) -> None:
        """Store form, group, scales, bits."""
        writer.integer(FORMS.index(self.form))
        write_group(writer, self.group)
        write_numbers(writer, self.scales, self.scale, self.unit)
        if self.form == "01":
            write_numbers(writer, self.scales, self.offset, self.offset_unit)
        write_codes(writer, self.code(core), keep, 0, 2)

    @classmethod
    def decode(cls, reader: Reader, keep: Tensor, dtype: torch.dtype) -> Tensor:
        """Read them: the core's values."""
        form = FORMS[reader.integer(0, 1)]
        levels = cls(tuple(keep.shape), read_group(reader, keep), form)
        levels.scale = read_numbers(reader, levels.scale.numel())
        if form == "01":
            levels.offset = read_numbers(reader, levels.scale.numel())
        if form == "01":
            return levels.value(read_codes(reader, keep, 0, 2, dtype))
        signs = read_values(reader, keep, torch.tensor([-1.0, 1.0], dtype=dtype))
        return signs.mul_(spread(levels.scale, levels.shape, levels.group))
