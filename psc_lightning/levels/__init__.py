"""The third slot: which values weights may take."""

from __future__ import annotations

from psc_lightning.levels.base import Levels
from psc_lightning.levels.binary import FORMS, BinaryLevels
from psc_lightning.levels.codebook import CodebookLevels
from psc_lightning.levels.half import BFloat16Levels, Float16Levels
from psc_lightning.levels.log import ROOTS, LogLevels
from psc_lightning.levels.ternary import TernaryLevels
from psc_lightning.levels.ttq import TrainedTernaryLevels
from psc_lightning.levels.uniform import UniformLevels

__all__ = ["FORMS", "LEVELS", "ROOTS", "Levels"]

#: Name → method; also the allow-list for reading files.
LEVELS: dict[str, type[Levels]] = {
    "float16": Float16Levels,
    "bfloat16": BFloat16Levels,
    "uniform": UniformLevels,
    "binary": BinaryLevels,
    "ternary": TernaryLevels,
    "log": LogLevels,
    "codebook": CodebookLevels,
    "ttq": TrainedTernaryLevels,
}
