"""The settings of conf/train.yaml that no class checks for itself, or only once a run is under way."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from omegaconf import DictConfig, OmegaConf

from psc_lightning.app.errors import UsageError
from psc_lightning.artifact.leftovers import LEFTOVERS
from psc_lightning.options import positive, whole

__all__ = ["check_settings"]

_OURS = ("name", "callbacks", "untied")
_ALWAYS = (*_OURS, "threshold", "targets", "ignore", "min_size", "refresh_batchnorm")
GROUPS = ("compression", "clipping", "data", "model", "optimizer", "trainer", "logger", "callbacks")


def _check_read(cfg: DictConfig) -> None:
    """Refuse a key of `compression` that none of its callbacks refers to."""
    callbacks = OmegaConf.to_yaml(cfg.compression.callbacks)
    if "${" not in callbacks:
        return  # a run's own record, in which all is resolved
    read = {*re.findall(r"\$\{compression\.(\w+)\}", callbacks), *_ALWAYS}
    if unread := sorted(str(key) for key in cfg.compression if key not in read):
        raise UsageError(f"compression.{unread[0]}: nothing reads it; there are {', '.join(sorted(read - {*_OURS}))}")


def check_settings(cfg: DictConfig) -> None:
    """Raise for a value that would fail later, or not at all; the message begins with its key.

    Raises:
        UsageError, ValueError: it is of another type or out of range.
    """
    value: Callable[[str], Any] = partial(OmegaConf.select, cfg)  # None where a key is missing
    for key in (*GROUPS, "compression.callbacks", "model.net", "baseline", "checkpoint"):
        if not isinstance(value(key), DictConfig):
            hint = f": choose one of the files in conf/{key}" * (key in GROUPS)
            raise UsageError(f"{key}: expected keys and values, found {value(key)!r}{hint}")
    _check_read(cfg)
    whole("seed", value("seed"), 0, 2**32 - 1)
    whole("batchnorm", value("batchnorm"), 0)
    whole("checkpoint.every_n_steps", value("checkpoint.every_n_steps"), 1)
    whole("baseline.max_epochs", value("baseline.max_epochs"), 0)
    positive("baseline.lr", value("baseline.lr"))
    if value("threads") is not None:
        whole("threads", value("threads"), 1)
    if not isinstance(value("leftovers"), DictConfig) and value("leftovers") not in tuple(LEFTOVERS):
        raise UsageError(
            f"leftovers={value('leftovers')}: not one of {', '.join(LEFTOVERS)}, nor a mapping of globs to them"
        )
    if not isinstance(value("fold_batchnorm"), DictConfig | bool):
        raise UsageError(
            f"fold_batchnorm={value('fold_batchnorm')}: not true, false or a mapping of layers to BatchNorms"
        )
    for key in ("trainer.max_epochs", "trainer.max_steps"):
        if value(key) is not None:
            whole(key, value(key), -1)
    if value("trainer.max_epochs") == value("trainer.max_steps") == -1 and not value("trainer.max_time"):
        raise UsageError("trainer.max_epochs=-1: training would have no end; give trainer.max_steps")
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        if value(f"trainer.{key}") == 0 and value("compression.callbacks"):
            raise UsageError(f"trainer.{key}=0: nothing would be trained, so nothing compressed")
    if value("trainer.fast_dev_run") and value("compression.callbacks"):
        raise UsageError(
            "trainer.fast_dev_run: its few steps would compress nothing; for a quick try give trainer.max_epochs=1 and "
            "trainer.limit_train_batches=20"
        )
    if value("trainer.limit_test_batches") == 0:
        raise UsageError("trainer.limit_test_batches=0: the file would not be evaluated; expected 1 or more batches")
