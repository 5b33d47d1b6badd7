"""What a method may store: a few integers and arrays of symbols.

A method never sees bytes. It hands its numbers to a `Writer` and asks a `Reader` for them in the same order; how they
become bytes (bit-packing, entropy coding, contexts) is the artifact's business alone, so a new method needs no change
there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["PIECE", "Reader", "Writer", "look_up", "pieces", "unzigzag", "zigzag"]

Signed = TypeVar("Signed", int, Tensor)

#: entries to take at a time: they stay in the processor's cache, and no second copy of a large tensor is made
PIECE = 1 << 18


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """1-D tensors of one length in views of at most `PIECE` entries; one of none, where they are empty."""
    for start in range(0, max(len(tensors[0]), 1), PIECE):
        yield tuple(tensor[start : start + PIECE] for tensor in tensors)


def look_up(table: npt.NDArray[Any], places: npt.NDArray[np.integer[Any]]) -> Tensor:
    """The rows of a table at these places (1-D, all of them within it).

    NumPy gathers twice as fast as torch, and takes room in huge pages, of which there are far fewer to map.

    >>> look_up(np.array([0.5, -1.0]), np.array([1, 1, 0])).tolist()
    [-1.0, -1.0, 0.5]
    """
    out = np.empty((len(places), *table.shape[1:]), dtype=table.dtype)
    for start in range(0, len(places), PIECE):
        piece = slice(start, start + PIECE)
        np.take(table, places[piece], axis=0, out=out[piece], mode="clip")  # the other mode takes room for a copy
    return torch.from_numpy(out)


def zigzag(value: Signed, width: int = 64) -> Signed:
    """Signed integers as unsigned ones of `width` bits, those near zero small: 0, -1, 1, -2 … become 0, 1, 2, 3 ….

    A tensor's entries are words of so many bits, as `unzigzag` takes them: torch shows the larger half of them as negative.

    >>> [zigzag(value) for value in (0, -1, 1, -2, 2)]
    [0, 1, 2, 3, 4]
    >>> zigzag(torch.tensor([0, -1, 64], dtype=torch.int16), 16).tolist()
    [0, 1, 128]
    """
    return (value << 1) ^ (value >> width - 1)


def unzigzag(code: Signed, width: int = 64) -> Signed:
    """The signed integers of which `zigzag` made these.

    >>> [unzigzag(code) for code in (0, 1, 2, 3, 2**64 - 1)]
    [0, -1, 1, -2, -9223372036854775808]
    """
    return ((code >> 1) & (1 << width - 1) - 1) ^ -(code & 1)


class Writer(Protocol):
    """Takes what a method stores."""

    def integer(self, value: int) -> None:
        """Store one small signed integer (a rank, an exponent, a method's code)."""

    def symbols(self, values: Tensor, size: int, grid: Tensor | None = None) -> None:
        """Store a 1-D tensor with entries in 0 … size-1 (1 ≤ size ≤ 65536); near numbers mean near values.

        It is uint8 where the size is at most 256, else int32: a large model must not be held several times over.
        Where they are entries of a matrix, row by row, `grid` marks which: their places may mean something, too.
        """


class Reader(Protocol):
    """Gives it back, in the same order. Every number is checked against its range: a file is not to be trusted."""

    def integer(self, low: int, high: int) -> int:
        """Read one integer in low … high (inclusive)."""

    def symbols(self, count: int, size: int, grid: Tensor | None = None) -> Tensor:
        """Read `count` symbols below `size`, as a 1-D tensor of the writer's type; `grid` as the writer had it."""

    def values(self, count: int, table: Tensor, grid: Tensor | None = None) -> Tensor:
        """Read `count` symbols, each an index into a 1-D table of at most 256 entries, and give what is there."""
