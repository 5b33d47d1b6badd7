"""The second slot: which entries exist."""

from __future__ import annotations

from psc_lightning.masks.base import Mask
from psc_lightning.masks.magnitude import MagnitudeMask
from psc_lightning.masks.movement import MovementMask
from psc_lightning.masks.saliency import SALIENCY_LABELS, SaliencyMask
from psc_lightning.masks.units import GRANULARITIES, read_keep

__all__ = ["GRANULARITIES", "MASKS", "SALIENCY_LABELS", "Mask", "read_keep"]

#: Name → method. A file holds the mask, not how it was found.
MASKS: dict[str, type[Mask]] = {
    "magnitude": MagnitudeMask,
    "movement": MovementMask,
    "saliency": SaliencyMask,
}
