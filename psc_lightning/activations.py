"""What a layer needs to compute in whole numbers: its input on a grid of unsigned integers, the range of its output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from psc_lightning.functional import straight_through

__all__ = ["Activations", "Grid", "Range", "grid"]

_MOMENTUM = 0.1  # a batch's share of a running range, as BatchNorm's


@dataclass(frozen=True)
class Grid:
    """The numbers ``(q - zero) · scale``, q = 0 … top.

    Attributes:
        scale: above 0, a float32.
        zero: the q that means 0.
        top: 2^bits - 1.
    """

    scale: float
    zero: int
    top: int

    @property
    def low(self) -> float:
        """The lowest number."""
        return -self.zero * self.scale

    @property
    def high(self) -> float:
        """The highest."""
        return (self.top - self.zero) * self.scale


def grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point for numbers from low ≤ 0 to high ≥ 0.

    >>> [value.item() for value in grid(torch.tensor(-1.0), torch.tensor(3.0), 2)]
    [1.3333333730697632, 1.0]
    """
    scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    return scale, (-low / scale).round()


class Range(nn.Module):
    """The smallest and largest number of a batch, as a moving average over batches; empty (low = high) before the first.

    A layer that is called several times in a batch has one range in it, of all its calls.

    Args:
        shape: one range each.
    """

    low: Tensor
    high: Tensor
    #: the average before this batch, and this batch's own bounds so far
    low_before: Tensor
    high_before: Tensor
    low_here: Tensor
    high_here: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        for name in ("", "_before", "_here"):
            for bound in ("low", "high"):
                zeros = torch.zeros(shape, dtype=torch.float32)
                self.register_buffer(f"{bound}{name}", zeros, persistent=not name)
        self.begin()

    def begin(self) -> None:
        """A batch begins."""
        self.low_before.copy_(self.low)
        self.high_before.copy_(self.high)
        self.low_here.fill_(torch.inf)
        self.high_here.fill_(-torch.inf)

    def take(self, low: Tensor, high: Tensor) -> None:
        """Take in the bounds of a call, unless they are infinite or no numbers."""
        known, new = (high - low).isfinite(), self.low_before == self.high_before
        self.low_here.copy_(torch.where(known, self.low_here.minimum(low.float()), self.low_here))
        self.high_here.copy_(torch.where(known, self.high_here.maximum(high.float()), self.high_here))
        for bound, before, here in (
            (self.low, self.low_before, self.low_here),
            (self.high, self.high_before, self.high_here),
        ):
            bound.copy_(torch.where(known, torch.where(new, here, before.lerp(here, _MOMENTUM)), bound))


class Activations(nn.Module):
    """Rounds a layer's input: ``x̂ = (clamp(round(x/s) + z, 0, m) - z) · s``, m = 2^bits - 1; 0 stays 0.

    s = (high - low)/m and z = round(-low/s), of the range of the inputs seen in training, 0 always in it.
    Pseudo-gradient: ∂/∂x = g within the range, 0 outside. Until an input was seen it is passed on as it is.

    Args:
        bits: 2 … 8.
        channels: of a convolution's output, whose ranges are of use where it runs in integers; None: not seen.

    >>> inputs = Activations(2)
    >>> inputs.see(torch.tensor([0.0, 3.0]))
    >>> inputs(torch.tensor([-1.0, 0.4, 1.6, 7.0])).tolist()
    [0.0, 0.0, 2.0, 3.0]

    Source: Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference", sections 2.1 and 3.1.
    """

    def __init__(self, bits: int, channels: int | None = None) -> None:
        super().__init__()
        self.bits = bits
        self.observing = False
        self.input = Range()
        self.output = None if channels is None else Range(channels)

    def observe(self) -> None:
        """A batch begins, whose inputs and outputs are to be seen, until `observing` is False again."""
        self.observing = True
        for bounds in self.ranges():
            bounds.begin()

    def ranges(self) -> list[Range]:
        """All that there are."""
        return [self.input] if self.output is None else [self.input, self.output]

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """Take in the inputs of a call."""
        if x.numel():
            low, high = x.aminmax()
            self.input.take(low.clamp(max=0.0), high.clamp(min=0.0))

    @torch.no_grad()
    def see_output(self, y: Tensor, axis: int) -> None:
        """Take in the outputs of a call, whose channels lie along an axis."""
        if self.output is not None and y.numel():
            others = [i for i in range(y.dim()) if i != axis]
            self.output.take(y.amin(others), y.amax(others))

    def forward(self, x: Tensor) -> Tensor:
        """The rounded input, of its own type."""
        with torch.no_grad():
            scale, zero = grid(self.input.low, self.input.high, self.bits)
            top = 2**self.bits - 1
            code = ((x / scale).round() + zero).clamp(0, top)
            seen = self.input.high > self.input.low
            hard = torch.where(seen, (code - zero) * scale, x).to(x.dtype)
            wide = torch.finfo(torch.float32).max
            low, high = torch.where(seen, -zero * scale, -wide), torch.where(seen, (top - zero) * scale, wide)
        return straight_through(hard, x.clamp(low.to(x.dtype), high.to(x.dtype)))

    @torch.no_grad()
    def grid(self) -> Grid | None:
        """The inputs' grid; None where none was seen."""
        scale, zero = grid(self.input.low, self.input.high, self.bits)
        return Grid(scale.item(), int(zero), 2**self.bits - 1) if self.input.high > self.input.low else None
