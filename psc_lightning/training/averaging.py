"""Averages of the latent weights, beside those that Lightning's averaging callbacks keep of the Parameters.

A mean of hard weights is not hard, and knows less than a mean of latent ones. So each average of a Parameter that is
compressed gets a mean of its latent weight, formed by the callback's own function whenever it forms its own, and is made
hard from that before it is looked at: judged, saved, or taken over at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_swa_multi_avg_fn

from psc_lightning.sharding import gather
from psc_lightning.slots.live import Place
from psc_lightning.training.run import is_named

__all__ = ["Average"]


class Average:
    """What one averaging callback (WeightAveraging and its kinds, StochasticWeightAveraging) averages.

    Args:
        callback: the averaging callback.
    """

    def __init__(self, callback: Any) -> None:
        self.callback = callback
        self.swa = is_named(callback, "StochasticWeightAveraging")
        self.latents: dict[str, Tensor] = {}
        self.number = 0

    @property
    def _count(self) -> int:
        number = self.callback.n_averaged if self.swa else getattr(self.callback._average_model, "n_averaged", 0)
        return 0 if number is None else int(number)

    def _means(self, model: nn.Module) -> dict[nn.Parameter, Tensor]:
        """Each Parameter's average, as the callback has it."""
        average = self.callback._average_model
        if average is None:
            return {}
        module = average if self.swa else average.module
        return {own: mean.detach() for own, mean in zip(model.parameters(), module.parameters())}

    def begin(self, model: nn.Module, place: Place) -> None:
        """A slot begins: until now the average was one of latent weights itself."""
        mean = self._means(model).get(place.parameter)
        if mean is not None and place.name not in self.latents:
            self.latents[place.name] = mean.clone()

    @torch.no_grad()
    def follow(self, places: Iterable[Place]) -> None:
        """Form the means of the latent weights, if the callback has formed its own since."""
        before, self.number = self.number, self._count
        if self.number <= before:
            return
        begun = [place for place in places if place.tensor.latent is not None]
        new = [place for place in begun if not before or place.name not in self.latents]  # the first is a copy
        for place in new:
            self.latents[place.name] = place.tensor.dense(place.parameter).clone()
        old = [place for place in begun if place not in new]
        means = [self.latents[place.name] for place in old]
        now = [place.tensor.dense(place.parameter).to(mean.device) for place, mean in zip(old, means)]
        self._form(means, now, torch.tensor(self.number - 1))

    def _form(self, means: list[Tensor], now: list[Tensor], number: Tensor) -> None:
        several = None if self.swa else self.callback._average_model.multi_avg_fn
        one = self.callback._avg_fn if self.swa else self.callback._average_model.avg_fn
        if not means:
            return
        if several is not None or one is None:
            swa = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]  # torch's
            (several or swa)(means, now, number)
            return
        for mean, latent in zip(means, now):
            mean.copy_(one(mean, latent, number))

    @torch.no_grad()
    def show(self, model: nn.Module, places: Iterable[Place]) -> None:
        """Let the average hold hard weights, made of the means under the sidecars of now."""
        means = self._means(model) if self.latents else {}
        for place in places:
            mean, latent = means.get(place.parameter), self.latents.get(place.name)
            if mean is not None and latent is not None:
                slots = place.tensor.slots.twin()
                slots.refresh(latent)
                mean.copy_(slots.make(latent))

    @torch.no_grad()
    def adopt(self, places: Iterable[Place], end: bool = False) -> None:
        """Where the callback has put its average into the model, put the means there, too."""
        averaged = [place for place in places if place.name in self.latents]
        taken = end and not self.swa  # at the end it always does
        if taken or (averaged and all(place.tensor.written(place.parameter) for place in averaged)):
            for place in averaged:
                place.tensor.follow(place.parameter, self.latents[place.name])

    def state_dict(self) -> dict[str, Any]:
        """The means and how many there were."""
        return {"number": self.number, "latents": {name: gather(value) for name, value in self.latents.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put them back."""
        self.number, self.latents = state["number"], dict(state["latents"])
