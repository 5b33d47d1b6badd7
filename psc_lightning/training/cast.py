"""Who takes part in a run, in which tensors, and from which step on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from psc_lightning.schedule import Schedule
from psc_lightning.slots.live import Place, compressed, forget
from psc_lightning.slots.slots import SLOTS
from psc_lightning.slots.targets import Idle, Selection, left_out
from psc_lightning.training.batchnorm import MOST, SHARE
from psc_lightning.training.rounding import Rounder, Rounding
from psc_lightning.training.run.length import Length
from psc_lightning.training.sidecars import Sidecars

__all__ = ["Cast", "Clipper", "Penalty", "SlotFiller"]


class SlotFiller(Protocol):
    """A callback that fills one slot of some tensors."""

    method: str
    schedule: Schedule
    lr: float
    refresh: int
    calibration_steps: int
    calibration_given: bool  # else it is a default, which short runs cut
    refresh_batchnorm: int | None

    @property
    def slot(self) -> str:
        """Which slot."""

    @property
    def state_key(self) -> str:
        """What tells it from others."""

    @property
    def settings(self) -> dict[str, Any]:
        """How and when it acts, as primitives."""

    def choose(self, model: nn.Module, idle: Idle) -> Selection:
        """The tensors it takes, and why it leaves the others."""

    def attach(self, model: nn.Module, chosen: Selection) -> list[Place]:
        """Fill the slot of every chosen tensor; what it has filled before is left alone."""

    def check(self, model: nn.Module) -> None:
        """Refuse, before training, what cannot be trained or saved."""


class Clipper(Protocol):
    """A callback that limits the gradients that a step sees."""

    @property
    def settings(self) -> dict[str, Any]:
        """How, as primitives."""

    def check(self, trainer: Trainer) -> None:
        """Refuse, before training, what cannot work."""

    def before_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Limit the gradients of an optimizer's parameters, which hold latent weights now."""


class Penalty(Protocol):
    """A callback that adds to the gradients of latent weights, and may steer what it adds."""

    @property
    def state_key(self) -> str:
        """What tells it from others."""

    def check(self, cast: Cast) -> None:
        """Refuse, before training, what cannot work."""

    def control(self, cast: Cast, step: int) -> None:
        """Before a batch: look at the weights, which are hard, and steer."""

    def before_step(self, places: list[Place], scale: float) -> None:
        """Add to the gradients of what an optimizer updates now, which hold latent weights; all are multiplied by `scale`."""

    def finish(self, cast: Cast, settle: Callable[[], None]) -> None:
        """After the last step: the weights are hard, and may be changed once more; `settle` what follows from them then."""

    def penalty_state(self) -> dict[str, Any]:
        """What a checkpoint needs."""

    def load_penalty_state(self, cast: Cast, state: dict[str, Any]) -> None:
        """Put it back."""


@dataclass
class Cast:
    """Our callbacks of a run, and what they share.

    Attributes:
        fillers: in the order of the slots, whatever the user's.
        clippers, penalties: in the user's.
        places: where the tensors of each filler are, by its key.
        rounding: those that have inputs rounded, and where.
        left: what to say of tensors that only defaults leave out.
        sidecars: the optimizer of what slots train.
        length: how long the run is.
        reached: the strength of each callback so far, by its key: a ramp never goes down when the length is estimated anew.
        zeros: by a tensor's name, where its mask's ramp starts, for the weight was sparse before: a strength.
        base_rate: the user's learning rate that training started with.
        trainer, module: of the run; None when there is none.
    """

    fillers: list[SlotFiller] = field(default_factory=list)
    clippers: list[Clipper] = field(default_factory=list)
    penalties: list[Penalty] = field(default_factory=list)
    places: dict[str, list[Place]] = field(default_factory=dict)
    rounding: Rounding = field(default_factory=Rounding)
    left: str | None = None
    sidecars: Sidecars = field(default_factory=lambda: Sidecars([]))
    length: Length = field(default_factory=Length)
    reached: dict[str, float] = field(default_factory=dict)
    zeros: dict[str, float] = field(default_factory=dict)
    base_rate: float | None = None
    trainer: Trainer | None = None
    module: LightningModule | None = None

    def start(self, present: list[Any]) -> None:
        """Forget an older run, and callbacks that are not there any more."""
        self.fillers = [one for one in self.fillers if any(one is other for other in present)]
        self.clippers = [one for one in self.clippers if any(one is other for other in present)]
        self.penalties = [one for one in self.penalties if any(one is other for other in present)]
        self.rounding.start(present)
        self.length, self.reached, self.zeros, self.base_rate = Length(), {}, {}, None

    @property
    def total(self) -> float:
        """Optimizer steps of the run, by the best estimate."""
        assert self.length.total is not None
        return self.length.total

    def add(self, filler: SlotFiller) -> None:
        """Take in a callback that fills a slot."""
        if filler not in self.fillers:
            self.fillers = sorted([*self.fillers, filler], key=lambda one: SLOTS.index(one.slot))

    def attach(self, module: LightningModule, idle: Idle) -> None:
        """Attach all, also in layers that were built since; a new optimizer for what they train."""
        chosen = {filler.state_key: filler.choose(module, idle) for filler in self.fillers}
        self._let_go(module, chosen)
        self.places = {filler.state_key: filler.attach(module, chosen[filler.state_key]) for filler in self.fillers}
        self.rounding.attach(module, idle)
        self.left = left_out(chosen.values())
        self.sidecars = Sidecars([(filler.lr, self._trained(filler)) for filler in self.fillers])

    def _let_go(self, module: LightningModule, chosen: Mapping[str, Selection]) -> None:
        """Forget slots that were filled before the optimizers were known, and are not to begin in this run."""
        wanted = {key: {id(target.parameter) for target in one.targets} for key, one in chosen.items()}
        for _, tensor, parameter in list(compressed(module)):
            owners = {spec.owner for spec in tensor.slots.specs.values()} & wanted.keys()
            if not tensor.slots.begun and any(id(parameter) not in wanted[owner] for owner in owners):
                forget(module, tensor)

    def _trained(self, filler: SlotFiller) -> list[nn.Parameter]:
        found = [p for place in self.of(filler) for p in place.tensor.slots.sidecars(filler.slot)]
        return list(dict.fromkeys(found))

    def of(self, filler: SlotFiller) -> list[Place]:
        """Where a filler's tensors are."""
        return self.places[filler.state_key]

    def everywhere(self) -> list[Place]:
        """Every compressed tensor once."""
        found = {id(place.tensor): place for places in self.places.values() for place in places}
        return list(found.values())

    def batchnorm_batches(self, epoch: float) -> tuple[int, int]:
        """From how many training batches BatchNorm is refreshed: what was asked for, or what takes 2 % of an epoch.

        Returns:
            How many to keep, for the end; how many before each validation.
        """
        asked = [filler.refresh_batchnorm for filler in self.fillers]
        known = [number for number in asked if number is not None]
        if not asked or (known and not max(known)):
            return 0, 0
        kept = max(known) if known else MOST
        return kept, kept if known else max(1, int(min(MOST, SHARE * epoch)))

    def known(self, one: SlotFiller | Rounder) -> bool:
        """Whether it is known at which steps a callback's schedule begins and ends."""
        return self.length.known or one.schedule.counts_steps

    def begins(self, filler: SlotFiller) -> float:
        """The optimizer step at which a slot begins: not before its labels are in, which only a tied core can have.

        A default number of steps with labels, and one that a run is too short for, is a third of what is left at most.
        Infinite while it is not known.
        """
        if not self.known(filler):
            return math.inf
        begin = filler.schedule.begins(self.total, self.length.since)
        if not filler.calibration_steps:
            return begin
        mine = {id(place.tensor) for place in self.of(filler)}
        tied = [
            self.begins(other)
            for other in self.fillers
            if other.slot == "tying" != filler.slot and any(id(place.tensor) in mine for place in self.of(other))
        ]
        start = max(tied, default=self.length.since)
        labelled = start + filler.calibration_steps
        if not (filler.calibration_given and labelled < self.total) and math.isfinite(self.total):
            labelled = min(labelled, start + max(self.total - start, 0) // 3)
        return max(begin, labelled)

    def strength(self, filler: SlotFiller, step: int) -> float:
        """How hard a slot acts at an optimizer step."""
        return self.reached.get(filler.state_key, 0.0) if step < self.begins(filler) else self.scheduled(filler, step)

    def scheduled(self, one: SlotFiller | Rounder, step: int) -> float:
        """How hard a callback acts that waits for no labels."""
        reached = self.reached.get(one.state_key, 0.0)
        if not self.known(one):
            return reached
        return max(reached, one.schedule.strength(step, self.total, self.length.since))

    def strength_in(self, place: Place, filler: SlotFiller, step: int) -> float:
        """The same in one tensor: a mask's ramp starts from the zeros that a weight has when its schedule begins."""
        strength = self.strength(filler, step)
        if filler.slot != "mask" or not self.known(filler):
            return strength
        if place.name not in self.zeros and step >= filler.schedule.begins(self.total, self.length.since):
            if (found := place.tensor.hold_zeros(place.parameter)) is None:
                return strength
            self.zeros[place.name] = found
        start = self.zeros.get(place.name, 0.0)
        return start + (1 - start) * strength
