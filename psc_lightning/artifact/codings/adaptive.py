"""Each block of a stream under the histogram of everything before it: no table in the file."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from psc_lightning.artifact.ans import Decoder, Encoder, Ints, bits, count, table
from psc_lightning.artifact.codings.coding import Grid, Plane, Proposal
from psc_lightning.artifact.codings.contexts import UNIT

__all__ = ["Adaptive", "spans", "weights"]

PRIORS = (1, 4, 16, 64)  # weight of each symbol before any was seen, in the same unit
RADII = (0, 1, 2, 4, 8, 16)  # how far a symbol seen speaks for its neighbours
_SMOOTH_FROM = 9  # alphabets smaller than this have no neighbours worth asking


def spans(number: int) -> Iterator[tuple[int, int]]:
    """Cut a stream: blocks of 8, then a quarter of what is before, then (from 2^14 on) as much as is before.

    Late blocks may be long, because the price of learning late hangs on the number of doublings, not on their length.

    >>> list(spans(60))
    [(0, 8), (8, 16), (16, 24), (24, 32), (32, 40), (40, 50), (50, 60)]
    """
    start = 0
    while start < number:
        stop = min(number, start + max(8, start // 4 if start < 1 << 14 else start))
        yield start, stop
        start = stop


def weights(seen: Ints, prior: int, radius: int) -> Ints:
    """Weights of the next block's symbols, from the histogram of those before it (last axis: symbols).

    w[s] = prior + floor(32 · (sum of seen[s-radius … s+radius]) / (how many symbols that are, at the ends fewer)).

    >>> weights(np.array([3, 0, 0, 1]), 1, 0).tolist()
    [97, 1, 1, 33]
    >>> weights(np.array([3, 0, 0, 1]), 1, 1).tolist()
    [49, 33, 11, 17]
    """
    if not radius:
        return prior + UNIT * seen
    size = seen.shape[-1]
    symbol = np.arange(size)
    low, high = np.maximum(symbol - radius, 0), np.minimum(symbol + radius + 1, size)
    sums = np.zeros((*seen.shape[:-1], size + 1), dtype=np.int64)
    np.cumsum(seen, axis=-1, out=sums[..., 1:])
    smooth: Ints = prior + UNIT * (sums[..., high] - sums[..., low]) // (high - low)
    return smooth


class Adaptive:
    """Learns the distribution as it goes; a stream pays about (size-1)/2 · log2(length) bits for learning.

    Stored: two integers, which prior (of 1, 4, 16, 64 thirty-seconds of a symbol) and which smoothing radius
    (of 0, 1, 2, 4, 8, 16). The writer tries them all.
    """

    name = "adaptive"
    limits: tuple[int, ...] = (len(PRIORS), len(RADII))

    def propose(self, plane: Plane, encoder: Encoder) -> Iterator[Proposal]:
        """Offer every prior, and every radius where the alphabet is large enough."""
        symbols, size = plane.symbols, plane.size
        cuts = list(spans(len(symbols)))
        inside = np.stack([count(symbols[start:stop], size) for start, stop in cuts])
        before = inside.cumsum(0) - inside
        if len(cuts) == 1:
            return  # nothing was seen before: that is the uniform coding
        priors = np.array(PRIORS).reshape(-1, 1, 1)
        for j, radius in enumerate(RADII):
            if radius and (size < _SMOOTH_FROM or 2 * radius >= size):
                break
            for i, tables in enumerate(table(weights(before, 0, radius) + priors)):

                def write(encoder: Encoder, tables: Ints = tables) -> None:
                    encoder.choose(len(cuts))
                    for (start, stop), k, histogram in zip(cuts, tables, inside, strict=True):
                        encoder.put(symbols[start:stop], k, histogram)

                yield Proposal(bits(inside, tables), (i, j), write, steps=len(cuts))

    def read(self, decoder: Decoder, number: int, size: int, parameters: tuple[int, ...], grid: Grid | None) -> Tensor:
        """Read `number` symbols."""
        prior, radius = PRIORS[parameters[0]], RADII[parameters[1]]
        out = torch.empty(number, dtype=torch.uint8)
        seen = np.zeros(size, dtype=np.int64)
        for start, stop in spans(number):
            decoder.allowance.step()
            out[start:stop], inside = decoder.take(stop - start, table(weights(seen, prior, radius)))
            seen += inside
        return out
