"""Saliency mask: the weights that matter least to the loss become zero."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
from torch import Tensor

from psc_lightning.masks.base import Mask
from psc_lightning.options import one_of

__all__ = ["SALIENCY_LABELS", "SaliencyMask"]

#: first-order change of the loss when the weight is removed; the diagonal of the Fisher information
SALIENCY_LABELS = ("gradient_weight", "fisher")


class SaliencyMask(Mask):
    """score = Σ |g·w| or Σ g²; a share `threshold` of the weights, those of the lowest score, is zero.

    The sum is over a calibration pass: first order, or the diagonal of the Fisher information.
    Forward: ``w · m`` with m = 0 at the smallest score. Pseudo-gradient: ∂/∂w = g·m.
    Stored: one bit a unit, entropy-coded. The sums are training state only.

    Args, shapes: see `Mask`, and
        label: `gradient_weight` or `fisher`.

    >>> mask = SaliencyMask((1, 2), threshold=0.5)
    >>> w = torch.tensor([[1.0, 4.0]])
    >>> mask.observe(w, torch.tensor([[8.0, 1.0]]))
    >>> mask.refresh(w)
    >>> mask.hard(w).tolist()
    [[1.0, 0.0]]

    Source: Molchanov et al. 2017, "Pruning CNNs for resource efficient inference", eq. 7; Theis et al. 2018, "Faster
    gaze prediction", eq. 7 (Fisher); Lee et al. 2019 (SNIP) for single-shot use.
    """

    labels = "before"

    total: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        label: Annotated[str, partial(one_of, allowed=SALIENCY_LABELS)] = "gradient_weight",
        **options: object,
    ) -> None:
        super().__init__(shape, **options)  # type: ignore[arg-type]  # Mask names and types them
        self.label = label
        self.register_buffer("total", torch.zeros(self.units.shape))

    def observe(self, core: Tensor, gradient: Tensor) -> None:
        """Add one step's labels."""
        label = (gradient * core).abs() if self.label == "gradient_weight" else gradient.square()
        self.total += self.units.mean(label)

    @torch.no_grad()
    def restart(self) -> None:
        """Start from no sums."""
        self.total.zero_()

    def score(self, core: Tensor) -> Tensor:
        """The sums so far."""
        return self.total
