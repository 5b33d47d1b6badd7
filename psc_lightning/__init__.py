"""Make a network small while it is being fine-tuned with PyTorch Lightning, and hand over a real small file.

Names are imported on first use, so that reading a file (`load`) needs torch but not Lightning.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psc_lightning.artifact import ArtifactError, load, load_into, measure, save, verify
    from psc_lightning.callbacks import (
        ActivationQuantization,
        ByteBudget,
        Distillation,
        GradientClipping,
        MaskLearning,
        RatePenalty,
        StraightThroughQuantization,
        WeightSharing,
    )
    from psc_lightning.callbacks.presets import preset
    from psc_lightning.coarseness import Coarsest, coarsest
    from psc_lightning.configs import config_dir
    from psc_lightning.export.onnx import export_onnx
    from psc_lightning.folding import fold_batchnorm
    from psc_lightning.loading import load_checkpoint
    from psc_lightning.oneshot import Plan, attach, compress, plan
    from psc_lightning.pages.history import History
    from psc_lightning.probing import Sensitivity, sensitivity
    from psc_lightning.report.numbers import Report, TensorReport
    from psc_lightning.schedule import Schedule
    from psc_lightning.slots.live import detach
    from psc_lightning.training.batchnorm import refresh_batchnorm

__version__ = "0.1.0"

_HOMES = {
    "artifact": ("ArtifactError", "load", "load_into", "measure", "save", "verify"),
    "callbacks": (
        "ActivationQuantization",
        "ByteBudget",
        "Distillation",
        "GradientClipping",
        "MaskLearning",
        "RatePenalty",
        "StraightThroughQuantization",
        "WeightSharing",
    ),
    "callbacks.presets": ("preset",),
    "coarseness": ("Coarsest", "coarsest"),
    "configs": ("config_dir",),
    "export.onnx": ("export_onnx",),
    "folding": ("fold_batchnorm",),
    "slots.live": ("detach",),
    "loading": ("load_checkpoint",),
    "oneshot": ("Plan", "attach", "compress", "plan"),
    "pages.history": ("History",),
    "probing": ("Sensitivity", "sensitivity"),
    "report.numbers": ("Report", "TensorReport"),
    "schedule": ("Schedule",),
    "training.batchnorm": ("refresh_batchnorm",),
}

__all__ = [
    "ActivationQuantization",
    "ArtifactError",
    "ByteBudget",
    "Coarsest",
    "Distillation",
    "GradientClipping",
    "History",
    "MaskLearning",
    "Plan",
    "RatePenalty",
    "Report",
    "Schedule",
    "Sensitivity",
    "StraightThroughQuantization",
    "TensorReport",
    "WeightSharing",
    "attach",
    "coarsest",
    "compress",
    "config_dir",
    "detach",
    "export_onnx",
    "fold_batchnorm",
    "load",
    "load_checkpoint",
    "load_into",
    "measure",
    "plan",
    "preset",
    "refresh_batchnorm",
    "save",
    "sensitivity",
    "verify",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"psc_lightning.{home}"), name)
            globals()[name] = value
            return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):  # `psc_lightning.configs.register()`
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
