"""Logarithmic levels: zero and powers of a base."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from psc_lightning.levels.base import Grouping, Levels, Shape, largest, read_codes, read_group, write_codes, write_group
from psc_lightning.numerics.functional import spread
from psc_lightning.numerics.precision import on
from psc_lightning.numerics.strips import Survivors
from psc_lightning.options import one_of, whole
from psc_lightning.symbols import Reader, Writer

__all__ = ["ROOTS", "LogLevels"]

#: roots of two that square roots alone can form, so that every machine has the same table
ROOTS = (1, 2, 4, 8)

_BIAS = 127  # of a float32's exponent
_FRACTION = 0x7FFFFF  # its bits
_LOWEST = -126  # exponent of the smallest normal float32: below it a weight becomes zero


def _root_of_two(n: int) -> float:
    """2^(1/n) for n a power of two."""
    base = 2.0
    while n > 1:
        base, n = math.sqrt(base), n // 2
    return base


class LogLevels(Levels):
    """``x̂ ∈ {0, ±b^e}`` with b = 2^(1/root): the nearest power in the logarithm, e ≤ ⌈log_b max|x|⌋ of the group.

    2^(bits-1) - 1 magnitudes below the largest; what is smaller becomes zero. Pseudo-gradient: ∂/∂x = g.
    Stored: a code of at most `bits` bits an entry, entropy-coded; one exponent a group. No scale: base 2 multiplies by
    shifts.

    Args:
        bits: 2 … 8.
        group: which entries share their largest exponent.
        root: 1, 2, 4 or 8: the base is 2, √2, 2^¼, 2^⅛.

    Shapes: see `Levels`.

    >>> levels = LogLevels((1, 4), bits=3, group="tensor")
    >>> x = torch.tensor([[3.0, -1.3, 0.4, 5.0]])
    >>> levels.refresh(x)
    >>> levels.hard(x).tolist()
    [[4.0, -1.0, 0.0, 4.0]]

    Source: Miyashita et al. 2016, "Convolutional neural networks using logarithmic data representation", eq. 4-7; found
    here by exact comparisons of the mantissa, since a logarithm's last bit depends on the machine.
    """

    code_number = 5
    passes = 1
    reads_only = True
    _join = staticmethod(torch.maximum)
    _snaps = (torch.float32,)

    highest: Tensor

    def __init__(
        self,
        shape: Shape,
        bits: Annotated[int, partial(whole, low=2, high=8)] = 8,
        group: Grouping = "channel",
        root: Annotated[int, partial(one_of, allowed=ROOTS)] = 1,
    ) -> None:
        super().__init__(shape, group)
        self.bits, self.root = bits, root
        self.top = 2 ** (bits - 1) - 1
        step, half = _root_of_two(root), _root_of_two(2 * root)
        self.fractions = [step**j for j in range(root)]
        self.edges = [half * step**j for j in range(root)]
        self.tables = {"highest": None}
        self.register_buffer("highest", torch.zeros(self.count, dtype=torch.int32))

    def _position(self, magnitude: Tensor) -> Tensor:
        """root · log2, rounded to the nearest whole number; a very low one for zero."""
        mantissa, exponent = torch.frexp(magnitude)
        edges = on(magnitude.device, tuple(self.edges)) if magnitude.dtype == torch.float32 else None
        if edges is None:  # no core on a device
            edges = torch.tensor(self.edges, dtype=magnitude.dtype).to(magnitude.device)
        # contiguous, else torch warns: the weight of a transposed convolution arrives permuted
        above = torch.bucketize((2 * mantissa).contiguous(), edges, out_int32=True)
        position = (exponent - 1) * self.root + above
        out: Tensor = torch.where(magnitude > 0, position, torch.full_like(position, _LOWEST * self.root - 1))
        return out

    def _sums(self, index: int, strip: Survivors, *found: Tensor) -> tuple[Tensor, ...]:
        return (largest(strip),)

    def _found(self, index: int, *sums: Tensor) -> tuple[Tensor, ...]:
        # At most 2^126, far from overflow; at least the smallest normal number.
        return (self._position(sums[0]).clamp(_LOWEST * self.root, 126 * self.root),)

    def code(self, core: Tensor) -> Tensor:
        """0, or the sign times 1 … m, m the largest magnitude."""
        position = self._position(core.abs())
        below = spread(self.highest, self.shape, self.group) - position
        size: Tensor = (self.top - below).clamp(0, self.top) * (position >= _LOWEST * self.root)
        return core.sign() * size

    def value(self, code: Tensor) -> Tensor:
        """±b^e, put together from its bits."""
        position = code.abs().int() - self.top + spread(self.highest, self.shape, self.group)
        octave = torch.div(position, self.root, rounding_mode="floor").clamp(_LOWEST, 127)
        power = ((octave + 127) << 23).view(torch.float32)
        if self.root > 1:
            table = on(code.device, tuple(self.fractions))
            power = power * table.index_select(0, (position % self.root).reshape(-1)).reshape(position.shape)
        return code.sign() * power + 0.0

    @property
    def rungs(self) -> int:
        """2^(bits-1) - 1."""
        return int(self.top)

    def ladder(self, core: Tensor) -> tuple[Tensor, Tensor]:
        """``1 + root · log2(|x|/lowest)``, down to 1/2; linear below it."""
        lowest = torch.exp2((spread(self.highest, self.shape, self.group) - (self.top - 1)) / self.root)
        edge = lowest / _root_of_two(2 * self.root)
        size = core.abs()
        above = size > edge
        power = torch.where(above, size, lowest)
        place = torch.where(above, 1 + self.root * (power / lowest).log2(), size / (2 * edge))
        return core.sign() * place, torch.where(above, self.root / (math.log(2) * power), 1 / (2 * edge))

    def _snap(self, values: Tensor, place: Tensor, *tables: Tensor) -> None:
        # The same as `code` and `value`, on the bits of float32: sign, eight of the exponent (biased), 23 of the fraction.
        (highest,) = tables
        lowest = (highest - (self.top - 1)).clamp_min_(_LOWEST * self.root) + _BIAS * self.root
        highest = highest + _BIAS * self.root
        source, bits = values.view(torch.int32), place.view(torch.int32)
        edges = [int(edge) & _FRACTION for edge in torch.tensor(self.edges, dtype=torch.float32).view(torch.int32)]
        marks = torch.empty_like(bits)
        torch.bitwise_and(source, 0x7FFFFFFF, out=bits)
        # Below the smallest normal number only what is nearer to it than to the next level counts as that number.
        bits.mul_(torch.ge(bits, math.floor(self.edges[-1] * 2**22) + 1, out=marks))
        if self.root == 1:
            bits.add_(_FRACTION - edges[0]).bitwise_right_shift_(23)  # above the edge, it carries
        else:
            fraction = bits & _FRACTION
            bits.bitwise_right_shift_(23).mul_(self.root)
            for edge in edges:
                bits.add_(torch.gt(fraction, edge, out=marks))
        torch.ge(bits, lowest, out=marks)
        torch.minimum(bits, highest, out=bits)
        if self.root == 1:
            bits.bitwise_left_shift_(23)
        else:
            table = on(values.device, tuple(self.fractions))
            steps = table.index_select(0, (bits & (self.root - 1)).view(-1)).view(values.shape)
            bits.bitwise_right_shift_(ROOTS.index(self.root)).bitwise_left_shift_(23)
            place.mul_(steps)
        bits.mul_(marks)
        bits.bitwise_or_(torch.bitwise_and(source, -0x80000000, out=marks))
        place.add_(0.0)

    def encode(self, writer: Writer, core: Tensor, keep: Tensor) -> None:
        """Store bits, root, group, exponents, codes."""
        writer.integer(self.bits)
        writer.integer(ROOTS.index(self.root))
        write_group(writer, self.group)
        lowest = int(self.highest.min())
        writer.integer(lowest)
        writer.symbols((self.highest - lowest).cpu(), 4096)
        write_codes(writer, self.code(core), keep, -self.top, 2 * self.top + 1)

    @classmethod
    def decode(cls, reader: Reader, keep: Tensor, dtype: torch.dtype) -> Tensor:
        """Read them: the core's values."""
        bits, root = reader.integer(2, 8), ROOTS[reader.integer(0, len(ROOTS) - 1)]
        levels = cls(tuple(keep.shape), bits, read_group(reader, keep), root)
        lowest = reader.integer(_LOWEST * root, 126 * root)
        levels.highest = (reader.symbols(levels.highest.numel(), 4096) + lowest).to(torch.int32)
        code = read_codes(reader, keep, -levels.top, 2 * levels.top + 1, dtype)
        position = (code.abs() - levels.top + spread(levels.highest, levels.shape, levels.group))[code != 0]
        if position.numel() and not _LOWEST * root <= position.min() <= position.max() <= 126 * root:
            raise ValueError("expected powers of two from 2^-126 to 2^126, found others")
        return levels.value(code).to(dtype)
