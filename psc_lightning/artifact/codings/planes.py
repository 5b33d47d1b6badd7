"""One array of symbols below 257 to bits and back, in the cheapest of its admissible ways.

The smallest symbol, then how far the largest is below size-1; if the two meet, all symbols are known. Else the number of
the coding, its parameters, and the symbols, less the smallest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from psc_lightning.artifact.ans import Decoder, Encoder, Ints, Packed, count
from psc_lightning.artifact.codings.coding import Coding, Grid, Plane, Proposal
from psc_lightning.artifact.errors import ADVICE, ArtifactError
from psc_lightning.symbols import look_up

__all__ = ["CONSTANT", "Choice", "Found", "choose", "find", "read"]

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
        coding: its name.
        proposal: what it does.
    """

    bits: float
    low: int
    gap: int
    code: int | None = None
    coding: str = CONSTANT
    proposal: Proposal | None = None

    @property
    def toll(self) -> float:
        """Bits that slow reading counts for, negative where it is fast."""
        return 0.0 if self.proposal is None else self.proposal.toll

    @property
    def steps(self) -> int:
        """What a reader will take, beyond a plane and its integers."""
        return 0 if self.proposal is None else self.proposal.steps

    def write(self, encoder: Encoder) -> None:
        """Write it."""
        encoder.steps += 1
        encoder.integer(self.low, "low")
        encoder.integer(self.gap, "high")
        if self.code is not None and self.proposal is not None:
            encoder.integer(self.code, "coding")
            for parameter in self.proposal.parameters:
                encoder.integer(parameter, self.coding)
            self.proposal.write(encoder)


def choose(plane: Plane, encoder: Encoder, codings: Sequence[Coding]) -> Choice:
    """The proposal with the fewest bits, its integers and its toll included; the first of equals.

    Args:
        plane: to be written.
        encoder: knows what integers cost now.
        codings: which may be taken, in the order of their numbers.
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
            coding.name,
            proposal,
        )
        for code, coding in enumerate(codings)
        for proposal in coding.propose(trimmed, encoder)
        if not proposal.steps or encoder.affords(proposal.steps)
    )
    return min(choices, key=lambda choice: choice.bits + choice.toll)  # uniform always offers


@dataclass(frozen=True)
class Found:
    """A plane as it lay in a file.

    Attributes:
        number: how many symbols.
        low: what is to be added to each of `rest`.
        rest: the symbols, as their coding gave them out; None where all are `low`.
        coding: its name.
    """

    number: int
    low: int
    rest: Tensor | Packed | None
    coding: str

    def symbols(self, dtype: torch.dtype) -> Tensor:
        """The symbols, as a 1-D tensor of this type."""
        if self.rest is None:
            return torch.full((self.number,), self.low, dtype=dtype)
        symbols = (self.rest.symbols() if isinstance(self.rest, Packed) else self.rest).to(dtype)
        return symbols + self.low if self.low else symbols

    def values(self, table: Tensor) -> Tensor:
        """The entry of a table for each symbol."""
        if self.rest is None:
            return table[self.low].repeat(self.number)
        rest = table[self.low :]
        return self.rest.values(rest) if isinstance(self.rest, Packed) else look_up(rest.numpy(), self.rest.numpy())

    def histogram(self, size: int) -> Ints:
        """How often each symbol below `size` is there."""
        if self.rest is None:
            found = np.array([self.number])
        elif isinstance(self.rest, Packed):
            found = self.rest.histogram()
        else:
            found = count(self.rest, size - self.low)
        histogram = np.zeros(size, dtype=np.int64)
        histogram[self.low : self.low + len(found)] = found
        return histogram


def read(decoder: Decoder, number: int, size: int, grid: Grid | None, codings: Sequence[Coding]) -> Tensor:
    """Read `number` symbols, at least one, as a 1-D int32 tensor; as `find`.

    Raises:
        ArtifactError: the file says what cannot be.
    """
    return find(decoder, number, size, grid, codings).symbols(torch.int32)


def find(decoder: Decoder, number: int, size: int, grid: Grid | None, codings: Sequence[Coding]) -> Found:
    """Take `number` symbols, at least one, from what is read next; in one of these codings, in the order of their numbers.

    Raises:
        ArtifactError: the file says what cannot be.
    """

    def below(limit: int, context: str) -> int:
        value = decoder.integer(context)
        if value >= limit:
            raise ArtifactError(f"expected a number below {limit} ({context}), found {value}: {ADVICE}")
        return value

    decoder.allowance.step()
    low = below(size, "low")
    high = size - 1 - below(size - low, "high")
    if low == high:
        return Found(number, low, None, CONSTANT)
    coding = codings[below(len(codings), "coding")]
    parameters = tuple(below(limit, coding.name) for limit in coding.limits)
    return Found(number, low, coding.read(decoder, number, high - low + 1, parameters, grid), coding.name)
