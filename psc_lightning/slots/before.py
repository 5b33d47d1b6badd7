"""What a tensor was before others wrote to it: where they put the hard weight back, its latent weight is back as well.

An average takes the network's place for a validation and its checkpoint; the weights that are then put back are the hard
ones, for no others are seen. Without this, training would go on from them: each validation would round its progress away.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from psc_lightning.slots.slots import Slots

__all__ = ["Before"]


@dataclass(frozen=True)
class Before:
    """A hard weight, the latent one that it was made of, and what made it."""

    hard: Tensor
    latent: Tensor
    slots: Slots

    @classmethod
    def of(cls, slots: Slots, latent: Tensor) -> Before:
        """What they are now."""
        return cls(slots.make(latent), latent.clone(), slots.twin())

    def is_again(self, found: Tensor) -> bool:
        """Whether a Parameter holds that hard weight."""
        same = (self.hard.shape, self.hard.dtype, self.hard.device) == (found.shape, found.dtype, found.device)
        return same and torch.equal(self.hard, found)
