"""What a coding is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from psc_lightning.artifact.ans import Decoder, Encoder, Ints, Packed, count

__all__ = ["Coding", "Grid", "Plane", "Proposal", "full", "inside", "matrix"]

#: where the symbols lie in a matrix: marked entries, row by row
Grid = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Plane:
    """A non-empty array of symbols, to be coded.

    Attributes:
        symbols: uint8, 0 … size-1.
        size: of the alphabet.
        grid: where they lie, if they are entries of a matrix.
        middle: where the symbols stand for numbers, that of zero, or of the smallest above it.
        around: whether `middle` is zero itself.
    """

    symbols: Tensor
    size: int
    grid: Grid | None = None
    middle: int | None = None
    around: bool = False

    @cached_property
    def histogram(self) -> Ints:
        """How often each symbol is there."""
        return count(self.symbols, self.size)


@dataclass(frozen=True)
class Proposal:
    """One admissible way to code one plane.

    Attributes:
        bits: cost of the symbols, without the parameters.
        parameters: what the reader has to know, non-negative integers.
        write: puts the symbols (not the parameters) into an encoder.
        toll: bits that it must save beside another that is read fast; below 0, what it may cost more than a slower one.
        steps: of work for a reader, beyond a plane's and its integers'.
    """

    bits: float
    parameters: tuple[int, ...]
    write: Callable[[Encoder], None]
    toll: float = 0.0
    steps: int = 0


class Coding(Protocol):
    """A way to code symbols below `size` (2 … 256)."""

    name: str
    limits: tuple[int, ...]  # each parameter is below its limit

    def propose(self, plane: Plane, encoder: Encoder) -> Iterator[Proposal]:
        """Offer ways to code a plane; what integers cost, the encoder knows."""

    def read(
        self, decoder: Decoder, number: int, size: int, parameters: tuple[int, ...], grid: Grid | None
    ) -> Tensor | Packed:
        """Read `number` symbols, still packed, or as a 1-D tensor of integers, uint8 or int32."""


def matrix(plane: Plane) -> npt.NDArray[np.uint8]:
    """A plane's symbols at their places, 0 where there is none."""
    assert plane.grid is not None
    symbols = np.zeros(plane.grid.shape, dtype=np.uint8)
    symbols[plane.grid] = plane.symbols.numpy()
    return symbols


def full(rows: int, columns: int) -> Grid:
    """The grid of all entries of a matrix."""
    return np.ones((rows, columns), dtype=np.bool_)


def inside(grid: Grid, chosen: Tensor) -> Grid:
    """The grid of those of a grid's entries that are chosen."""
    part = np.zeros_like(grid)
    part[grid] = chosen.to(torch.bool).numpy()
    return part
