"""The layers of a run whose inputs are rounded: from when on, when ranges are followed, how processes agree on them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import distributed, nn

from psc_lightning.activations import Activations, let_go, of
from psc_lightning.schedule import Schedule
from psc_lightning.slots.targets import Idle, Selection

__all__ = ["Rounder", "Rounding"]


class Rounder(Protocol):
    """A callback that has the inputs of layers rounded."""

    schedule: Schedule

    @property
    def state_key(self) -> str:
        """What tells it from others."""

    @property
    def settings(self) -> dict[str, Any]:
        """When it acts, as primitives."""

    def choose(self, model: nn.Module, idle: Idle) -> Selection:
        """The weights of the layers that it takes, and why it leaves the others."""

    def attach(self, model: nn.Module, chosen: Selection) -> list[tuple[str, Activations]]:
        """Round the inputs of every chosen layer; what it has attached before is left alone."""


class Rounding:
    """The callbacks of a run that have inputs rounded, and what they have attached."""

    def __init__(self) -> None:
        self.rounders: list[Rounder] = []
        self._found: dict[str, list[tuple[str, Activations]]] = {}

    @property
    def layers(self) -> dict[str, Activations]:
        """Each layer's name, and what rounds its inputs."""
        return {name: inputs for found in self._found.values() for name, inputs in found}

    def start(self, present: list[Any]) -> None:
        """Forget callbacks that are not there any more."""
        self.rounders = [one for one in self.rounders if any(one is other for other in present)]

    def add(self, rounder: Rounder) -> None:
        """Take in a callback."""
        if rounder not in self.rounders:
            self.rounders.append(rounder)

    def attach(self, module: LightningModule, idle: Idle) -> None:
        """Attach all, also in layers that were built since; ranges lie where the model is."""
        self._found = {one.state_key: one.attach(module, one.choose(module, idle)) for one in self.rounders}
        for inputs in self.layers.values():
            inputs.to(module.device)
        chosen = {id(inputs) for inputs in self.layers.values()}
        for layer in module.modules():  # attached before the optimizers were known, and not to begin in this run
            found = of(layer)
            if found is not None and found.owner in self._found and not found.begun and id(found) not in chosen:
                let_go(layer)

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """Each layer's name, and when its inputs are rounded."""
        return {name: one.settings for one in self.rounders for name, _ in self._found[one.state_key]}

    def unshare(self) -> None:
        """Take memory of its own: what is pickled for several processes is one memory for all of them."""
        for bound in (bound for inputs in self.layers.values() for bound in inputs.buffers()):
            bound.data = bound.clone()

    # ------------------------------------------------------------------------------------------------- a batch

    def act(self, rounder: Rounder, strength: float) -> None:
        """Round from where the schedule begins."""
        for _, inputs in self._found[rounder.state_key]:
            inputs.begun = strength > 0

    def observe(self) -> None:
        """Follow the ranges of the batch that comes."""
        for inputs in self.layers.values():
            inputs.observe()

    def settle(self) -> None:
        """No ranges are followed until the next batch."""
        for inputs in self.layers.values():
            inputs.observing = False

    def agree(self) -> None:
        """All processes go on with the mean of the ranges that they have seen."""
        followed = [one for inputs in self.layers.values() for one in inputs.followed()]
        bounds = [bound for one in followed for bound in (one.low, one.high)]
        if bounds and distributed.is_available() and distributed.is_initialized():
            sums = torch.cat([bound.reshape(-1) for bound in bounds])
            distributed.all_reduce(sums)
            means = sums / distributed.get_world_size()
            for bound, mean in zip(bounds, torch.split(means, [bound.numel() for bound in bounds])):
                bound.copy_(mean.reshape(bound.shape))

    def warn_unbegun(self, step: int) -> None:
        """Warn where training ended before a schedule began."""
        for rounder in self.rounders:
            found = self._found[rounder.state_key]
            if found and not any(inputs.begun for _, inputs in found):
                rank_zero_warn(
                    f"{type(rounder).__name__} never began: training ended at step {step}. Inputs are not rounded; train "
                    "longer, or give an earlier begin."
                )
