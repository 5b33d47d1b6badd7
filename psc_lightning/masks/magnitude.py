"""Magnitude mask: the weights nearest to zero become zero."""

from __future__ import annotations

from torch import Tensor

from psc_lightning.masks.base import Mask

__all__ = ["MagnitudeMask"]


class MagnitudeMask(Mask):
    """score = |w| (the mean over a unit); a share `threshold` of the weights, those of the lowest score, is zero.

    Forward: ``w · m`` with m = 0 at the smallest |w|. Pseudo-gradient: ∂/∂w = g everywhere, so that a masked weight goes
    on learning and returns when it has grown.
    Stored: one bit a unit, entropy-coded.

    Args, shapes: see `Mask`.

    >>> import torch
    >>> mask = MagnitudeMask((1, 4), threshold=0.5)
    >>> w = torch.tensor([[0.1, -4.0, 0.2, 3.0]])
    >>> mask.refresh(w)
    >>> mask.hard(w).tolist(), mask.pull(w, torch.ones(1, 4)).tolist()
    ([[0.0, -4.0, 0.0, 3.0]], [[1.0, 1.0, 1.0, 1.0]])

    Source: Han et al. 2015, "Learning both weights and connections"; the dense gradient as in Lin et al. 2020,
    "Dynamic model pruning with feedback".
    """

    straight = True
    by_magnitude = True

    def score(self, core: Tensor) -> Tensor:
        """Mean |w| of each unit."""
        return self.units.mean(core.abs())
