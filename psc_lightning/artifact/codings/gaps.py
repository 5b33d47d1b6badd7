"""Few bits among many: how far apart they are."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from psc_lightning.artifact.ans import Decoder, Encoder, Ints, bits, count, table
from psc_lightning.artifact.codings.coding import Grid, Plane, Proposal
from psc_lightning.artifact.errors import ADVICE, ArtifactError
from psc_lightning.symbols import pieces

__all__ = ["Gaps"]

_RARE = 16  # the writer tries it where at most one bit in so many is the rarer one,
_LEAST = 1 << 16  # of at least so many: of fewer, other ways are read fast enough
_SHARE = 1 / 1000  # of its bits, which a way that takes symbol by symbol must save
_FAR = 255  # so many of the others and no rare one yet
_UNIT = 1 << 16
_FIRST = 1 << 22


def geometric(share: int) -> Ints:
    """The table of distances 0 … 254 and of 255 or more, where a bit is the rare one in `share` of 2^16 cases.

    w[0] = 2^22, w[g + 1] = floor(w[g] · (2^16 - share) / 2^16); for what is left w[255] · 2^16 / share, rounded down;
    none below 1.

    >>> (geometric(1 << 15)[:4] / (1 << 24)).round(3).tolist()
    [0.5, 0.25, 0.125, 0.062]
    """
    weights = np.empty(_FAR + 1, dtype=np.int64)
    weights[0] = _FIRST
    for gap in range(_FAR):
        weights[gap + 1] = weights[gap] * (_UNIT - share) // _UNIT
    weights[_FAR] = weights[_FAR] * _UNIT // share
    return table(np.maximum(weights, 1))


class Gaps:
    """Distances from one rare bit to the next, each as likely as if every bit were drawn alone.

    It costs what those bits would cost under one table; but a reader takes only a symbol for each rare bit, and one for
    every 255 others in a row.

    Stored: three integers: which bit is the rare one, its share of 2^16, and how many symbols there are. A symbol below 255
    is so many of the other bits and then a rare one, 255 is 255 of the others; the bits after the last are others. The
    writer tries it for 2^16 bits or more of which at most a sixteenth are rare, and takes it unless another way saves more
    than a thousandth.
    """

    name = "gaps"
    limits: tuple[int, ...] = (2, _UNIT, 1 << 31)

    def propose(self, plane: Plane, encoder: Encoder) -> Iterator[Proposal]:
        """Offer the one way, where a bit is rare."""
        number = len(plane.symbols)
        rare = int(plane.histogram.argmin())
        if plane.size != 2 or number < _LEAST or not 0 < _RARE * plane.histogram[rare] <= number:
            return
        places = np.flatnonzero(plane.symbols.numpy() == rare)
        far, near = np.divmod(np.diff(places, prepend=-1) - 1, _FAR)
        symbols = np.full(len(near) + int(far.sum()), _FAR, dtype=np.uint8)
        symbols[np.cumsum(far + 1) - 1] = near
        share = max(1, round(_UNIT * len(places) / number))
        gaps, k = torch.from_numpy(symbols), geometric(share)
        histogram = count(gaps, _FAR + 1)

        def write(encoder: Encoder) -> None:
            encoder.put(gaps, k, histogram)

        cost = bits(histogram, k)
        yield Proposal(cost, (rare, share, len(gaps)), write, toll=-_SHARE * cost)

    def read(self, decoder: Decoder, number: int, size: int, parameters: tuple[int, ...], grid: Grid | None) -> Tensor:
        """Read `number` bits."""
        rare, share, length = parameters
        if size != 2 or not share or length > number:
            raise ArtifactError(
                f"expected at most {number} distances between bits of two kinds, at a share above 0, found {length} between "
                f"{size} kinds at {share}: {ADVICE}"
            )
        with decoder.allowance.holding(number + length):
            gaps = decoder.take(length, geometric(share))[0]
            out = torch.full((number,), 1 - rare, dtype=torch.uint8)
            before = 0  # bits that are known
            for (piece,) in pieces(gaps):
                far = piece == _FAR
                places = torch.where(far, _FAR, piece.to(torch.int64) + 1).cumsum(0) + before
                before = int(places[-1]) if len(places) else before
                if before > number:
                    raise ArtifactError(f"expected {number} bits, found more: {ADVICE}")
                out[places[~far] - 1] = rare
            return out
