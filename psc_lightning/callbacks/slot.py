"""What the three slot callbacks share: they say what fills a slot of which tensors, and when; the conductor does it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.distributed.tensor import DTensor

from psc_lightning.latent import Compressed
from psc_lightning.levels import Levels
from psc_lightning.live import Place, held, hold
from psc_lightning.masks import Mask
from psc_lightning.options import checked, one_of, positive, whole
from psc_lightning.schedule import Schedule
from psc_lightning.sharding import is_sharded, sharded_modules
from psc_lightning.slots import Slots, Spec
from psc_lightning.targets import Selection, Target, patterns, select
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
        calibration_steps: optimizer steps of labels to see before the slot begins, for methods that need them. None: 50.

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
        self.refresh_batchnorm = None if refresh_batchnorm is None else whole("refresh_batchnorm", refresh_batchnorm, 0)

    @property
    def state_key(self) -> str:
        """Class, targets, method and what is ignored: what tells two of our callbacks in one model apart."""
        ignored = {"ignore": self.ignore} if self.ignore else {}
        return self._generate_state_key(targets=self.targets, method=self.method, **ignored)

    def spec(self) -> Spec:
        """What this callback puts into a slot."""
        return Spec(self.method, self.options, self.state_key)

    def choose(self, model: nn.Module) -> Selection:
        """The tensors it takes, and why it leaves the others."""
        chosen = select(model, self.targets, self.ignore, self.min_size)
        if self.slot != "tying":
            return chosen
        fitting: list[Target] = []
        for target in chosen.targets:
            try:
                TYINGS[self.method].build(target.matrix_shape, **self.options)
                fitting.append(target)
            except ValueError as error:
                if target.exact:
                    raise ValueError(f"targets: {target.name} cannot be tied by {self.method!r}: {error}") from None
                chosen.skipped[target.name] = f"{self.method} does not apply: {error}"
        if not fitting:
            reasons = "; ".join(f"{target.name}: {chosen.skipped[target.name]}" for target in chosen.targets[:5])
            raise ValueError(f"method={self.method!r} can tie none of the chosen tensors. {reasons}")
        chosen.targets = fitting
        return chosen

    def attach(self, model: nn.Module) -> list[Place]:
        """Fill the slot of every chosen tensor; what this callback has filled before is left alone.

        Returns:
            Where these tensors are.

        Raises:
            ValueError: as `targets.select`, where another callback fills the same slot of the same tensor, or where a
                tensor stays a shard while its layer runs.
        """
        gathered = {id(parameter) for unit in sharded_modules(model) for parameter in unit.parameters()}
        places = []
        for target in self.choose(model).targets:
            if is_sharded(target.parameter):
                self._check_shard(target, gathered)
            fresh = Compressed(Slots(target.layout, tuple(target.parameter.shape)), target.name)
            tensor = held(*target.holders[0]) or fresh
            taken = tensor.slots.specs.get(self.slot)
            if taken is None or taken.owner != self.state_key:
                try:
                    tensor.slots.to(target.parameter.device).fill(self.slot, self.spec())
                except ValueError as error:
                    raise ValueError(f"{target.name}: {error}") from None
            elif taken != self.spec():
                raise ValueError(
                    f"{target.name}: its {self.slot} slot holds {taken.owner} with {taken.options}, this callback has "
                    f"{self.options}; call psc_lightning.detach(model) before training it with other options"
                )
            hold(target.holders, tensor)
            places.append(Place(target.name, *target.holders[0], tensor))
        return places

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
