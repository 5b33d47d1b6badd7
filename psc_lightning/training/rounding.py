"""The layers of a run whose inputs are rounded: from when on, when ranges are followed, how processes agree on them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import distributed, nn

from psc_lightning.activations import Activations
from psc_lightning.schedule import Schedule

__all__ = ["Rounder", "Rounding"]


class Rounder(Protocol):
    """A callback that has the inputs of layers rounded."""

    schedule: Schedule

    @property
    def state_key(self) -> str:
        """What tells it from others."""

    def attach(self, model: nn.Module) -> list[tuple[str, Activations]]:
        """Round the inputs of every layer it chooses; what it has attached before is left alone."""


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

    def attach(self, module: LightningModule) -> None:
        """Attach all, also in layers that were built since; ranges lie where the model is."""
        self._found = {rounder.state_key: rounder.attach(module) for rounder in self.rounders}
        for inputs in self.layers.values():
            inputs.to(module.device)

    def unshare(self) -> None:
        """Take memory of its own: what is pickled for several processes is one memory for all of them."""
        for bound in self._bounds():
            bound.data = bound.clone()

    def _bounds(self) -> list[torch.Tensor]:
        return [bound for inputs in self.layers.values() for bound in inputs.buffers()]

    # ------------------------------------------------------------------------------------------------- a batch

    def begin_batch(self, step: int, total: float) -> None:
        """Follow the ranges, and round from where the schedule begins."""
        for rounder in self.rounders:
            for _, inputs in self._found[rounder.state_key]:
                inputs.observing, inputs.begun = True, rounder.schedule.strength(step, total) > 0

    def end_batch(self) -> None:
        """No ranges are followed until the next batch."""
        for inputs in self.layers.values():
            inputs.observing = False

    def agree(self) -> None:
        """All processes go on with the mean of the ranges that they have seen."""
        bounds = self._bounds()
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
