"""Trained ternary levels: minus n, zero, plus p, both sizes trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from psc_lightning.levels.base import Grouping, Levels, Scales, Shape, read_codes, read_group, write_codes, write_group
from psc_lightning.numerics.asking import Question, answer
from psc_lightning.numerics.functional import give_gradient, group_counts, spread
from psc_lightning.numerics.precision import power_of_two, read_numbers, write_numbers
from psc_lightning.numerics.strips import blank_, strips, survivors
from psc_lightning.symbols import Reader, Writer

__all__ = ["TrainedTernaryLevels"]


class TrainedTernaryLevels(Levels):
    """``x̂ ∈ {-n, 0, p}``: zero where |x| ≤ Δ = 0.7 · mean |x|; n and p are trained.

    Means run over the kept entries of the group. n and p start as the mean |x| below -Δ and above Δ, of a side without such
    entries as the other's. Where all entries are -a, 0 or b already, exactly, n = a and p = b, and Δ is below both.
    Pseudo-gradient: ∂/∂x = g; ∂/∂p = Σ g over the entries above Δ, ∂/∂n = -Σ g over those below -Δ.
    Stored: one of three codes an entry, entropy-coded (at most 1.58 bits); 2 · 16 bits a group for n and p; one exponent.

    Args:
        group: which entries share n, p and Δ: `tensor`, `channel`, or a number of entries in memory order, ≥ 1.
        scales: what n and p are stored as, and rounded to: `float32`, `float16` or `log8`.

    Shapes: see `Levels`.

    >>> levels = TrainedTernaryLevels((1, 5), group="tensor")
    >>> x = torch.tensor([[0.25, -2.0, 1.0, 1.5, -0.25]])
    >>> levels.begin(x); levels.refresh(x)
    >>> levels.hard(x).tolist()
    [[0.0, -2.0, 1.25, 1.25, 0.0]]
    >>> _ = levels.pull(x, torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]]))
    >>> levels.sizes.grad.tolist()  # of n and p
    [[-2.0, 12.0]]

    Source: Zhu et al. 2016, "Trained ternary quantization", eq. 6-8. There Δ = t · max |x|, t = 0.05; ours is that of ternary
    weight networks, which no single entry moves. There ∂/∂x is p · g above Δ and n · g below -Δ; ours leaves out the factor,
    which AdamW cancels.
    """

    code_number = 8
    straight = False
    _snaps = (torch.float32, torch.float64)

    unit: Tensor
    limit: Tensor

    def __init__(self, shape: Shape, group: Grouping = "channel", scales: Scales = "float16") -> None:
        super().__init__(shape, group, scales)
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("limit", torch.ones(self.count))
        self.sizes = nn.Parameter(torch.ones(self.count, 2))  # n and p

    @classmethod
    def trains(cls, options: Mapping[str, Any]) -> bool:
        """n and p."""
        return True

    @torch.no_grad()
    def begin(self, core: Tensor, keep: Tensor | None = None) -> None:
        """Set n and p to the means of the two sides."""
        mean, ends = answer(self._place_limit(core, keep))
        missing, number = torch.zeros_like(ends), torch.zeros_like(ends)
        for strip in survivors(core, keep, self.size):
            at, limit = strip.groups, self.limit[strip.groups, None]
            for side, values in enumerate((-strip.values, strip.values)):
                # From the largest down: the mean of equal numbers is that number, bit for bit.
                below = torch.where(values > limit, ends[at, side, None] - values, 0.0)
                missing[at, side] += below.sum(1)
                number[at, side] += (values > limit).sum(1)
        found = ends - missing / number.clamp_min(1)
        other = torch.where(number.flip(1) > 0, found.flip(1), mean[:, None])
        self._settle(torch.where(number > 0, found, other), "sizes")

    def refreshing(self, core: Tensor, keep: Tensor | None = None) -> Question[None]:
        """Set Δ from the kept entries, and see that the power of two is above n and p, and what they are rounded to."""
        yield from self._place_limit(core, keep)
        self.unit.clamp_(min=power_of_two(self.sizes, self.precision.up))

    def _place_limit(self, core: Tensor, keep: Tensor | None) -> Question[tuple[Tensor, Tensor]]:
        """Set Δ; the mean |x| of each group, and its largest -x and x, at least 0: ``(groups, 2)``."""
        wide = core.dtype if core.element_size() >= 4 else torch.float32
        total, number, low, high = (torch.zeros(self.count, dtype=wide, device=core.device) for _ in range(4))
        for strip in survivors(core, keep, self.size):
            at, values = strip.groups, strip.values
            total[at] += torch.abs(values, out=strip.spare()).sum(1)
            number[at] += strip.number()
            low[at] = torch.maximum(low[at], -values.amin(1))
            high[at] = torch.maximum(high[at], values.amax(1))
        mean, smaller = total / number.clamp_min(1), torch.minimum(low, high)
        limit = (0.7 * mean).float()
        lost = (smaller > 0) & (smaller <= limit)  # all of a side would be zero
        if (yield lost.any()):
            for strip in survivors(core, keep, self.size):
                at, values = strip.groups, strip.values
                level = (values == high[at, None]) | (values == -low[at, None]) | (values == 0)
                lost[at] &= level.all(1)
            limit = torch.where(lost, (smaller / 2).float(), limit)
        self.limit.copy_(limit)
        return mean, torch.stack((low, high), 1)

    def _rounded(self) -> Tensor:
        return self.precision.round(self.sizes.detach(), self.unit)

    def code(self, core: Tensor) -> Tensor:
        """-1, 0, 1."""
        return core.sign() * (core.abs() > spread(self.limit, self.shape, self.group))

    def value(self, code: Tensor) -> Tensor:
        """-n, 0, p."""
        return _value(code, self._rounded(), self.group)

    def _tables(self) -> list[Tensor]:
        return [self.limit, *self._rounded().unbind(1)]

    def _snap(self, values: Tensor, place: Tensor, *tables: Tensor) -> None:
        limit, n, p = tables
        torch.gt(values, limit, out=place).mul_(p).sub_(n * (values < -limit))

    @torch.no_grad()
    def pull(self, core: Tensor, gradient: Tensor, keep: Tensor | None = None, strength: float = 1.0) -> Tensor:
        """The gradient itself; n and p get theirs."""
        # Sums of a fixed order, as exact as the device has them.
        wide = torch.float64 if core.device.type == "cpu" else torch.float32
        total = torch.zeros(self.count, 2, dtype=wide, device=core.device)
        # Where all lie alike, the strips of both are those of the same entries.
        marks = None if keep is None else keep.contiguous()
        pairs = zip(strips(core.contiguous(), self.size, marks), strips(gradient.contiguous(), self.size))
        for (at, values, kept, _), (_, terms, _, _) in pairs:
            limit = self.limit[at, None]
            for side, there in enumerate((values < -limit, values > limit)):
                if kept is not None:
                    there &= kept
                total[at, side] += blank_(terms, there, torch.empty_like(terms)).sum(1, dtype=wide)
        total[:, 0].neg_()
        give_gradient(self.sizes, strength * total.to(self.sizes.dtype))
        return gradient

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
        """Multiply n and p."""
        self._by_channel()
        self._settle(self._rounded() * factor[:, None], "sizes")
        self.limit.copy_(self.sizes.amin(1) / 2)
        return self.value(code)

    def encode(self, writer: Writer, core: Tensor, keep: Tensor) -> None:
        """Store group, n and p of each group, codes."""
        write_group(writer, self.group)
        write_numbers(writer, self.scales, self._rounded(), self.unit)
        write_codes(writer, self.code(core), keep, -1, 3)

    @classmethod
    def decode(cls, reader: Reader, keep: Tensor, dtype: torch.dtype) -> Tensor:
        """Read them: the core's values."""
        group = read_group(reader, keep)
        count, _ = group_counts(tuple(keep.shape), group)
        sizes = read_numbers(reader, 2 * count).reshape(count, 2)
        return _value(read_codes(reader, keep, -1, 3, dtype), sizes, group)


def _value(code: Tensor, sizes: Tensor, group: str | int) -> Tensor:
    n, p = (spread(column, tuple(code.shape), group) for column in sizes.unbind(1))
    return torch.where(code > 0, p, n).mul(code).add_(0.0)
