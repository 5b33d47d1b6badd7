"""The other callbacks of a run. Lightning gives a Trainer its `callbacks` without declaring them: their type is said here."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer

__all__ = ["bears", "callbacks_of", "reorder"]


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """All callbacks of a run, in their order."""
    found: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # assigned by a connector, declared nowhere
    return found


def reorder(trainer: Trainer, callbacks: list[Callback]) -> None:
    """Let callbacks run in another order; a new list, for the old one may be iterated over."""
    trainer.callbacks = callbacks  # type: ignore[attr-defined]  # as above


def bears(thing: object, *names: str) -> bool:
    """Whether it is of a class so named: `lightning` and `pytorch_lightning` have one each."""
    return any(base.__name__ in names for base in type(thing).__mro__)
