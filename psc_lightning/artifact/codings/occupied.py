"""Bits of a matrix without its empty rows and columns."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from psc_lightning.artifact.ans import Decoder, Encoder
from psc_lightning.artifact.codings.coding import Grid, Plane, Proposal, matrix
from psc_lightning.artifact.errors import ADVICE, ArtifactError

__all__ = ["Occupied"]


class Occupied:
    """For masks that leave whole rows and columns empty: units and inputs that nobody uses.

    Stored: no parameters. A plane of a bit a row (1: it holds a 1), one of a bit a column, and a plane of the entries that
    are left, in any coding with a smaller number. The writer tries it where something is empty.
    """

    name = "occupied"
    limits: tuple[int, ...] = ()

    def propose(self, plane: Plane, encoder: Encoder) -> Iterator[Proposal]:
        """Offer to leave out what is empty, if anything is."""
        from psc_lightning.artifact.planes import choose  # which knows all codings, this one too

        if plane.size != 2 or plane.grid is None:
            return
        bits = matrix(plane)
        lines = [bits.any(1), bits.any(0)]
        if all(line.all() for line in lines):
            return
        left = plane.grid & np.logical_and.outer(*lines)
        planes = [Plane(torch.from_numpy(line.view(np.uint8)), 2) for line in lines]
        parts = [choose(part, encoder) for part in planes]
        parts.append(choose(Plane(torch.from_numpy(bits[left]), 2, left), encoder, self._within()))

        def write(encoder: Encoder) -> None:
            for part in parts:
                part.write(encoder)

        yield Proposal(sum(part.bits for part in parts), (), write, sum(part.toll for part in parts))

    def read(self, decoder: Decoder, number: int, size: int, parameters: tuple[int, ...], grid: Grid | None) -> Tensor:
        """Read `number` symbols."""
        from psc_lightning.artifact.planes import read

        if size != 2 or grid is None:
            raise ArtifactError(f"expected bits of a matrix, found others: {ADVICE}")
        lines = [read(decoder, length, 2, None).bool().numpy() for length in grid.shape]
        left = grid & np.logical_and.outer(*lines)
        out = np.zeros(grid.shape, dtype=np.uint8)
        if count := int(left.sum()):
            out[left] = read(decoder, count, 2, left, codings=self._within()).numpy()
        return torch.from_numpy(out[grid])

    def _within(self) -> int:
        """How many codings there are before this one: it does not hold itself, however deep a bad file would go."""
        from psc_lightning.artifact.codings import CODINGS

        return [coding.name for coding in CODINGS].index(self.name)
