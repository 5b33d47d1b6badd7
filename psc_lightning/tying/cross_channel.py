"""Cross-channel sharing: groups of input channels share one bank of weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor

from psc_lightning.options import one_of, whole
from psc_lightning.symbols import Reader, Writer
from psc_lightning.tying.base import Shape, Tying

__all__ = ["CrossChannelSharing"]


class CrossChannelSharing(Tying):
    """``W[o, g·I/G + c, h, w] = bank[o, c, h, w]``: the G groups of input channels use the same weights.

    Forward: bank = mean over the groups, effective weight = the bank repeated G times.
    Gradient: every member gets the mean of the members' gradients.
    Start: at each position of the bank, the member with the largest label is the weight that stays (ties: the first
    group). The label is Σ |g·w| over the steps before the start, or |w| where none was seen. The choice is made once
    and is not stored.
    Stored: 1/G of the numbers; G.

    Args:
        shape: the matrix view's shape, ``(O, I, *kernel)``.
        groups: G ≥ 2, a divisor of I.
        labels: `saliency` (|g·w|) or `magnitude` (|w|).

    Shapes:
        weight ``(O, I, *kernel)`` → bank ``(O, I/G, *kernel)``.

    Raises:
        ValueError: I is not divisible by G.

    >>> import torch
    >>> tying = CrossChannelSharing.build((1, 4), groups=2)
    >>> w = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    >>> tying.observe(w, gradient=torch.tensor([[9.0, 0.0, 1.0, -1.0]]))
    >>> tying.begin(w).tolist()
    [[1.0, 4.0, 1.0, 4.0]]

    Source: the project's method description ("cross-channel sharing"); labels as in Molchanov et al. 2017 (|g·w|).
    """

    code_number = 1

    total: Tensor

    def __init__(self, shape: Shape, groups: int, labels: str = "saliency") -> None:
        super().__init__()
        self.shape, self.groups = shape, groups
        self.labelled = labels == "saliency"
        self.register_buffer("total", torch.zeros(shape if self.labelled else ()))

    @classmethod
    def build(  # type: ignore[override]
        cls,
        shape: Shape,
        groups: Annotated[int, partial(whole, low=2)] = 2,
        labels: Annotated[str, partial(one_of, allowed=("saliency", "magnitude"))] = "saliency",
    ) -> CrossChannelSharing:
        """The tying for a weight of this shape."""
        if shape[1] % groups:
            raise ValueError(f"its {shape[1]} input channels are not divisible by groups={groups}")
        return cls(shape, groups, labels)

    def _members(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.shape[0], self.groups, self.shape[1] // self.groups, *self.shape[2:])

    @classmethod
    def calibrates(cls, options: Mapping[str, Any]) -> bool:
        """By saliency."""
        return bool(options.get("labels", "saliency") == "saliency")

    def core_shapes(self) -> dict[str, Shape]:
        """The bank, ``(O, I/G, *kernel)``."""
        return {"bank": (self.shape[0], self.shape[1] // self.groups, *self.shape[2:])}

    def observe(self, matrix: Tensor, gradient: Tensor) -> None:
        """Add one step's labels, |g·w|."""
        if self.labelled:
            self.total += (gradient * matrix).abs()

    def begin(self, matrix: Tensor) -> Tensor:
        """The bank of the members with the largest labels, repeated."""
        scores = self._members(self.total if self.labelled and bool(self.total.any()) else matrix.abs())
        # argmax is free to name any of equal maxima; the first is ours
        first = (scores == scores.amax(1, keepdim=True)).to(torch.int8).argmax(1, keepdim=True)
        return self.expand({"bank": self._members(matrix).gather(1, first).squeeze(1)})

    def reduce(self, matrix: Tensor) -> dict[str, Tensor]:
        """Mean over the groups."""
        return {"bank": self._members(matrix).mean(1)}

    def expand(self, cores: dict[str, Tensor]) -> Tensor:
        """The bank repeated over the groups."""
        members = cores["bank"].unsqueeze(1).expand(-1, self.groups, *(-1,) * (len(self.shape) - 1))
        return members.reshape(self.shape)

    def encode(self, writer: Writer) -> None:
        """Store the number of groups."""
        writer.integer(self.groups)

    @classmethod
    def decode(cls, reader: Reader, shape: Shape) -> CrossChannelSharing:
        """Read it."""
        groups = reader.integer(2, max(2, shape[1]))
        if shape[1] % groups:
            raise ValueError(f"cross_channel: {groups} groups do not divide {shape[1]} input channels")
        return cls(shape, groups, labels="magnitude")
