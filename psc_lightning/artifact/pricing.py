"""What a file would cost, without writing it: a writer that only counts."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from psc_lightning.artifact.streams import Stream, stream_of

__all__ = ["Pricer"]

_CODING = 16  # bits for a plane's lowest and highest symbol and its coding


class Pricer:
    """A `psc_lightning.symbols.Writer` that adds up order-0 entropies, and what a model costs that learns them.

    An array of n symbols, K different ones of R in all, costs n · H + (K - 1)/2 · log2 n bits, or n · log2 R if that is less;
    contexts may go below.

    Attributes:
        streams: what was counted so far, for the report.
        bits: what it costs.

    >>> pricer = Pricer()
    >>> pricer.symbols(torch.tensor([0, 1, 0, 1, 1, 0, 0, 1], dtype=torch.uint8), 2)
    >>> pricer.bits
    24.0

    Source: Rissanen 1984, "Universal coding, information, prediction, and estimation" (the model's cost).
    """

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.bits = 0.0

    def integer(self, value: int) -> None:
        """Count one integer."""
        self.bits += 2 + 2 * abs(value).bit_length()

    def symbols(self, values: Tensor, size: int, grid: Tensor | None = None) -> None:
        """Count an array; one of more than 256 symbols as its high and its low bytes."""
        values = values.detach().cpu()
        for plane in (values,) if size <= 256 else (values >> 8, values & 255):
            if len(plane):
                one = stream_of(np.bincount(plane.to(torch.uint8).numpy(), minlength=1), "priced")
                self.streams.append(one)
                learned = one.entropy + (one.distinct - 1) / 2 * math.log2(one.number)
                room = int(plane.max()) - int(plane.min()) + 1
                self.bits += _CODING + min(learned, one.number * math.log2(room))
