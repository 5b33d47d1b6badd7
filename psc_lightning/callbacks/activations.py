"""Which numbers layers may take in."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from psc_lightning.activations import Activations, hold, of, takes_inputs
from psc_lightning.options import whole
from psc_lightning.schedule import Schedule
from psc_lightning.slots.targets import Idle, Selection, Target, frozen, patterns, select
from psc_lightning.training.conductor import Conductor
from psc_lightning.words import hinting

__all__ = ["ActivationQuantization", "inputs_of", "layers_of"]


class ActivationQuantization(Callback):
    """Rounds the inputs of `Linear` and `Conv` layers to few numbers, the gradient passing straight through within a range.

    The range follows training's batches. `export_onnx` of the live model then runs in 8 bit integers, where weights are
    whole multiples of a scale (`uniform`, `binary`, `ternary`); a .psc file and `detach` keep the weights only.

    Args:
        bits: 2 … 8.
        targets: globs over the names of the layers' weights, module names, `re:` expressions or layer types; None: every
            layer of these types whose weight is trained, or every one where none is.
        ignore: the same, for what to leave out.
        min_size: fewest entries of a layer's weight.
        schedule: rounding has no soft phase: it begins at the schedule's `begin`. None: with training.

    Raises:
        ValueError: a wrong value (the argument is named), or, before training starts, a pattern that matches nothing, or no
            such layer, or one whose inputs another such callback rounds.

    >>> callback, model = ActivationQuantization(bits=4, ignore="1"), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    >>> [name for name, _ in callback.attach(model)]
    ['0']

    Source: see `psc_lightning.activations.Activations`.
    """

    @hinting
    def __init__(
        self,
        bits: int = 8,
        targets: str | list[str] | None = None,
        ignore: str | list[str] | None = None,
        min_size: int = 64,
        schedule: Schedule | str | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.bits = whole("bits", bits, 2, 8)
        self.targets, self.ignore = patterns("targets", targets), patterns("ignore", ignore)
        self.min_size = whole("min_size", min_size, 0)
        self.schedule = Schedule.of(schedule, Schedule())

    @property
    def state_key(self) -> str:
        """Class, targets and what is ignored: what tells two of them in one model apart."""
        ignored = {"ignore": self.ignore} if self.ignore else {}
        return self._generate_state_key(targets=self.targets, **ignored)

    @property
    def settings(self) -> dict[str, Any]:
        """When it acts, as primitives: what a resumed run may have otherwise."""
        return {"schedule": f"{self.schedule.kind} from {self.schedule.begin} to {self.schedule.end}"}

    def choose(self, model: nn.Module, idle: Idle = frozen) -> Selection:
        """The weights of the layers that it takes, and why it leaves the others; rounded inputs are not left as `idle`."""

        def idle_still(target: Target) -> str | None:
            found = _found(target)
            return None if found is not None and found.begun else idle(target)

        chosen = select(model, self.targets, self.ignore, self.min_size, idle_still)
        types = ", ".join(sorted({type(target.layer).__name__ for target in chosen.targets}))
        for target in chosen.targets:
            if not layers_of(target):
                chosen.leave(target, "no input of a Linear or Conv layer")
        if not chosen.targets:
            raise ValueError(
                f"targets: only inputs of Linear and Conv layers can be rounded, the targets are {types}; name such a layer"
            )
        return chosen

    def attach(self, model: nn.Module, chosen: Selection | None = None) -> list[tuple[str, Activations]]:
        """Round the inputs of every chosen layer; what it has attached before is left alone.

        Args:
            model: the model.
            chosen: of `choose`; None: what it chooses now.

        Returns:
            The first name of each layer (of several that hold one weight, of one), and what rounds its inputs.

        Raises:
            ValueError: as `choose`, or where another callback rounds the same inputs.
        """
        attached: list[tuple[Target, Activations]] = []
        for target in (self.choose(model) if chosen is None else chosen).targets:
            inputs = self._inputs(target)
            if any(other is inputs for _, other in attached):  # of weights that were one, and are two now
                inputs = inputs_of(target, self.bits, self.state_key)
            attached.append((target, inputs))
        for target, inputs in attached:
            hold(layers_of(target), inputs)
        return [(target.name.rpartition(".")[0], inputs) for target, inputs in attached]

    def _inputs(self, target: Target) -> Activations:
        found = _found(target)
        if found is not None and found.owner != self.state_key:
            raise ValueError(
                f"{target.name}: its layer's inputs are rounded by {found.owner} and {self.state_key}; keep one"
            )
        if found is not None and found.bits != self.bits:
            raise ValueError(
                f"{target.name}: its layer's inputs are rounded by {found.owner} with bits={found.bits}, this callback has "
                f"bits={self.bits}; call psc_lightning.detach(model) before training it with other options"
            )
        return inputs_of(target, self.bits, self.state_key) if found is None else found

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take part in a fit."""
        if stage == "fit":
            Conductor.of(trainer).join_rounding(trainer, pl_module, self)


def layers_of(target: Target) -> list[nn.Module]:
    """The layers that multiply their input by this tensor."""
    return [layer for layer, name in target.holders if name == "weight" and takes_inputs(layer)]


def inputs_of(target: Target, bits: int, owner: str) -> Activations:
    """What can round the inputs of these layers."""
    channels = target.parameter.shape[0] if target.parameter.dim() > 2 else None
    return Activations(bits, channels, owner).to(target.parameter.device)


def _found(target: Target) -> Activations | None:
    """What rounds the inputs of these layers already."""
    return next(filter(None, map(of, layers_of(target))), None)
