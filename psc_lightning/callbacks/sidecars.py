"""Gradients of what a slot trains beside the weights, which the user's optimizers, zero_grad and scaler pass by."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from psc_lightning.sharding import gather

__all__ = ["Gradients"]


class Gradients:
    """Lets each sidecar learn from the losses that its weight learns from, and from no step that is skipped.

    With one optimizer and no scaler the gradients stay where they are. Else each of the user's steps puts its share
    aside: what a later loss of the same batch adds must not be taken for it.

    Args:
        pairs: a weight and what is trained beside it.
        weights: all that are looked at; those that are frozen now are taken to be frozen for good.
    """

    def __init__(self, pairs: list[tuple[nn.Parameter, nn.Parameter]], weights: list[nn.Parameter]) -> None:
        self.pairs = pairs
        self.frozen = {weight for weight in weights if not weight.requires_grad}
        self.aside: dict[nn.Parameter, Tensor] = {}

    def unscale(self, trainer: Trainer) -> None:
        """Bring them to the size that the scaler has brought the optimizer's to."""
        scaler = _scaler(trainer)
        for _, sidecar in self.pairs if scaler is not None else ():
            if sidecar.grad is not None:
                sidecar.grad.div_(scaler.get_scale())

    def labels(self, trainer: Trainer, optimizer: Optimizer, weights: list[nn.Parameter]) -> set[nn.Parameter]:
        """Which of the weights have a label in this step of one optimizer: its own; a step that is skipped has none.

        What `toggle_optimizer` has frozen keeps the gradient of an older loss; of weights that are always frozen it is
        what is trained beside them that has labels.
        """
        scaler = _scaler(trainer)
        if scaler is not None and _overflows(scaler, optimizer):
            return set()
        own = _held([optimizer])
        return {w for w in weights if id(w) in own or (w in self.frozen and not w.requires_grad)}

    @torch.no_grad()
    def put_aside(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Take in a step of one optimizer, which is about to be taken or skipped."""
        scaler = _scaler(trainer)
        if scaler is None and len(trainer.optimizers) < 2:
            return
        own = _held([optimizer])
        others = _held([other for other in trainer.optimizers if other is not optimizer])
        skipped = scaler is not None and _overflows(scaler, optimizer)
        for weight, sidecar in self.pairs:
            # Frozen for this loss (`toggle_optimizer`); of weights that are always frozen the sidecars learn.
            toggled = not weight.requires_grad and weight not in self.frozen and id(weight) in own | others
            if skipped and id(weight) not in others:
                self.aside.pop(sidecar, None)
            elif sidecar.grad is not None and not toggled:
                before = self.aside.get(sidecar)
                self.aside[sidecar] = sidecar.grad if before is None else before + sidecar.grad
            sidecar.grad = None

    def step(self, trainer: Trainer, optimizer: Optimizer, asleep: set[int]) -> None:
        """Step the sidecars' own optimizer, but for those that sleep, where every gradient is finite."""
        left: dict[nn.Parameter, Tensor | None] = {}
        if _scaler(trainer) is not None or len(trainer.optimizers) > 1:
            # What a loss left that no step has followed yet is for the next one, as it is for the weights.
            left = {sidecar: sidecar.grad for _, sidecar in self.pairs}
            for sidecar in left:
                sidecar.grad = self.aside.get(sidecar)
        self.aside = {}
        for _, sidecar in self.pairs:
            if id(sidecar) in asleep:
                sidecar.grad = None
        grads = [sidecar.grad for _, sidecar in self.pairs if sidecar.grad is not None]
        if grads and all(bool(gather(grad.isfinite().all())) for grad in grads):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for sidecar, gradient in left.items():
            sidecar.grad = gradient


def _scaler(trainer: Trainer) -> Any:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _held(optimizers: list[Optimizer]) -> set[int]:
    return {id(parameter) for one in optimizers for group in one.param_groups for parameter in group["params"]}


def _overflows(scaler: Any, optimizer: Optimizer) -> bool:
    """Whether the scaler will skip this step: by its own record, for clipping may have hidden what it saw."""
    found = scaler._found_inf_per_device(optimizer) or scaler._check_inf_per_device(optimizer)  # the latter: fused ones
    return any(bool(value) for value in found.values())
