"""What is to be known of a run. Some of it Lightning assigns and declares nowhere."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from psc_lightning.slots.targets import Idle, Target, frozen

__all__ = ["builds_late", "callbacks_of", "idle_in", "insert", "is_named", "user_rate"]


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """All callbacks of a run, in their order."""
    found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # assigned by a connector, declared nowhere
    return found


def insert(trainer: Trainer, place: int, callback: Callback) -> None:
    """Add a callback; in a new list, for the old one may be iterated over."""
    callbacks = callbacks_of(trainer)
    trainer.callbacks = [*callbacks[:place], callback, *callbacks[place:]]  # type: ignore[attr-defined]  # as above


def is_named(thing: object, *names: str) -> bool:
    """Whether it is of a class so named: `lightning` and `pytorch_lightning` have one each."""
    return any(base.__name__ in names for base in type(thing).__mro__)


def idle_in(trainer: Trainer, optimizers: list[Optimizer]) -> Idle:
    """Which tensors a run does not train: frozen ones, and, once its optimizers are known, those that none holds.

    What a fine-tuning callback has frozen it will unfreeze, and hand to an optimizer then.
    """
    held = {id(parameter) for one in optimizers for group in one.param_groups for parameter in group["params"]}
    thaws = any(is_named(callback, "BaseFinetuning") for callback in callbacks_of(trainer))

    def idle(target: Target) -> str | None:
        if thaws:
            return None
        unheld = held and id(target.parameter) not in held
        return frozen(target) or ("in no optimizer" if unheld else None)

    return idle


def builds_late(module: LightningModule) -> bool:
    """Whether the user's class overrides `setup` or `configure_model`, where it may build layers."""
    hooks = (getattr(type(module), name) for name in ("setup", "configure_model"))
    return any(hook.__module__.split(".")[0] not in ("lightning", "pytorch_lightning") for hook in hooks)


def user_rate(optimizers: list[Optimizer], initial: bool = False) -> float | None:
    """The learning rate of the user's first group: now, or the one that its scheduler started from."""
    group: dict[str, Any] = next((group for one in optimizers for group in one.param_groups), {})
    found = (group.get("max_lr") or group.get("initial_lr") or group.get("lr")) if initial else group.get("lr")
    return None if found is None else float(found)
