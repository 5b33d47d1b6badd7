"""A configuration's settings checked, and its callbacks, data, module, Trainer and logger built; errors name the key."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from torch import nn

import psc_lightning
from psc_lightning.app.errors import UsageError, explain
from psc_lightning.app.sweep import check_sweeper
from psc_lightning.app.task import Classifier
from psc_lightning.artifact.leftovers import LEFTOVERS
from psc_lightning.callbacks.presets import readers, wanted
from psc_lightning.coarseness import AUTO
from psc_lightning.options import positive, whole
from psc_lightning.words import hint

__all__ = [
    "build_callbacks",
    "build_data",
    "build_logger",
    "build_module",
    "build_trainer",
    "check_plan",
    "check_settings",
    "seed",
]

log = logging.getLogger(__name__)

_OURS = ("name", "callbacks", "untied")
_ALWAYS = (*_OURS, "threshold", "targets", "ignore", "min_size", "refresh_batchnorm")
GROUPS = ("compression", "clipping", "distillation", "data", "model", "optimizer", "trainer", "logger", "callbacks")


def build_callbacks(cfg: DictConfig) -> list[Callback]:
    """Return the callbacks of the preset, of the clipping, and the user's own."""
    nodes = {f"compression.callbacks.{name}": node for name, node in wanted(cfg.compression).items()}
    nodes |= {key: cfg[key] for key in ("clipping", "distillation") if cfg[key]}
    nodes |= {f"callbacks.{name}": node for name, node in cfg.callbacks.items()}
    if "mask" not in cfg.compression.callbacks and cfg.compression.get("threshold"):
        log.info("compression has no mask, and ignores compression.threshold=%s", cfg.compression.threshold)
    return [build(node, key) for key, node in nodes.items()]


def build_data(cfg: DictConfig) -> LightningDataModule:
    """Return the data, read."""
    data = build(cfg.data, "data")
    if not isinstance(data, LightningDataModule):
        raise UsageError(f"data._target_: {cfg.data._target_} gives a {type(data).__name__}, not a LightningDataModule")
    data.prepare_data()
    data.setup("fit")
    return data


def build_module(cfg: DictConfig, **optimizer: Any) -> LightningModule:
    """Return a freshly initialised module: the user's LightningModule, or a `Classifier` around the user's network."""
    seed(cfg)
    net = build(cfg.model.net, "model.net")
    if isinstance(net, LightningModule):
        return net
    if not isinstance(net, nn.Module):
        raise UsageError(f"model.net._target_: {cfg.model.net._target_} gives a {type(net).__name__}, not an nn.Module")
    make = build(cfg.optimizer, "optimizer", **optimizer)
    with explain("optimizer"):
        make([nn.Parameter(torch.zeros(1))])  # a wrong value shows now, not after the data are read
    with explain("model"):
        return Classifier(net, make, cfg.model.classes, cfg.model.decay, cfg.model.channels_last, cfg.model.task)


def build_trainer(cfg: DictConfig, **settings: Any) -> Trainer:
    """Return a Trainer with the configuration's arguments, overridden by `settings`."""
    if settings.get("enable_progress_bar", cfg.trainer.enable_progress_bar) is None:
        settings["enable_progress_bar"] = sys.stdout.isatty()  # which Lightning draws it on
    make = build(cfg.trainer, "trainer", _partial_=True)
    with explain("trainer"):
        try:
            trainer: Trainer = make(**settings)
        except lightning.fabric.utilities.exceptions.MisconfigurationException as error:
            raise UsageError(f"trainer: {error}") from error
    if trainer.world_size > 1 and HydraConfig.initialized():
        check_sweeper(HydraConfig.get())
    return trainer


def build_logger(cfg: DictConfig, folder: Path) -> Any:
    """Return the logger, or False for none."""
    return build(cfg.logger, "logger", save_dir=str(folder)) if cfg.logger else False


def build(node: DictConfig, key: str, **settings: Any) -> Any:
    """Instantiate one node of the configuration, as plain Python values; its errors name `key`."""
    with explain(key):
        return instantiate(node, _convert_="all", **settings)


def seed(cfg: DictConfig) -> None:
    """Seed Python, NumPy and torch."""
    lightning.seed_everything(cfg.seed, verbose=False)


def check_plan(module: LightningModule, callbacks: list[Callback]) -> None:
    """Find wrong targets before time is spent on training (a module that builds its layers later is checked in fit)."""
    if next(module.parameters(), None) is not None:
        with explain("compression"):
            psc_lightning.plan(module, callbacks)


def _check_read(cfg: DictConfig) -> None:
    """Refuse a key of `compression` that none of its callbacks refers to."""
    callbacks = OmegaConf.to_yaml(cfg.compression.callbacks)
    if "${" not in callbacks:
        return  # a run's own record, in which all is resolved
    read = {*re.findall(r"\$\{compression\.(\w+)\}", callbacks), *_ALWAYS}
    if unread := sorted(str(key) for key in cfg.compression if key not in read):
        there, word = sorted(read - {*_OURS}), unread[0]
        meant = hint(word, there) or readers(word)
        raise UsageError(f"compression.{word}: nothing reads it; there are {', '.join(there)}{meant}")


def check_settings(cfg: DictConfig) -> None:
    """Raise for a value that would fail later, or not at all; the message begins with its key.

    Raises:
        UsageError, ValueError: it is of another type or out of range.
    """
    value: Callable[[str], Any] = partial(OmegaConf.select, cfg)  # None where a key is missing
    for key in (*GROUPS, "compression.callbacks", "model.net", "baseline", "checkpoint"):
        if not isinstance(value(key), DictConfig):
            advice = f": choose one of the files in conf/{key}" * (key in GROUPS)
            raise UsageError(f"{key}: expected keys and values, found {value(key)!r}{advice}")
    _check_read(cfg)
    whole("seed", value("seed"), 0, 2**32 - 1)
    whole("batchnorm", value("batchnorm"), 0)
    whole("checkpoint.every_n_steps", value("checkpoint.every_n_steps"), 1)
    whole("baseline.max_epochs", value("baseline.max_epochs"), 0)
    positive("baseline.lr", value("baseline.lr"))
    if value("threads") is not None:
        whole("threads", value("threads"), 1)
    if not isinstance(value("leftovers"), DictConfig) and value("leftovers") not in (AUTO, *LEFTOVERS):
        raise UsageError(
            f"leftovers={value('leftovers')}: not one of {', '.join((AUTO, *LEFTOVERS))}, nor a mapping of globs to them"
        )
    if not isinstance(value("fold_batchnorm"), DictConfig | bool) and value("fold_batchnorm") != AUTO:
        raise UsageError(
            f"fold_batchnorm={value('fold_batchnorm')}: not auto, true, false or a mapping of layers to BatchNorms"
        )
    for key in ("trainer.max_epochs", "trainer.max_steps"):
        if value(key) is not None:
            whole(key, value(key), -1)
    if value("trainer.max_epochs") == value("trainer.max_steps") == -1 and not value("trainer.max_time"):
        raise UsageError("trainer.max_epochs=-1: training would have no end; give trainer.max_steps")
    for key in ("max_epochs", "max_steps", "limit_train_batches"):
        if value(f"trainer.{key}") == 0 and wanted(cfg.compression):
            raise UsageError(f"trainer.{key}=0: nothing would be trained, so nothing compressed")
    if value("trainer.fast_dev_run") and wanted(cfg.compression):
        raise UsageError(
            "trainer.fast_dev_run: its few steps leave no checkpoint and tell nothing; for a quick try give "
            "trainer.max_epochs=1 and trainer.limit_train_batches=20"
        )
    if value("trainer.limit_test_batches") == 0:
        raise UsageError("trainer.limit_test_batches=0: the file would not be evaluated; expected 1 or more batches")
