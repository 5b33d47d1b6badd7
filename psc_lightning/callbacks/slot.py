"""What the three slot callbacks share: they say what fills a slot of which tensors, and when; the conductor does it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.tensor import DTensor

from psc_lightning.artifact.model.snapshots import check
from psc_lightning.levels import Levels
from psc_lightning.masks import Mask
from psc_lightning.options import checked, one_of, positive, whole
from psc_lightning.schedule import Schedule
from psc_lightning.sharding import is_sharded, sharded_modules
from psc_lightning.slots.latent import Compressed
from psc_lightning.slots.live import Place, held, hold
from psc_lightning.slots.slots import Slots, Spec
from psc_lightning.slots.targets import Idle, Selection, Target, frozen, patterns, select
from psc_lightning.training.conductor import Conductor
from psc_lightning.tying import TYINGS, Tying

__all__ = ["SlotCallback"]


class SlotCallback(Callback):
    """A callback that fills one slot of the tensors it targets.

    Args:
        method: the method's name.
        given: its options; None: not given.
        targets, ignore, min_size: which tensors; see `targets.select`.
        schedule: how hard it acts when.
        rate: learning rate of what the slot trains beside the weight; it follows the user's scheduler.
        refresh: recompute thresholds, scales and assignments every n optimizer steps.
        calibration_steps: optimizer steps of labels to see before the slot begins, for methods that need them. None: 50, but
            not more than a third of what is left of the run.

        refresh_batchnorm: training batches from which BatchNorm's statistics are taken anew before each validation and at
            the end; 0: none. None: 8 at the end, before a validation as many of them as take 2 % of an epoch's time.

    Raises:
        ValueError: a wrong value, or one that the method does not read; the argument is named.
    """

    slot: ClassVar[str]
    #: the slot's methods, and what the argument that chooses one is called
    methods: ClassVar[Mapping[str, type[Tying | Mask | Levels]]]
    argument: ClassVar[str] = "method"
    #: what the learning rate is called, and its default
    rate: ClassVar[tuple[str, float]]

    def __init__(
        self,
        method: str,
        given: Mapping[str, Any],
        targets: str | Iterable[str] | None,
        ignore: str | Iterable[str] | None,
        min_size: int,
        schedule: Schedule | str | dict[str, Any] | None,
        rate: float | None,
        refresh: int = 1,
        calibration_steps: int | None = None,
        refresh_batchnorm: int | None = None,
    ) -> None:
        super().__init__()
        kind = self.methods[one_of(self.argument, method, self.methods)]
        self.method, self.options = method, checked(method, kind, given)
        self.targets, self.ignore = patterns("targets", targets), patterns("ignore", ignore)
        self.min_size = whole("min_size", min_size, 0)
        self.schedule = Schedule.of(schedule, Schedule())
        name, default = self.rate
        if rate is not None and not kind.trains(self.options):
            raise ValueError(f"{name}: {method!r} does not read it: it trains nothing beside the weight")
        self.lr = default if rate is None else positive(name, rate)
        self.refresh = whole("refresh", refresh, 1)
        calibrates = kind.calibrates(self.options)
        if calibration_steps is not None and not calibrates:
            raise ValueError(f"calibration_steps: {method!r} does not read it: it needs no labels before it begins")
        wanted = 50 if calibration_steps is None else whole("calibration_steps", calibration_steps, 1)
        self.calibration_steps = wanted if calibrates else 0
        self.calibration_given = calibration_steps is not None
        self.refresh_batchnorm = None if refresh_batchnorm is None else whole("refresh_batchnorm", refresh_batchnorm, 0)

    @property
    def state_key(self) -> str:
        """Class, targets, method and what is ignored: what tells two of our callbacks in one model apart."""
        ignored = {"ignore": self.ignore} if self.ignore else {}
        return self._generate_state_key(targets=self.targets, method=self.method, **ignored)

    @property
    def settings(self) -> dict[str, Any]:
        """How and when it acts, as primitives: what a resumed run may have otherwise."""
        return {
            "schedule": f"{self.schedule.kind} from {self.schedule.begin} to {self.schedule.end}",
            self.rate[0]: self.lr,
            "refresh": self.refresh,
            "calibration_steps": self.calibration_steps,
            "refresh_batchnorm": self.refresh_batchnorm,
        }

    def specs(self, targets: Sequence[Target]) -> list[Spec]:
        """What this callback puts into the slot of each of its tensors."""
        return [Spec(self.method, self.options, self.state_key) for _ in targets]

    def choose(self, model: nn.Module, idle: Idle = frozen) -> Selection:
        """The tensors it takes, and why it leaves the others; what has begun to be compressed is not left as `idle`."""

        def idle_still(target: Target) -> str | None:
            tensor = held(*target.holders[0])
            return None if tensor is not None and tensor.slots.begun else idle(target)

        chosen = select(model, self.targets, self.ignore, self.min_size, idle_still)
        if self.slot != "tying":
            return chosen
        for target in chosen.targets:
            if reason := self._cannot_tie(target, chosen):
                if target.exact:
                    raise ValueError(f"targets: {target.name} cannot be tied by {self.method!r}: {reason}")
                chosen.leave(target, f"{self.method} does not apply: {reason}")
        if not chosen.targets:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in chosen.skipped.items() if "not apply" in reason)
            raise ValueError(f"method={self.method!r} can tie none of the chosen tensors. {reasons}")
        return chosen

    def _cannot_tie(self, target: Target, chosen: Selection) -> str | None:
        """Why the tying does not apply to a tensor, or would make outputs, or entries of a table, equal."""
        tying = TYINGS[self.method]
        try:
            tying.build(target.matrix_shape, **self.options)
        except ValueError as error:
            return str(error)
        if not tying.ties_rows or (target.named and target.padding is None):
            return None
        if target.looked_up:
            return "entries of a table would become equal" + (
                ", and its padding_idx would not stay zero" if target.padding is not None else ""
            )
        return "the model's outputs would become equal" if target.name in chosen.outputs else None

    def attach(self, model: nn.Module, chosen: Selection | None = None) -> list[Place]:
        """Fill the slot of every chosen tensor; what this callback has filled before is left alone.

        Args:
            model: the model.
            chosen: of `choose`; None: what it chooses now.

        Returns:
            Where these tensors are.

        Raises:
            ValueError: as `targets.select`, where another callback fills the same slot of the same tensor, or where a
                tensor stays a shard while its layer runs.
        """
        gathered = {id(parameter) for unit in sharded_modules(model) for parameter in unit.parameters()}
        found: list[tuple[Target, Compressed]] = []
        targets = (self.choose(model) if chosen is None else chosen).targets
        for target in targets:
            if is_sharded(target.parameter):
                self._check_shard(target, gathered)
            fresh = Compressed(Slots(target.layout, tuple(target.parameter.shape)), target.name)
            tensor = held(*target.holders[0]) or fresh
            if tensor.slots.stored_shape != target.parameter.shape:  # a table that has grown
                tensor.absorb(target.parameter)
                tensor = fresh if tensor.latent is None else tensor
            if any(other is tensor for _, other in found):  # weights that were one, and are two now
                tensor = fresh
            found.append((target, tensor))
        specs = self.specs(targets)
        vacant = [
            self._vacant(*one, spec) for one, spec in zip(found, specs, strict=True)
        ]  # of all, before one is filled
        for (target, tensor), spec, empty in zip(found, specs, vacant, strict=True):
            if empty:
                try:
                    tensor.slots.to(target.parameter.device).fill(self.slot, spec)
                except ValueError as error:
                    raise ValueError(f"{target.name}: {error}") from None
            hold(target.holders, tensor)
        return [Place(target.name, *target.holders[0], tensor) for target, tensor in found]

    def _vacant(self, target: Target, tensor: Compressed, spec: Spec) -> bool:
        """Whether this callback has yet to fill the slot; ValueError where another one has, or itself with other options."""
        taken = tensor.slots.specs.get(self.slot)
        if taken is not None and taken.owner == self.state_key:
            if taken != spec:
                raise ValueError(
                    f"{target.name}: its {self.slot} slot holds {taken.owner} with {taken.options}, this callback has "
                    f"{spec.options}; call psc_lightning.detach(model) before training it with other options"
                )
            return False
        try:
            tensor.slots.check_vacant(self.slot, spec)
        except ValueError as error:
            raise ValueError(f"{target.name}: {error}") from None
        return True

    def check(self, model: nn.Module) -> None:
        """Refuse, before training, what cannot be trained or saved; warn of what a file leaves out."""
        for name, layer in model.named_modules():
            sparse = getattr(layer, "sparse", False) is True and held(layer, "weight") is not None
            if sparse and layer._parameters["weight"].requires_grad:
                raise ValueError(
                    f"{name}.weight: its gradients are sparse, and its slots need dense ones: set sparse=False in its "
                    f"{type(layer).__name__}, or leave it out: ignore={name!r}"
                )
        check(model)

    def _check_shard(self, target: Target, gathered: set[int]) -> None:
        """Refuse what is sharded in another way than FSDP2 does."""
        shard = target.parameter.data
        assert isinstance(shard, DTensor)
        *replicas, last = shard.placements
        if id(target.parameter) not in gathered or last.is_replicate() or not all(p.is_replicate() for p in replicas):
            raise ValueError(
                f"{target.name} is a shard even while its layer runs (tensor parallelism), but {type(self).__name__}"
                f"({self.method!r}) needs it whole: shard it by fully_shard alone, or leave it out by `ignore`"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take part in a fit."""
        if stage == "fit":
            Conductor.of(trainer).join_slot(trainer, pl_module, self)
