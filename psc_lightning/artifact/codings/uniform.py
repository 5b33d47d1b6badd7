"""All symbols equally likely."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from psc_lightning.artifact.ans import Decoder, Encoder, bits, table
from psc_lightning.artifact.codings.coding import Grid, Plane, Proposal

__all__ = ["Uniform"]


class Uniform:
    """Plain symbols: log2(size) bits each; the right choice for noise, such as the low bits of a mantissa.

    Stored: no parameters. Weights 1 for each symbol.
    """

    name = "uniform"
    limits: tuple[int, ...] = ()

    def propose(self, plane: Plane, encoder: Encoder) -> Iterator[Proposal]:
        """Offer the one way."""
        k = table(np.ones(plane.size, dtype=np.int64))

        def write(encoder: Encoder) -> None:
            encoder.put(plane.symbols, k, plane.histogram)

        yield Proposal(bits(plane.histogram, k), (), write)

    def read(self, decoder: Decoder, number: int, size: int, parameters: tuple[int, ...], grid: Grid | None) -> Tensor:
        """Read `number` symbols."""
        return decoder.take(number, table(np.ones(size, dtype=np.int64)))[0]
