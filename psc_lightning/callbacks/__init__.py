"""The callbacks that a user adds to a Trainer."""

from __future__ import annotations

from psc_lightning.callbacks.clipping import GradientClipping
from psc_lightning.callbacks.mask import MaskLearning
from psc_lightning.callbacks.quantization import StraightThroughQuantization
from psc_lightning.callbacks.sharing import WeightSharing

__all__ = ["GradientClipping", "MaskLearning", "StraightThroughQuantization", "WeightSharing"]
