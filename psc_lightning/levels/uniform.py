"""Uniform levels: a grid of equal steps around zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from psc_lightning.levels.base import (
    Grouping,
    Levels,
    Scales,
    Shape,
    largest,
    read_codes,
    read_group,
    read_values,
    write_codes,
    write_group,
)
from psc_lightning.numerics.functional import give_gradient, split, spread, survivor_magnitude
from psc_lightning.numerics.grid import grid_steps
from psc_lightning.numerics.precision import power_of_two, read_numbers, write_numbers
from psc_lightning.numerics.strips import Survivors, blank_
from psc_lightning.options import one_of, whole
from psc_lightning.symbols import Reader, Writer

__all__ = ["UniformLevels"]


class UniformLevels(Levels):
    """``x̂ = s · clamp(round(x/s), -m, m)`` with m = 2^(bits-1) - 1: at most 2^bits - 1 levels a group, 255 at 8 bits.

    One bit has no room for zero: x̂ = ±s. The step s = max|x| / m over the kept entries (mean |x| at one bit).
    Pseudo-gradient: ∂/∂x = g. With `learned_step` (LSQ) s is trained: ∂/∂x = g·[|x/s| ≤ m], ∂/∂s = g·(round(x/s) - x/s)
    inside and ±m·g outside; s starts at 2·mean|x|/√m, or where the entries lie on a grid already, at its step.
    Stored: a code of at most `bits` bits an entry, entropy-coded; 16 bits a group for s; one exponent.

    Args:
        bits: 1 … 8.
        group: which entries share s.
        learned_step: train s, by the plugin's own AdamW (`step_lr`).
        scales: what s is stored as, and rounded to: `float32`, `float16` or `log8`.

    Shapes: see `Levels`.

    >>> levels = UniformLevels((1, 4), bits=3, group="tensor")
    >>> x = torch.tensor([[0.1, -0.75, 0.4, 0.5]])
    >>> levels.refresh(x)
    >>> levels.hard(x).tolist(), levels.pull(x, torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist()
    ([[0.0, -0.75, 0.5, 0.5]], [[1.0, 2.0, 3.0, 4.0]])

    Source: Jacob et al. 2018 (symmetric, per channel); Esser et al. 2020, "Learned step size quantization", eq. 1-3; ours
    leaves out LSQ's gradient scale, which AdamW cancels, and rounds s to a float16 times a power of two.
    """

    code_number = 2
    _snaps = (torch.float32, torch.float64)

    unit: Tensor
    scale: Tensor

    def __init__(
        self,
        shape: Shape,
        bits: Annotated[int, partial(whole, low=1, high=8)] = 8,
        group: Grouping = "channel",
        learned_step: Annotated[bool, partial(one_of, allowed=(True, False))] = False,
        scales: Scales = "float16",
    ) -> None:
        super().__init__(shape, group, scales)
        self.bits, self.learned_step = bits, learned_step
        self.straight, self.passes = not learned_step, int(not learned_step)
        self.top = max(1, 2 ** (bits - 1) - 1)
        self._join, self.reads_only = (torch.add, False) if bits == 1 else (torch.maximum, True)
        self.register_buffer("unit", torch.ones(()))
        if learned_step:
            self.step = nn.Parameter(torch.ones(self.count))
        else:
            self.tables = {"scale": "unit"}
            self.register_buffer("scale", torch.ones(self.count))

    @classmethod
    def trains(cls, options: Mapping[str, Any]) -> bool:
        """The step, where it is learned."""
        return bool(options.get("learned_step", False))

    @torch.no_grad()
    def begin(self, core: Tensor, keep: Tensor | None = None) -> None:
        """Set the learned step and its power of two: of a group that lies on a grid already, that grid's step."""
        if not self.learned_step:
            return
        step = 2 * survivor_magnitude(core, keep, self.group) / self.top**0.5
        if keep is None:
            keep = torch.ones_like(core, dtype=torch.bool)
        rows, marks = split(core.detach().cpu(), self.group), split(keep.cpu(), self.group)
        rows = rows if rows.element_size() >= 4 else rows.float()
        for i, (row, kept) in enumerate(zip(rows.numpy(), marks.numpy())):
            for found in grid_steps(row[kept], self.top, zero=self.bits > 1):
                exact = torch.tensor([found])
                if torch.equal(self.precision.round(exact, power_of_two(exact)), exact):
                    step[i] = found
                    break
        self._settle(step, "step")

    def _measured(self, core: Tensor, keep: Tensor | None) -> Sequence[Tensor]:
        # A learned step is no statistic: its power of two is seen to be above it.
        if self.learned_step:
            self.unit.clamp_(min=power_of_two(self.step))
        return super()._measured(core, keep)

    def _sums(self, index: int, strip: Survivors, *found: Tensor) -> tuple[Tensor, ...]:
        if self.bits == 1:
            return torch.abs(strip.values, out=strip.spare()).sum(1), strip.number()
        return (largest(strip),)

    def _found(self, index: int, *sums: Tensor) -> tuple[Tensor, ...]:
        return (sums[0] / (sums[1].clamp_min(1) if self.bits == 1 else self.top),)

    def _scale(self) -> Tensor:
        return self.precision.round(self.step.detach(), self.unit) if self.learned_step else self.scale

    def _round(self, ratio: Tensor) -> Tensor:
        if self.bits == 1:
            return torch.where(ratio >= 0, 1.0, -1.0).to(ratio.dtype)
        return ratio.round().clamp_(-self.top, self.top)

    def code(self, core: Tensor) -> Tensor:
        """round(x/s), from -m to m."""
        return self._round(core / spread(self._scale(), self.shape, self.group))

    def value(self, code: Tensor) -> Tensor:
        """code · s."""
        return (code * spread(self._scale(), self.shape, self.group)).add_(0.0)

    def _tables(self) -> list[Tensor]:
        return [self._scale()]

    def _snap(self, values: Tensor, place: Tensor, *tables: Tensor) -> None:
        (scale,) = tables
        torch.div(values, scale, out=place)
        if self.bits == 1:
            place.ge_(0).mul_(2).sub_(1)
        else:
            place.round_().clamp_(-self.top, self.top)
        place.mul_(scale).add_(0.0)

    @torch.no_grad()
    def pull(self, core: Tensor, gradient: Tensor, keep: Tensor | None = None, strength: float = 1.0) -> Tensor:
        """The core's gradient, and the step's, as the class says."""
        if not self.learned_step:
            return gradient
        ratio = core / spread(self._scale(), self.shape, self.group)
        inside = ratio.abs() <= self.top
        slope = (self._round(ratio) - torch.where(inside, ratio, 0.0)).mul_(gradient)
        inside = inside if keep is None else inside | ~keep
        give_gradient(self.step, strength * split(blank_(slope, keep), self.group).sum(1).to(self.step.dtype))
        return torch.where(inside, gradient, 0.0 if strength == 1 else (1 - strength) * gradient)

    @property
    def rungs(self) -> int:
        """m; at one bit there is no zero."""
        return self.top if self.bits > 1 else 0

    @property
    def follows_scale(self) -> bool:
        """Unless the step is learned."""
        return not self.learned_step

    def ladder(self, core: Tensor) -> tuple[Tensor, Tensor]:
        """x/s, and 1/s."""
        if self.bits == 1:
            return super().ladder(core)
        slope = spread(self._scale(), self.shape, self.group).reciprocal()
        return core * slope, slope

    @torch.no_grad()
    def rescale(self, code: Tensor, factor: Tensor) -> Tensor:
        """Multiply s."""
        self._by_channel()
        self._settle(self._scale() * factor, "step" if self.learned_step else "scale")
        return self.value(code)

    def encode(self, writer: Writer, core: Tensor, keep: Tensor) -> None:
        """Store bits, group, steps, codes."""
        writer.integer(self.bits)
        write_group(writer, self.group)
        write_numbers(writer, self.scales, self._scale().detach(), self.unit)
        codes = self.code(core)
        if self.bits == 1:
            write_codes(writer, (codes + 1) / 2, keep, 0, 2)
        else:
            write_codes(writer, codes, keep, -self.top, 2 * self.top + 1)

    @classmethod
    def decode(cls, reader: Reader, keep: Tensor, dtype: torch.dtype) -> Tensor:
        """Read them: the core's values."""
        levels = cls(tuple(keep.shape), reader.integer(1, 8), read_group(reader, keep))
        levels.scale = read_numbers(reader, levels.scale.numel())
        if levels.bits == 1:
            return levels.value(read_values(reader, keep, torch.tensor([-1.0, 1.0], dtype=dtype)))
        return levels.value(read_codes(reader, keep, -levels.top, 2 * levels.top + 1, dtype))
