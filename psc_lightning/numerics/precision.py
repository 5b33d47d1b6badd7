"""What scales, centroids and leftovers are stored as: float32, float16, or 8 bits on a logarithmic grid.

A few numbers that many weights share: each tensor's are kept beside a power of two, its *unit*, so that narrow types have
their range where the numbers are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from psc_lightning.numerics.bits import read_bits, write_bits
from psc_lightning.symbols import Reader, Writer

__all__ = ["PRECISIONS", "Precision", "Rounding", "on", "power_of_two", "read_numbers", "write_numbers"]

_STEPS = 8  # of an octave
_TOP = 127  # magnitudes
_EXPONENTS = range(-100, 101)  # of a unit
_GRID = tuple(2.0 ** ((j - _TOP + 1) / _STEPS) for j in range(_TOP))  # in float64, so that every float32 is the same
_STRIDE = 1024  # a precision's number and a unit's exponent make one integer


@cache
@torch.inference_mode(False)
def on(device: torch.device, numbers: tuple[float, ...]) -> Tensor:
    """A table in float32, where it is used; it is brought to a device once, since that is a wait."""
    return torch.tensor(numbers, dtype=torch.float32).to(device)


class Precision(Protocol):
    """One way to store numbers."""

    number: int  # in files
    up: float  #: the least share of a power of two, in float32, that is rounded up to it

    def round(self, values: Tensor, unit: Tensor | float, positive: bool = True) -> Tensor:
        """What comes back, in float32; never 0 where it must be `positive`, never -0.0, never infinite."""

    def write(self, writer: Writer, values: Tensor, unit: Tensor | float) -> None:
        """Store numbers that `round` made."""

    def read(self, reader: Reader, count: int, unit: float) -> Tensor:
        """Read them, as a 1-D float32 tensor."""


class Single:
    """float32, as they are.

    Stored: 32 bits a number, entropy-coded a byte at a time.

    >>> Single().round(torch.tensor([0.1, 0.0]), 1.0).tolist()
    [0.10000000149011612, 1.1754943508222875e-38]
    """

    number, up = 2, 1.0

    def round(self, values: Tensor, unit: Tensor | float, positive: bool = True) -> Tensor:
        """Themselves."""
        limits = torch.finfo(torch.float32)
        return values.to(torch.float32).clamp(limits.tiny if positive else limits.min, limits.max) + 0.0

    def write(self, writer: Writer, values: Tensor, unit: Tensor | float) -> None:
        """Store their bits."""
        write_bits(writer, values)

    def read(self, reader: Reader, count: int, unit: float) -> Tensor:
        """Read them."""
        return read_bits(reader, count, torch.float32)


class Half:
    """A float16 times the unit.

    Stored: 16 bits a number, entropy-coded a byte at a time.

    >>> Half().round(torch.tensor([0.1, 0.0]), 1.0).tolist()
    [0.0999755859375, 5.960464477539063e-08]
    """

    number, up = 0, 1 - 2.0**-12

    def round(self, values: Tensor, unit: Tensor | float, positive: bool = True) -> Tensor:
        """The nearest."""
        halves = (values / unit).to(torch.float16).to(torch.float32)
        halves = halves.clamp(2.0**-24, 65504.0) if positive else halves.clamp(-65504.0, 65504.0) + 0.0
        return halves * unit

    def write(self, writer: Writer, values: Tensor, unit: Tensor | float) -> None:
        """Store their bits."""
        bits = (values / unit).to(torch.float16).reshape(-1).cpu().view(torch.int16)
        writer.symbols(bits.to(torch.int32) & 0xFFFF, 65536)

    def read(self, reader: Reader, count: int, unit: float) -> Tensor:
        """Read them."""
        bits = reader.symbols(count, 65536).numpy().astype(np.uint16)  # there may be one a weight: no copy too many
        return torch.from_numpy(bits.view(np.float16)).to(torch.float32).mul_(unit)


class Log8:
    """0 or ±2^(j/8) times the unit, j = -126 … 0: within 4.5 % over sixteen octaves; what is smaller becomes zero.

    Stored: at most 8 bits a number, entropy-coded: 127, plus or minus 1 … 127 for a magnitude, plus 0 for zero.

    >>> Log8().round(torch.tensor([0.1, -0.75, 0.0]), 1.0, positive=False).tolist()
    [0.09638817608356476, -0.7711054086685181, 0.0]
    >>> Log8().round(torch.tensor([0.0]), 1.0).tolist()
    [1.8145859939977527e-05]

    Source: Miyashita et al. 2016, "Convolutional neural networks using logarithmic data representation" (base 2^(1/8)).
    """

    number = 1

    def __init__(self) -> None:
        table = self._table(torch.empty(0))
        self.up = float(torch.nextafter((table[-1] + table[-2]) / 2, table[-1]))

    def _table(self, values: Tensor) -> Tensor:
        return on(values.device, _GRID)

    def _codes(self, values: Tensor, unit: Tensor | float) -> Tensor:
        """-127 … 127, the nearest; halves of the smallest and below are 0."""
        table = self._table(values)
        edges = torch.cat((table[:1] / 2, (table[1:] + table[:-1]) / 2))
        return torch.bucketize((values.abs() / unit).contiguous(), edges, out_int32=True) * values.sign().int()

    def _values(self, codes: Tensor, unit: Tensor | float) -> Tensor:
        table = torch.cat((torch.zeros(1, device=codes.device), self._table(codes)))
        magnitudes = table.index_select(0, codes.abs().reshape(-1)).reshape(codes.shape)
        return codes.sign() * magnitudes * unit + 0.0

    def round(self, values: Tensor, unit: Tensor | float, positive: bool = True) -> Tensor:
        """The nearest."""
        codes = self._codes(values.to(torch.float32), unit)
        return self._values(codes.clamp_min(1) if positive else codes, unit)

    def write(self, writer: Writer, values: Tensor, unit: Tensor | float) -> None:
        """Store their codes."""
        codes = self._codes(values, unit).reshape(-1).cpu() + _TOP
        writer.symbols(codes.to(torch.uint8), 2 * _TOP + 1)

    def read(self, reader: Reader, count: int, unit: float) -> Tensor:
        """Read them."""
        return self._values(reader.symbols(count, 2 * _TOP + 1).to(torch.int32) - _TOP, unit)


#: the names in arguments; the numbers in files never change their meaning
PRECISIONS: dict[str, Precision] = {"float32": Single(), "float16": Half(), "log8": Log8()}


@cache
def _edges_and_powers(device: torch.device, up: float) -> tuple[Tensor, Tensor]:
    """A magnitude that reaches n of the edges has the n-th power: none of them zero, all what is not a number."""
    edges = (2.0**-149, *(up * 2.0**e for e in _EXPONENTS[:-1]), math.inf)
    return on(device, edges), on(device, (1.0, *(2.0**e for e in _EXPONENTS), 1.0))


def power_of_two(values: Tensor, up: float = 1.0) -> Tensor:
    """The power of two just above the largest magnitude (1.0 where all are zero), kept in a normal float's range.

    Args:
        values: of any shape.
        up: the share of a power of two from which a number counts as that power: a precision's, for the unit of what it
            makes of the numbers. (The largest may be rounded up to the power itself. Then the next one is the unit, as it
            will be for those who start from what was rounded: they find the same again.)

    >>> power_of_two(torch.tensor([0.3, -5.0])).item(), power_of_two(torch.zeros(2)).item()
    (8.0, 1.0)
    >>> almost = torch.tensor([0.9999])
    >>> power_of_two(almost).item(), power_of_two(almost, PRECISIONS["float16"].up).item()
    (1.0, 2.0)
    """
    if not values.numel():
        return on(values.device, (1.0,)).reshape(())
    # Not by its exponent: a number in hand is a wait for the device, and CUDA's exp2 need not be exact.
    return _powers_above(values.detach().abs().amax(), up)


def _powers_above(sizes: Tensor, up: float) -> Tensor:
    edges, powers = _edges_and_powers(sizes.device, up)
    return powers.take(torch.bucketize(sizes.to(torch.float32), edges, right=True))


@dataclass(frozen=True)
class Rounding:
    """Round numbers that share a unit to what a file holds: a task (see `asking`).

    Attributes:
        values: one or more.
        precision: how.
        into: where to write them, of the same shape.
        unit: where to write their power of two.
        positive: whether they must be above 0.

    >>> rounding = Rounding(torch.tensor([0.1, 0.75]), PRECISIONS["log8"], torch.empty(2), torch.empty(()))
    >>> rounding.do(); rounding.into.tolist(), rounding.unit.item()
    ([0.09638817608356476, 0.7711054086685181], 1.0)
    """

    values: Tensor
    precision: Precision
    into: Tensor
    unit: Tensor
    positive: bool = True

    @property
    def device(self) -> torch.device:
        """Where it is written."""
        return self.into.device

    def do(self) -> None:
        """Do it."""
        self.unit.copy_(power_of_two(self.values, self.precision.up))
        self.into.copy_(self.precision.round(self.values, self.unit, self.positive))

    @staticmethod
    def do_all(tasks: list[Rounding]) -> None:
        """All of a precision as one long row."""
        kinds: dict[tuple[object, ...], list[Rounding]] = {}
        for task in tasks:
            kinds.setdefault((task.device, task.values.dtype, task.precision, task.positive), []).append(task)
        for those in kinds.values():
            rows, how = [task.values.detach().reshape(-1) for task in those], those[0].precision
            powers = _powers_above(torch.stack(torch._foreach_norm(rows, math.inf)), how.up)
            units = torch.cat([power.expand(len(row)) for power, row in zip(powers.unbind(), rows, strict=True)])
            parts = torch.split(how.round(torch.cat(rows), units, those[0].positive), [len(row) for row in rows])
            made = [part.view(task.into.shape) for part, task in zip(parts, those, strict=True)]
            torch._foreach_copy_([task.into for task in those], made)
            torch._foreach_copy_([task.unit for task in those], list(powers.unbind()))


def write_numbers(writer: Writer, precision: str, values: Tensor, unit: Tensor | float) -> None:
    """Store numbers that their precision's `round` made, with the precision and the unit's exponent: n · 1024 + e."""
    how = PRECISIONS[precision]
    writer.integer(how.number * _STRIDE + math.frexp(float(unit))[1] - 1)
    how.write(writer, values.detach().cpu(), float(unit))


def read_numbers(reader: Reader, count: int) -> Tensor:
    """Read them back, as float32; a file with an infinite or undefined number is refused."""
    kinds = {how.number: how for how in PRECISIONS.values()}
    number, exponent = divmod(reader.integer(-100, max(kinds) * _STRIDE + 100) + _STRIDE // 2, _STRIDE)
    exponent -= _STRIDE // 2
    if abs(exponent) > 100:
        raise ValueError(f"expected a scale's exponent in -100 … 100, found {exponent}")
    values = kinds[number].read(reader, count, math.ldexp(1.0, exponent))
    if not bool(values.isfinite().all()):
        raise ValueError("a stored scale is not a finite number")
    return values
