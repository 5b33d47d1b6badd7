"""Checkpoints that load in the user's own class, where psc_lightning was never installed.

In a checkpoint ``state_dict`` holds the plain keys with the effective weights; what training needs to go on (dense
weights, scores, centroids) lies under a key of its own and is put back before the module is loaded. The LightningModule's
own hooks are the right place: they run after every callback's on saving (so after weight averaging), before the module is
loaded on restoring, and also for ``save_weights_only``.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule

from psc_lightning.callbacks.company import callbacks_of
from psc_lightning.sharding import sharded_modules
from psc_lightning.view import derive, plain_class, plain_state

__all__ = ["TRAINING_STATE", "make_plain"]

TRAINING_STATE = "psc_lightning"


def make_plain(module: LightningModule) -> None:
    """Let a LightningModule write plain checkpoints, and attach callbacks to layers that it builds late; idempotent."""
    if getattr(type(module), "_psc_plain", False):
        return
    derive(module, _hooks)


def _hooks(base: type[LightningModule]) -> dict[str, Any]:
    def on_save_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
        base.on_save_checkpoint(self, checkpoint)
        if sharded_modules(self):
            return  # sharded strategies keep their native keys
        training = checkpoint["state_dict"]
        plain = plain_state(self, training)
        checkpoint[TRAINING_STATE] = {key: value for key, value in training.items() if plain.get(key) is not value}
        checkpoint["state_dict"] = plain

    def on_load_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
        if TRAINING_STATE in checkpoint:  # not where the model is sharded: its strategy has loaded it already
            checkpoint["state_dict"] = {**checkpoint["state_dict"], **checkpoint[TRAINING_STATE]}
        base.on_load_checkpoint(self, checkpoint)

    def setup(self: LightningModule, stage: str) -> None:
        base.setup(self, stage)
        _attach_late(self)

    def configure_model(self: LightningModule) -> None:
        base.configure_model(self)
        _attach_late(self)

    hooks = {"on_save_checkpoint": on_save_checkpoint, "on_load_checkpoint": on_load_checkpoint, "_psc_plain": True}
    # Lightning asks whether these two are overridden, so they must not be where the user did not.
    for late in (setup, configure_model):
        if builds_late(base, late.__name__):
            hooks[late.__name__] = late
    return hooks


def builds_late(cls: type, hook: str) -> bool:
    """Whether the user's class overrides `setup` or `configure_model`, where it may build layers."""
    return getattr(plain_class(cls), hook).__module__.split(".")[0] not in ("lightning", "pytorch_lightning")


def _attach_late(module: LightningModule) -> None:
    for callback in callbacks_of(module.trainer):
        attach = getattr(callback, "attach_late", None)
        if attach is not None:
            attach(module)
