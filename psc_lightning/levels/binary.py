"""Binary levels: two values a group."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from psc_lightning.levels.base import (
    Grouping,
    Levels,
    Scales,
    Shape,
    read_codes,
    read_group,
    read_values,
    write_codes,
    write_group,
)
from psc_lightning.numerics.functional import spread
from psc_lightning.numerics.precision import read_numbers, write_numbers
from psc_lightning.numerics.strips import Survivors
from psc_lightning.options import one_of
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

    Shapes: see `Levels`.

    >>> levels = BinaryLevels((1, 4), group="tensor")
    >>> x = torch.tensor([[0.5, -1.5, 1.0, -1.0]])
    >>> levels.refresh(x)
    >>> levels.hard(x).tolist()
    [[1.0, -1.0, 1.0, -1.0]]
    >>> levels = BinaryLevels((1, 4), group="tensor", form="01")
    >>> levels.refresh(x)
    >>> levels.hard(x).tolist()
    [[0.75, -1.25, 0.75, -1.25]]

    Source: Rastegari et al. 2016, "XNOR-Net", eq. 6 (scale); Courbariaux et al. 2015, "BinaryConnect" (straight-through);
    0/1 with scale and offset: the project's method description ("binary parameter sharing").
    """

    code_number = 3
    zero = False
    _snaps = (torch.float32, torch.float64)

    unit: Tensor
    scale: Tensor
    offset_unit: Tensor
    offset: Tensor
    middle: Tensor

    def __init__(
        self,
        shape: Shape,
        group: Grouping = "channel",
        form: Annotated[str, partial(one_of, allowed=FORMS)] = "sign",
        scales: Scales = "float16",
    ) -> None:
        super().__init__(shape, group, scales)
        self.form = form
        self.passes = 1 if form == "sign" else 2  # the middle first, then the means on its two sides
        self.tables = (
            {"scale": "unit"} if form == "sign" else {"middle": None, "offset": "offset_unit", "scale": "unit"}
        )
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("scale", torch.ones(self.count))
        if form == "01":
            self.register_buffer("offset_unit", torch.ones(()))
            self.register_buffer("offset", torch.zeros(self.count))
            self.register_buffer("middle", torch.zeros(self.count))

    def _sums(self, index: int, strip: Survivors, *found: Tensor) -> tuple[Tensor, ...]:
        values, spare = strip.values, strip.spare()
        if self.form == "sign":
            return torch.abs(values, out=spare).sum(1), strip.number()
        if index == 0:
            return values.sum(1), strip.number()
        (middle,), number = found, strip.number()
        torch.gt(values, middle[:, None], out=spare)
        # Those that are not kept are zeros here: they add nothing to a sum, but are counted where zero is above.
        above = spare.sum(1) - (middle < 0) * (values.shape[1] - number)
        upper = spare.mul_(values).sum(1)
        return upper, above, torch.sub(values, spare, out=spare).sum(1), number - above

    def _found(self, index: int, *sums: Tensor) -> tuple[Tensor, ...]:
        total, number, *others = sums
        mean = total / number.clamp_min(1)
        if not others:
            return (mean,)
        lower, below = others
        low = lower / below.clamp_min(1)
        return low, torch.where(number > 0, mean - low, 0.0)

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

    def _snap(self, values: Tensor, place: Tensor, *tables: Tensor) -> None:
        if self.form == "sign":
            (scale,) = tables
            torch.add(values, 0.0, out=place)  # -0.0 counts as positive
            torch.copysign(scale, place, out=place)
        else:
            middle, offset, scale = tables
            torch.gt(values, middle, out=place).mul_(scale).add_(offset)

    @torch.no_grad()
    def rescale(self, code: Tensor, factor: Tensor) -> Tensor:
        """Multiply s (and the offset)."""
        self._by_channel()
        self._settle(self.scale * factor)
        if self.form == "01":
            self._settle(self.offset * factor, "offset", "offset_unit")
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
