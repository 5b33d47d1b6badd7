"""What a coding is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from psc_lightning.artifact.ans import Decoder, Encoder, Ints

__all__ = ["Coding", "Proposal"]


@dataclass(frozen=True)
class Proposal:
    """One admissible way to code one stream.

    Attributes:
        bits: exact cost of the symbols, without the parameters.
        parameters: what the reader has to know, non-negative integers.
        write: puts the symbols (not the parameters) into an encoder.
    """

    bits: float
    parameters: tuple[int, ...]
    write: Callable[[Encoder], None]


class Coding(Protocol):
    """A way to code symbols below `size` (2 … 256)."""

    name: str
    limits: tuple[int, ...]  # each parameter is below its limit

    def propose(self, symbols: Tensor, histogram: Ints, columns: int) -> Iterator[Proposal]:
        """Offer ways to code a non-empty uint8 tensor; the histogram has `size` entries, a row of a matrix `columns`."""

    def read(self, decoder: Decoder, number: int, size: int, parameters: tuple[int, ...], columns: int) -> Tensor:
        """Read `number` symbols as a 1-D int32 tensor."""
