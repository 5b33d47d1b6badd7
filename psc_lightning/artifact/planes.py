"""One array of symbols below 257 to bits and back, in the cheapest of its admissible ways.

The smallest symbol, then how far the largest is below size-1; if the two meet, all symbols are known. Else the number of
the coding, its parameters, and the symbols, less the smallest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from psc_lightning.artifact.ans import Decoder, Encoder
from psc_lightning.artifact.codings import CODINGS, Grid, Plane, Proposal
from psc_lightning.artifact.errors import ADVICE, ArtifactError

__all__ = ["CONSTANT", "Choice", "choose", "read"]

#: what stands for a coding where none is needed
CONSTANT = "constant"


@dataclass(frozen=True)
class Choice:
    """How a plane will be written.

    Attributes:
        bits: what it will cost, about: integers get cheaper as they come again.
        low: the smallest symbol.
        gap: how far the largest is below size-1.
        code: the number of the coding; None where all symbols are known.
        proposal: what it does.
    """

    bits: float
    low: int
    gap: int
    code: int | None = None
    proposal: Proposal | None = None

    @property
    def toll(self) -> float:
        """Bits that slow reading counts for, negative where it is fast."""
        return 0.0 if self.proposal is None else self.proposal.toll

    @property
    def coding(self) -> str:
        """The coding's name."""
        return CONSTANT if self.code is None else CODINGS[self.code].name

    def write(self, encoder: Encoder) -> None:
        """Write it."""
        encoder.integer(self.low, "low")
        encoder.integer(self.gap, "high")
        if self.code is not None and self.proposal is not None:
            encoder.integer(self.code, "coding")
            for parameter in self.proposal.parameters:
                encoder.integer(parameter, self.coding)
            self.proposal.write(encoder)


def choose(plane: Plane, encoder: Encoder, codings: int | None = None) -> Choice:
    """The proposal with the fewest bits, its integers and its toll included; the first of equals.

    Args:
        plane: to be written.
        encoder: knows what integers cost now.
        codings: how many of the codings may be taken; None: all.
    """
    present = plane.histogram.nonzero()[0]
    low, high = int(present[0]), int(present[-1])
    gap = plane.size - 1 - high
    head = encoder.price((low,), "low") + encoder.price((gap,), "high")
    if low == high:
        return Choice(head, low, gap)
    middle = None if plane.middle is None else plane.middle - low
    around = plane.around and middle is not None and 0 < middle < high - low  # zero is among them, and not the last
    trimmed = plane
    if low or gap or around != plane.around:  # else its histogram is kept
        symbols = plane.symbols - low if low else plane.symbols
        trimmed = Plane(symbols, high - low + 1, plane.grid, middle, around)
    choices = (
        Choice(
            head + encoder.price((code,), "coding") + encoder.price(proposal.parameters, coding.name) + proposal.bits,
            low,
            gap,
            code,
            proposal,
        )
        for code, coding in enumerate(CODINGS[:codings])
        for proposal in coding.propose(trimmed, encoder)
    )
    return min(choices, key=lambda choice: choice.bits + choice.toll)  # uniform always offers


def read(
    decoder: Decoder,
    number: int,
    size: int,
    grid: Grid | None,
    dtype: torch.dtype = torch.int32,
    codings: int | None = None,
) -> tuple[Tensor, str]:
    """Read `number` symbols, at least one, as a 1-D tensor of this type; and by which coding they came.

    `codings`: how many of the codings there may be; None: all.

    Raises:
        ArtifactError: the file says what cannot be.
    """

    def below(limit: int, context: str) -> int:
        value = decoder.integer(context)
        if value >= limit:
            raise ArtifactError(f"expected a number below {limit} ({context}), found {value}: {ADVICE}")
        return value

    low = below(size, "low")
    high = size - 1 - below(size - low, "high")
    if low == high:
        return torch.full((number,), low, dtype=dtype), CONSTANT
    coding = CODINGS[below(len(CODINGS[:codings]), "coding")]
    parameters = tuple(below(limit, coding.name) for limit in coding.limits)
    symbols = coding.read(decoder, number, high - low + 1, parameters, grid).to(dtype)
    return symbols.add_(low) if low else symbols, coding.name
