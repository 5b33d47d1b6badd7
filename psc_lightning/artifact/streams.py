"""Symbols and integers of methods to bits and back: the two ends of `psc_lightning.symbols`.

How one array is stored: nothing for an empty one. A size above 256 is cut into a plane of high bytes and one of low
bytes, stored one after the other; see `planes`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from psc_lightning.artifact.allowance import Allowance
from psc_lightning.artifact.ans import Coded, Decoder, Encoder, Ints
from psc_lightning.artifact.codings import CODINGS, Grid, Plane
from psc_lightning.artifact.codings.planes import CONSTANT, Found, choose, find
from psc_lightning.artifact.errors import ADVICE, ArtifactError
from psc_lightning.symbols import unzigzag, zigzag

__all__ = ["Stream", "SymbolReader", "SymbolWriter", "stream_of"]

_PLANE = 256
_NARROW, _WIDE = 2, 12  # bytes that a symbol below 257 takes until it is a number, and a larger one


def _room(number: int, size: int) -> int:
    return number * (_NARROW if size <= _PLANE else _WIDE)


@dataclass(frozen=True)
class Stream:
    """One plane as it lies in the file, for the report.

    Attributes:
        number: how many symbols.
        distinct: how many different ones.
        entropy: their order-0 entropy, in bits for all of them.
        coding: name of the coding, `constant` where none was needed.
    """

    number: int
    distinct: int
    entropy: float
    coding: str


def stream_of(histogram: Ints, coding: str) -> Stream:
    """What the report says of a plane with this histogram."""
    present = histogram[histogram > 0]
    number = int(present.sum())
    entropy = float((present * np.log2(number / present)).sum())
    return Stream(number, len(present), entropy, coding)


def _grid(grid: Tensor | None) -> Grid | None:
    return None if grid is None else grid.detach().cpu().reshape(grid.shape[0], -1).numpy()


class SymbolWriter:
    """A `psc_lightning.symbols.Writer` into what one entropy coder makes.

    Args:
        allowance: what reading may take; None: as much as it likes.

    Attributes:
        streams: what was stored so far, for the report.
        bytes: that a reader will hold for it.
    """

    def __init__(self, allowance: Allowance | None = None) -> None:
        self.streams: list[Stream] = []
        self.bytes = 0
        self._encoder = Encoder(allowance)

    @property
    def bits(self) -> float:
        """Exact cost of everything so far: the sum of -log2 p under the models that the file declares."""
        return self._encoder.bits

    @property
    def steps(self) -> int:
        """Those that reading will take so far."""
        return self._encoder.steps

    def integer(self, value: int) -> None:
        """Store one integer in -2^63 … 2^63-1 (its zigzag)."""
        if not -(1 << 63) <= value < 1 << 63:
            raise ValueError(f"an integer to store must fit 64 bits, got {value}")
        self._encoder.integer(zigzag(value), "integer")

    def symbols(self, values: Tensor, size: int, grid: Tensor | None = None) -> None:
        """Store a 1-D tensor of integers in 0 … size-1.

        Args:
            values: the symbols, of any integer type.
            size: 1 … 65536.
            grid: where they are entries of a matrix, row by row: a boolean matrix that marks them. Then symbols are taken
                for numbers around the middle of the alphabet.

        Raises:
            ValueError: a symbol out of range (a method's mistake: it would not come back).
        """
        if not 1 <= size <= _PLANE * _PLANE or values.dim() != 1:
            raise ValueError(f"symbols must be 1-D with 1 <= size <= 65536, got {values.dim()}-D and size {size}")
        if not len(values):
            return
        values = values.detach().cpu()
        low, high = map(int, values.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"symbols must lie in 0 … {size - 1}, got {low} … {high}")
        self.bytes += _room(len(values), size)
        if size > _PLANE:
            self._plane(Plane((values >> 8).to(torch.uint8), (size - 1 >> 8) + 1))
            self._plane(Plane((values & 255).to(torch.uint8), _PLANE))
        else:
            places = _grid(grid)
            assert places is None or np.count_nonzero(places) == len(values)
            self._plane(Plane(values.to(torch.uint8), size, places, size // 2, around=size % 2 == 1))

    def _plane(self, plane: Plane) -> None:
        choice = choose(plane, self._encoder, CODINGS)
        choice.write(self._encoder)
        self.streams.append(stream_of(plane.histogram, choice.coding))

    def finish(self) -> Coded:
        """All of it."""
        return self._encoder.finish()


class SymbolReader:
    """A `psc_lightning.symbols.Reader` of what a `SymbolWriter` wrote.

    Args:
        data: that.
        allowance: what reading may take; None: as much as it likes.

    Attributes:
        streams: what was read so far, for the report.
    """

    def __init__(self, data: Coded, allowance: Allowance | None = None) -> None:
        self.streams: list[Stream] = []
        self._decoder = Decoder(data, allowance)

    @property
    def bits(self) -> float:
        """Exact cost of everything read so far."""
        return self._decoder.bits

    def integer(self, low: int, high: int) -> int:
        """Read one integer in low … high (inclusive).

        Raises:
            ArtifactError: it is not in there.
        """
        value = unzigzag(self._decoder.integer("integer"))
        if not low <= value <= high:
            raise ArtifactError(f"expected an integer in {low} … {high}, found {value}: {ADVICE}")
        return value

    def symbols(self, count: int, size: int, grid: Tensor | None = None) -> Tensor:
        """Read `count` symbols in 0 … size-1 as a 1-D tensor: uint8 where the size is at most 256, else int32.

        Raises:
            ArtifactError: the file says otherwise, or so many are not allowed.
        """
        self._decoder.allowance.hold(_room(count, size))
        if not count:
            return torch.zeros(0, dtype=torch.uint8 if size <= _PLANE else torch.int32)
        if size <= _PLANE:
            return self._plane(count, size, grid).symbols(torch.uint8)
        values = self._plane(count, (size - 1 >> 8) + 1).symbols(torch.int32).bitwise_left_shift_(8)
        values |= self._plane(count, _PLANE).symbols(torch.uint8)
        if int(values.max()) >= size:
            raise ArtifactError(f"expected symbols below {size}, found {int(values.max())}: {ADVICE}")
        return values

    def values(self, count: int, table: Tensor, grid: Tensor | None = None) -> Tensor:
        """Read `count` symbols and give for each its entry of a 1-D table, one to 256 numbers on the CPU.

        Raises:
            ArtifactError: as `symbols`.
        """
        self._decoder.allowance.hold(_room(count, len(table)))
        return self._plane(count, len(table), grid).values(table) if count else table[:0]

    def finish(self) -> None:
        """Check that everything was read and nothing is left.

        Raises:
            ArtifactError: it is not so.
        """
        self._decoder.finish()

    def _plane(self, number: int, size: int, grid: Tensor | None = None) -> Found:
        found = find(self._decoder, number, size, _grid(grid), CODINGS)
        known = found.rest is None
        self.streams.append(
            Stream(number, 1, 0.0, CONSTANT) if known else stream_of(found.histogram(size), found.coding)
        )
        return found
