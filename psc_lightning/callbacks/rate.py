"""What the bytes of the file cost the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from psc_lightning.options import positive, whole
from psc_lightning.prices import Prices
from psc_lightning.sharding import is_sharded, scatter
from psc_lightning.slots.ladder import descend, rungs_of
from psc_lightning.slots.live import Place
from psc_lightning.training.cast import Cast
from psc_lightning.training.conductor import Conductor
from psc_lightning.words import hinting

__all__ = ["Rate", "RatePenalty"]

BITS = 8000  # of a kilobyte
LADDERS = "StraightThroughQuantization('uniform', bits=3, learned_step=True), or ternary, ttq, log, codebook"


class Rate:
    """The price of a model's levels, as of the last look, and its gradient.

    Attributes:
        bits: what all cores cost, tables and all else apart; None before the first look.
    """

    def __init__(self) -> None:
        self.prices: dict[str, dict[str, Prices]] = {}
        self.bits: float | None = None

    def look(self, places: Iterable[Place]) -> None:
        """Learn the contexts anew, from the latent weights as they are."""
        self.bits = 0.0
        for place in places:
            for core in rungs_of(place.tensor.slots, place.tensor.dense(place.parameter)):
                found = Prices.learn(core.position, core.top, core.keep, core.value)
                self.prices.setdefault(place.name, {})[core.core] = found
                self.bits += found.bits(core.position, core.keep)

    @torch.no_grad()
    def gradients(self, places: Iterable[Place]) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """What is trained of each tensor that has been looked at (its Parameter, or factors), and ∂bits in it."""
        for place in places:
            prices = self.prices.get(place.name, {})
            latent = place.tensor.dense(place.parameter)
            found: dict[str, Tensor] = {}
            for core, position, slope, keep, *_ in rungs_of(place.tensor.slots, latent) if prices else ():
                if slope is not None:
                    rise = prices[core].slope(position).mul_(slope).mul_(position.sign())
                    found[core] = rise if keep is None else rise.mul_(keep)
            for trained, gradient in descend(place.tensor.slots, latent, found) if found else ():
                yield (place.parameter if trained is None else trained), gradient

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        prices = {n: {core: one.state_dict() for core, one in cores.items()} for n, cores in self.prices.items()}
        return {"bits": self.bits, "prices": prices}

    def load_state_dict(self, places: Iterable[Place], state: dict[str, Any]) -> None:
        """Put it back, to where the tensors of these places are."""
        device = {place.name: place.parameter.device for place in places}
        self.bits = state["bits"]
        self.prices = {
            name: {core: Prices.of(one, device[name]) for core, one in cores.items()}
            for name, cores in state["prices"].items()
        }


def add(parameter: nn.Parameter, gradient: Tensor, factor: float) -> None:
    """Add a whole gradient, times a factor, to a Parameter's, which may be a shard."""
    own = parameter.grad
    if own is not None:
        own.add_(like(gradient.to(own.dtype), own), alpha=factor)


def like(full: Tensor, own: Tensor) -> Tensor:
    """A whole tensor as this one is: a shard of it, where this is one."""
    if not is_sharded(own):
        return full
    part = torch.empty_like(own)
    scatter(full, part)
    return part


class RatePenalty(Callback):
    """Adds what the file's bytes cost to the loss: ``loss + weight · kilobytes``, by its gradient at the latent weights.

    The price is that of a coder which knows how full rows, columns and kernel positions are, and how often each level
    occurs (`psc_lightning.prices.Prices`); it is learned anew as the weights move, and has a slope between neighbouring
    levels: ∂/∂w = weight · bits a level · sign(w), straight through the rounding. It acts on every tensor whose levels
    have a zero (`uniform` from 2 bits, `ternary`, `ttq`, `log`, `codebook`), from the step on which they begin. The user's
    loss and its log stay as they are.

    Args:
        weight: what a kilobyte (1,000 bytes) of the file costs, in units of the loss, ≥ 0.
        every: prices are learned anew every so many optimizer steps, ≥ 1.

    Raises:
        ValueError: a wrong value (the argument is named), or, before training, no levels with a zero.

    >>> RatePenalty(weight=0.01).weight
    0.01

    Source: Oktay et al. 2020, "Scalable model compression by entropy penalized reparameterization" (a rate in the loss);
    ours has no density model to train: the slope is that of the live codes' own counts.
    """

    @hinting
    def __init__(self, weight: float, every: int = 20) -> None:
        super().__init__()
        self.weight, self.every = positive("weight", weight), whole("every", every, 1)
        self.rate = Rate()
        self._seen = -1  # the step of the last look

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take part in a fit."""
        if stage == "fit":
            self.rate, self._seen = Rate(), -1
            Conductor.of(trainer).join_penalty(trainer, self)

    def check(self, cast: Cast) -> None:
        """Refuse a model without levels that have a zero."""
        if not any(map(has_ladder, cast.everywhere())):
            found = sorted({place.tensor.slots.method for place in cast.everywhere()}) or ["nothing is compressed"]
            raise ValueError(f"RatePenalty needs levels that have a zero, found {', '.join(found)}: add {LADDERS}")

    def control(self, cast: Cast, step: int) -> None:
        """Learn prices, where it is time."""
        if step % self.every == 0 and step != self._seen:
            self._seen = step
            self.rate.look(cast.everywhere())

    def before_step(self, places: list[Place], scale: float) -> None:
        """Add the price's gradient."""
        for parameter, gradient in self.rate.gradients(places) if self.weight else ():
            add(parameter, gradient, scale * self.weight / BITS)

    def finish(self, cast: Cast, settle: Callable[[], None]) -> None:
        """Nothing is left to do."""

    def penalty_state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"seen": self._seen, **self.rate.state_dict()}

    def load_penalty_state(self, cast: Cast, state: dict[str, Any]) -> None:
        """Put it back."""
        self._seen = state["seen"]
        self.rate.load_state_dict(cast.everywhere(), state)


def has_ladder(place: Place) -> bool:
    """Whether a tensor has levels that a weight could be drawn down, to zero."""
    return any(chain.levels is not None and chain.levels.rungs for chain in place.tensor.slots.chains())
