"""Symbols as answers to yes-or-no questions, so that the answers may be coded by their places."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from psc_lightning.artifact.ans import Decoder, Encoder
from psc_lightning.artifact.codings.coding import Coding, Grid, Plane, Proposal, inside
from psc_lightning.artifact.codings.diagonals import Diagonals
from psc_lightning.artifact.codings.lines import Lines
from psc_lightning.artifact.codings.occupied import Occupied
from psc_lightning.artifact.codings.planes import choose, read
from psc_lightning.artifact.errors import ADVICE, ArtifactError

__all__ = ["Split"]

_ENTRIES = 1 << 20  # a larger matrix is to be written fast, too
_BYTES = 5  # that a reader takes for each symbol, while it reads the planes
_DEEPEST = 5  # splits within splits: each takes memory, and a bad file would have hundreds


class Split:
    """For codes of weights: their signs keep together, and so do their zeros.

    Stored: two integers, how and a symbol t. How 0, around t: planes of the bits [s ≠ t] of all symbols, of the bits
    [s > t] of those that are not t, and of their |s - t| - 1. How 1, at t: planes of the bits [s ≥ t], of the symbols
    below t, and of the others less t. Each is coded as any plane is, those of its entries being its grid; one without
    symbols is left out, and so is one of an alphabet of one. No more than five splits lie within one another.

    Args:
        codings: gives all codings, in the order of their numbers.
    """

    name = "split"
    limits: tuple[int, ...] = (2, 256)

    def __init__(self, codings: Callable[[], Sequence[Coding]]) -> None:
        self.codings = codings  # asked for when they are all there

    def propose(self, plane: Plane, encoder: Encoder) -> Iterator[Proposal]:
        """Offer to split at the middle, or so that as many symbols are below as above."""
        if plane.grid is None or plane.size < 3 or plane.grid.size > _ENTRIES or encoder.depth == _DEEPEST:
            return
        s, size, codings = plane.symbols.to(torch.int16), plane.size, self.codings()
        t = min(max(1, plane.middle if plane.middle is not None else _median(plane)), size - 1)
        if plane.around:
            other = s != t
            within = inside(plane.grid, other)
            distances = Plane(((s[other] - t).abs() - 1).to(torch.uint8), max(t, size - 1 - t), within)
            planes = [_bits(other, plane.grid), _bits(s[other] > t, within), distances]
        else:
            upper = s >= t
            below = Plane(s[~upper].to(torch.uint8), t, inside(plane.grid, ~upper))
            above = Plane((s[upper] - t).to(torch.uint8), size - t, inside(plane.grid, upper))
            planes = [_bits(upper, plane.grid), below, above]
        # Bits first: if none of them hangs on places, the symbols are better off together, and sooner read.
        chosen = {
            i: choose(part, encoder, codings) for i, part in enumerate(planes) if part.size == 2 and len(part.symbols)
        }
        if not any(choice.coding in (Lines.name, Diagonals.name, Occupied.name) for choice in chosen.values()):
            return
        with encoder.deeper():
            parts = [
                chosen.get(i) or choose(part, encoder, codings)
                for i, part in enumerate(planes)
                if len(part.symbols) and part.size > 1
            ]

        def write(encoder: Encoder) -> None:
            for part in parts:
                part.write(encoder)

        bits, toll, steps = (sum(getattr(part, name) for part in parts) for name in ("bits", "toll", "steps"))
        yield Proposal(bits, (1 - plane.around, t), write, toll, int(steps))

    def read(self, decoder: Decoder, number: int, size: int, parameters: tuple[int, ...], grid: Grid | None) -> Tensor:
        """Read `number` symbols."""
        (how, t), codings = parameters, self.codings()
        if grid is None or size < 3 or not 0 < t < size:
            raise ArtifactError(f"expected symbols of a matrix to split, found {t} of {size}: {ADVICE}")
        if decoder.depth == _DEEPEST:
            raise ArtifactError(f"expected at most {_DEEPEST} splits within one another, found more: {ADVICE}")

        def plane(number: int, size: int, grid: Grid | None = None) -> Tensor:
            if not number or size == 1:
                return torch.zeros(number, dtype=torch.int32)
            with decoder.deeper():
                return read(decoder, number, size, grid, codings)

        with decoder.allowance.holding(_BYTES * number + grid.size):
            first = plane(number, 2, grid) > 0
            chosen = int(first.sum())
            out = torch.full((number,), t, dtype=torch.uint8)
            if how == 0:
                within = inside(grid, first)
                above = plane(chosen, 2, within) > 0
                distance = plane(chosen, max(t, size - 1 - t), within).to(torch.int16) + 1
                others = t + torch.where(above, distance, -distance)
                if chosen and not 0 <= int(others.min()) <= int(others.max()) < size:
                    raise ArtifactError(f"expected symbols below {size}, found {int(others.max())}: {ADVICE}")
                out[first] = others.to(torch.uint8)
            else:
                out[~first] = plane(number - chosen, t, inside(grid, ~first)).to(torch.uint8)
                out[first] = plane(chosen, size - t, inside(grid, first)).to(torch.uint8) + t
            return out


def _bits(answers: Tensor, grid: Grid) -> Plane:
    return Plane(answers.to(torch.uint8), 2, grid)


def _median(plane: Plane) -> int:
    return int(np.searchsorted(plane.histogram.cumsum(), len(plane.symbols) / 2)) + 1
