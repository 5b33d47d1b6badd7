"""Bits of a matrix without its empty rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from psc_lightning.artifact.ans import Decoder, Encoder
from psc_lightning.artifact.codings.coding import Coding, Grid, Plane, Proposal, matrix
from psc_lightning.artifact.codings.planes import choose, read
from psc_lightning.artifact.errors import ADVICE, ArtifactError

__all__ = ["Occupied"]


class Occupied:
    """For masks that leave whole rows and columns empty: unused units and inputs.

    Stored: no parameters. A plane of a bit a row (1: it holds a 1), one of a bit a column, and a plane of the entries that
    are left, in any coding with a smaller number. The writer tries it where something is empty.

    Args:
        codings: gives all codings, in the order of their numbers.
    """

    name = "occupied"
    limits: tuple[int, ...] = ()

    def __init__(self, codings: Callable[[], Sequence[Coding]]) -> None:
        self.codings = codings  # asked for when they are all there

    def propose(self, plane: Plane, encoder: Encoder) -> Iterator[Proposal]:
        """Offer to leave out what is empty, if anything is."""
        if plane.size != 2 or plane.grid is None:
            return
        bits = matrix(plane)
        lines = [bits.any(1), bits.any(0)]
        if all(line.all() for line in lines):
            return
        left = plane.grid & np.logical_and.outer(*lines)
        planes = [Plane(torch.from_numpy(line.view(np.uint8)), 2) for line in lines]
        codings = self.codings()
        parts = [choose(part, encoder, codings) for part in planes]
        within = codings[: codings.index(self)]  # it does not hold itself, however deep a bad file would go
        parts.append(choose(Plane(torch.from_numpy(bits[left]), 2, left), encoder, within))

        def write(encoder: Encoder) -> None:
            for part in parts:
                part.write(encoder)

        bits, toll, steps = (sum(getattr(part, name) for part in parts) for name in ("bits", "toll", "steps"))
        yield Proposal(bits, (), write, toll, int(steps))

    def read(self, decoder: Decoder, number: int, size: int, parameters: tuple[int, ...], grid: Grid | None) -> Tensor:
        """Read `number` symbols."""
        if size != 2 or grid is None:
            raise ArtifactError(f"expected bits of a matrix, found others: {ADVICE}")
        codings = self.codings()
        with decoder.allowance.holding(3 * grid.size):
            lines = [read(decoder, length, 2, None, codings).bool().numpy() for length in grid.shape]
            left = grid & np.logical_and.outer(*lines)
            out = np.zeros(grid.shape, dtype=np.uint8)
            if count := int(left.sum()):
                out[left] = read(decoder, count, 2, left, codings[: codings.index(self)]).numpy()
            return torch.from_numpy(out[grid])
