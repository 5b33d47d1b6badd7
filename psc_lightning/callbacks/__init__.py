"""The callbacks that a user adds to a Trainer."""

from __future__ import annotations

from psc_lightning.callbacks.activations import ActivationQuantization
from psc_lightning.callbacks.budget import ByteBudget
from psc_lightning.callbacks.clipping import GradientClipping
from psc_lightning.callbacks.distillation import Distillation
from psc_lightning.callbacks.mask import MaskLearning
from psc_lightning.callbacks.quantization import StraightThroughQuantization
from psc_lightning.callbacks.rate import RatePenalty
from psc_lightning.callbacks.sharing import WeightSharing

__all__ = [
    "ActivationQuantization",
    "ByteBudget",
    "Distillation",
    "GradientClipping",
    "MaskLearning",
    "RatePenalty",
    "StraightThroughQuantization",
    "WeightSharing",
]
