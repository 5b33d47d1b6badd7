"""What a method may store: a few integers and arrays of symbols.

A method never sees bytes. It hands its numbers to a `Writer` and asks a `Reader` for them in the same order; how they
become bytes (bit-packing, entropy coding, contexts) is the artifact's business alone, so a new method needs no change
there.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["Reader", "Writer"]


class Writer(Protocol):
    """Takes what a method stores."""

    def integer(self, value: int) -> None:
        """Store one small signed integer (a rank, an exponent, a method's code)."""

    def symbols(self, values: Tensor, size: int, grid: Tensor | None = None) -> None:
        """Store a 1-D int32 tensor with entries in 0 … size-1 (1 ≤ size ≤ 65536); near numbers mean near values.

        Where they are entries of a matrix, row by row, `grid` marks which: their places may mean something, too.
        """


class Reader(Protocol):
    """Gives it back, in the same order. Every number is checked against its range: a file is not to be trusted."""

    def integer(self, low: int, high: int) -> int:
        """Read one integer in low … high (inclusive)."""

    def symbols(self, count: int, size: int, grid: Tensor | None = None) -> Tensor:
        """Read `count` symbols below `size`, as a 1-D int32 tensor; `grid` as the writer had it."""
