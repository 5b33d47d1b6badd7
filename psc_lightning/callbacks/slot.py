"""What the three slot callbacks share: attaching, scheduling, stepping what they train, resuming."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from psc_lightning.callbacks.arguments import positive, whole
from psc_lightning.callbacks.company import bears, callbacks_of, reorder
from psc_lightning.callbacks.plain import builds_late, make_plain
from psc_lightning.callbacks.sidecars import Gradients
from psc_lightning.schedule import Schedule
from psc_lightning.sharding import gather, is_sharded, reshard, scatter, sharded_modules
from psc_lightning.slots import HARD, SLOTS, Slots, Spec
from psc_lightning.targets import Selection, Target, patterns, select
from psc_lightning.tying import TYINGS
from psc_lightning.view import attach_slots, slots_of, views

__all__ = ["SlotCallback"]


class SlotCallback(Callback):
    """A callback that fills one slot of the tensors it targets.

    Life of a fit: `setup` attaches (before checkpoints are restored and optimizers are made); `on_fit_start` takes the
    sidecars out of the user's optimizers, so that these keep the plain run's layout, and gives them an AdamW of their
    own; each batch starts at the scheduled strength and ends hard, so that whatever looks between two steps (validation,
    a checkpoint, the user) sees exactly what a file would hold.

    Args:
        method: the method's name.
        options: its options.
        targets, ignore, min_size: which tensors; see `targets.select`.
        schedule: how hard it acts when.
        lr: learning rate of what the slot trains beside the weight; it follows the user's scheduler.
        refresh: recompute thresholds, scales and assignments every n optimizer steps.
        calibration_steps: optimizer steps of labels to see before the slot begins, for methods that need them.
    """

    slot: ClassVar[str]

    def __init__(
        self,
        method: str,
        options: dict[str, Any],
        targets: str | Iterable[str] | None,
        ignore: str | Iterable[str] | None,
        min_size: int,
        schedule: Schedule | str | dict[str, Any] | None,
        lr: float,
        refresh: int = 1,
        calibration_steps: int = 0,
    ) -> None:
        super().__init__()
        self.method, self.options = method, options
        self.targets, self.ignore = patterns("targets", targets), patterns("ignore", ignore)
        self.min_size = whole("min_size", min_size, 0)
        self.schedule = Schedule.of(schedule, Schedule())
        self.lr = positive("lr", lr)
        self.refresh = whole("refresh", refresh, 1)
        self.calibration_steps = whole("calibration_steps", calibration_steps, 0)
        #: what it fills: tensor name, slots, raw Parameter
        self.held: list[tuple[str, Slots, nn.Parameter]] = []
        self._optimizer: AdamW | None = None
        self._gradients = Gradients([], [])
        self._total: float | None = None
        self._base_lr: float | None = None
        self._seen_step = 0
        self._restored: dict[str, Any] | None = None

    # ------------------------------------------------------------------------------------------- attaching

    @property
    def state_key(self) -> str:
        """Class, targets, method and what is ignored: what tells two of our callbacks in one checkpoint apart."""
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

    def attach(self, model: nn.Module) -> None:
        """View every chosen tensor and fill its slot; what this callback has filled before is left alone.

        Raises:
            ValueError: as `targets.select`, where another callback fills the same slot of the same tensor, or where a
                tensor was sharded before.
        """
        self.held = []
        gathered = {id(parameter) for unit in sharded_modules(model) for parameter in unit.parameters()}
        for target in self.choose(model).targets:
            slots = slots_of(*target.holders[0]) or Slots(target.layout, tuple(target.parameter.shape))
            taken = slots.specs.get(self.slot)
            slots.sharded = is_sharded(target.parameter)
            if slots.sharded:
                self._check_shard(target, slots, gathered, attached=taken is not None and taken.owner == self.state_key)
            if taken is None or taken.owner != self.state_key:
                try:
                    slots.to(target.parameter.device).fill(self.slot, self.spec())
                except ValueError as error:
                    raise ValueError(f"{target.name}: {error}") from None
                attach_slots(target.holders, slots)
            elif taken != self.spec():
                raise ValueError(
                    f"{target.name}: its {self.slot} slot holds {taken.owner} with {taken.told}, this callback has "
                    f"{self.spec().told}; call psc_lightning.detach(model) before training it with other options"
                )
            self.held.append((target.name, slots, target.parameter))

    def _check_shard(self, target: Target, slots: Slots, gathered: set[int], attached: bool) -> None:
        """Refuse what was sharded too early, or in another way than FSDP2 does, or what FSDP2 itself would refuse."""
        who = f"{type(self).__name__}({self.method!r})"
        if not attached:
            raise ValueError(
                f"{target.name} was sharded before {who} was attached to it: build the layers in __init__ and call "
                "fully_shard in configure_model, or call psc_lightning.attach(module, callbacks) before fully_shard"
            )
        shard = target.parameter.data
        assert isinstance(shard, DTensor)
        *replicas, last = shard.placements
        if id(target.parameter) not in gathered or last.is_replicate() or not all(p.is_replicate() for p in replicas):
            raise ValueError(
                f"{target.name} is a shard even while its layer runs (tensor parallelism), but {who} needs it whole: shard "
                "it by fully_shard alone, or leave it out by `ignore`"
            )
        if mixed := {sidecar.dtype for sidecar in slots.sidecars(self.slot)} - {shard.dtype}:
            raise ValueError(
                f"{target.name} is {shard.dtype}, what {who} trains beside it {mixed.pop()}, but FSDP2 wants one type in a "
                "unit: use precision='bf16-mixed' instead of 'bf16-true'"
            )

    def attach_late(self, module: LightningModule) -> None:
        """Attach where layers may still be missing; `on_fit_start` has the last word."""
        try:
            self.attach(module)
        except ValueError:
            if not (builds_late(type(module), "setup") or builds_late(type(module), "configure_model")):
                raise

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach, before checkpoints are restored and optimizers are made."""
        if stage != "fit":
            return
        if bears(trainer.strategy, "FSDPStrategy", "DeepSpeedStrategy"):
            raise ValueError(
                f"{type(self).__name__}({self.method!r}) cannot see whole weights under {type(trainer.strategy).__name__}; "
                "use DDP or ModelParallelStrategy (FSDP2)"
            )
        attached = [slots.specs[self.slot].owner for _, slots, _ in views(pl_module) if self.slot in slots.specs]
        if bears(trainer.strategy.launcher, "_MultiProcessingLauncher") and self.state_key not in attached:
            raise ValueError(
                f"{type(self).__name__}({self.method!r}): the processes of strategy='ddp_spawn' (ddp_fork, ddp_notebook) "
                "hand back a state dict, which a model without slots would take as if nothing had been compressed: call "
                "psc_lightning.attach(model, callbacks) before fit, or use strategy='ddp'"
            )
        callbacks = callbacks_of(trainer)
        for other in callbacks[: callbacks.index(self)]:
            if bears(other, "WeightAveraging", "StochasticWeightAveraging"):
                raise ValueError(
                    f"{type(other).__name__} comes before {type(self).__name__} in Trainer(callbacks=…): it copies the "
                    "model before the slots are attached; put it after psc_lightning's callbacks"
                )
        # These note which parameters their groups hold, and put them back on a resume: `_release` has the last word.
        later = [other for other in callbacks[callbacks.index(self) :] if bears(other, "BaseFinetuning")]
        rest = [other for other in callbacks if other not in later]
        reorder(trainer, [*rest[: rest.index(self)], *later, *rest[rest.index(self) :]])
        self._optimizer = self._total = self._base_lr = self._restored = None
        self._seen_step = 0
        make_plain(pl_module)
        self.attach_late(pl_module)

    # -------------------------------------------------------------------------------------------- training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Verify that every target is attached; take over the sidecars."""
        self.attach(pl_module)
        pairs = [(weight, p) for _, slots, weight in self.held for p in slots.sidecars(self.slot)]
        self._gradients = Gradients(pairs, [weight for _, _, weight in self.held])
        self._release(trainer)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        first = groups[0] if groups else {}
        self._base_lr = first.get("max_lr") or first.get("initial_lr") or first.get("lr")
        if pairs:
            # Not fused: which kernel a device offers must not change the numbers of a resumed run.
            self._optimizer = AdamW([sidecar for _, sidecar in pairs], lr=self.lr, weight_decay=0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where a checkpoint was (sharded ones are read after `on_fit_start`); count the steps of the run.

        Not earlier: asking for the total loads the data, which a resume still positions.
        """
        restored = self._restored or {}
        self._base_lr = restored.get("base_lr") or self._base_lr
        if self._optimizer is not None and restored.get("optimizer"):
            self._optimizer.load_state_dict(restored["optimizer"])
            _shard(self._optimizer)
        self._total = restored.get("total_steps")
        if self._total is None:
            self._total = _steps(trainer, pl_module)
        self.schedule.strength(0, self._total)  # an endless run with a schedule in shares is told before it starts
        self._seen_step = trainer.global_step
        blind = [
            n for n, slots, w in self.held if not w.requires_grad and not any(True for _ in slots.sidecars("tying"))
        ]
        if self.calibration_steps and blind:
            rank_zero_warn(
                f"{type(self).__name__}({self.method!r}) gets no labels from frozen weights, and goes by their magnitude: "
                f"{', '.join(blind)}"
            )

    def _release(self, trainer: Trainer) -> None:
        """Take the sidecars out of the user's optimizers."""
        mine = {id(parameter) for _, slots, _ in self.held for parameter in slots.sidecars(self.slot)}
        for optimizer in trainer.optimizers if mine else ():
            for group in optimizer.param_groups:
                if any(id(parameter) in mine for parameter in group["params"]):
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in mine]

    def begins(self, trainer: Trainer) -> int:
        """The optimizer step at which the slot begins: not before its labels are in, which only a tied core can have."""
        assert self._total is not None
        begin = self.schedule.begins(self._total)
        if not self.calibration_steps:
            return begin
        mine = {id(slots) for _, slots, _ in self.held}
        tied = [
            callback.begins(trainer)
            for callback in self._company(trainer)
            if callback.slot == "tying" != self.slot and any(id(slots) in mine for _, slots, _ in callback.held)
        ]
        return max(begin, max(tied, default=0) + self.calibration_steps)

    def _company(self, trainer: Trainer) -> list[SlotCallback]:
        """All slot callbacks of the run, in the order of the slots, whatever the user's order."""
        ours = [callback for callback in callbacks_of(trainer) if isinstance(callback, SlotCallback)]
        return sorted(ours, key=lambda callback: SLOTS.index(callback.slot))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the scheduled strengths: the first of our callbacks does it for all, so that their order is the slots'."""
        self._reshard(pl_module)
        self._release(trainer)  # fine-tuning callbacks add what they unfreeze
        company = self._company(trainer)
        if self is not company[0]:
            return
        for callback in company:
            assert callback._total is not None
            step = trainer.global_step
            strength = callback.schedule.strength(step, callback._total) if step >= callback.begins(trainer) else 0.0
            for _, slots, weight in callback.held:
                slots.set_strength(callback.slot, strength, weight)
        for callback in company:
            for _, slots, weight in callback.held:
                if slots.stale:
                    slots.refresh(weight)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Collect labels; follow the user's learning rate and steps: the first of our callbacks does it for all."""
        company = self._company(trainer)
        if self is not company[0]:
            return
        for callback in company:
            callback._gradients.unscale(trainer)
        for callback in company:  # a mask's labels may be gradients of what a tying trains
            callback._follow(trainer, optimizer)
        for callback in company:
            callback._gradients.put_aside(trainer, optimizer)

    def _follow(self, trainer: Trainer, optimizer: Optimizer) -> None:
        if self._optimizer is not None and self._base_lr:
            # Now: at the batch's end the user's schedulers have moved on already.
            users = trainer.optimizers[0].param_groups[0]["lr"]
            self._optimizer.param_groups[0]["lr"] = self.lr * users / self._base_lr
        if self.calibration_steps and trainer.global_step < self.begins(trainer):
            labelled = self._gradients.labels(trainer, optimizer, [weight for _, _, weight in self.held])
            for _, slots, weight in self.held:
                if weight in labelled:
                    slots.observe(self.slot, weight)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Step the sidecars, if an optimizer stepped; then everything is hard until the next batch."""
        self._reshard(pl_module)
        stepped = trainer.global_step != self._seen_step
        if stepped:
            self._seen_step = trainer.global_step
            self._step(trainer)
        for _, slots, weight in self.held:
            if slots.phase[SLOTS.index(self.slot)]:
                slots.set_strength(self.slot, 1.0, weight)
                slots.stale = slots.stale or (stepped and trainer.global_step % self.refresh == 0)
        ours = [callback for callback in callbacks_of(trainer) if isinstance(callback, SlotCallback)]
        for callback in ours if self is ours[-1] else ():
            for _, slots, weight in callback.held:
                if slots.stale and is_sharded(weight):
                    slots.refresh(weight)  # now: forward has the whole weight, but cannot write to the sidecars' shards

    def _reshard(self, module: LightningModule) -> None:
        if any(is_sharded(weight) for _, _, weight in self.held):
            reshard(module)

    def _step(self, trainer: Trainer) -> None:
        if self._optimizer is None:
            return
        asleep = {
            id(p)
            for _, slots, _ in self.held
            if not slots.phase[SLOTS.index(self.slot)]
            for p in slots.sidecars(self.slot)
        }
        self._gradients.step(trainer, self._optimizer, asleep)

    def _give_way(self, trainer: Trainer, pl_module: LightningModule, swap: bool = True) -> None:
        """Get ready for an average of the weights, which takes the model's place (`swap`) or is saved beside it.

        Averaging callbacks treat buffers as they do parameters. A mean of strengths, masks or scales means nothing: they
        are those of the model, recomputed from the averaged weights.
        """
        averages = [getattr(callback, "_average_model", None) for callback in callbacks_of(trainer)]
        for average in averages if self is self._company(trainer)[0] else ():
            if average is None:
                continue
            for (_, slots, weight), (_, averaged, mean) in zip(views(pl_module), views(average)):
                if slots.stale:
                    slots.refresh(weight)
                for own, other in zip(slots.buffers(), averaged.buffers()):
                    other.copy_(own)
                averaged.phase = list(slots.phase)
                averaged.refresh(mean)
                slots.stale = swap and slots.begun

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's SWA takes the model's place for its last epoch, which renews the BatchNorm statistics."""
        swaps = any(bears(callback, "StochasticWeightAveraging") for callback in callbacks_of(trainer))
        self._give_way(trainer, pl_module, swap=swaps)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An average may take the model's place now."""
        self._give_way(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """An average may be what is saved."""
        self._give_way(trainer, pl_module, swap=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a usable model: what has begun is hard."""
        for _, slots, weight in self.held:
            if slots.phase[SLOTS.index(self.slot)]:
                slots.set_strength(self.slot, 1.0, weight)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where training was too short for the slot's schedule; an average may take the model's place now."""
        self._give_way(trainer, pl_module)
        index = SLOTS.index(self.slot)
        dry = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # as `callbacks`: assigned, declared nowhere
        if dry or not self.held:
            return
        assert self._total is not None
        strength = self.schedule.strength(trainer.global_step, self._total)
        if all(slots.phase[index] != HARD for _, slots, _ in self.held):
            rank_zero_warn(
                f"{type(self).__name__}({self.method!r}) never began: training ended at step {trainer.global_step}, the "
                f"slot begins at step {self.begins(trainer)}. The model is uncompressed in this slot; train longer, or give "
                "an earlier begin."
            )
        elif strength < 1 and self.slot != "tying":  # which knows no ramp
            rank_zero_warn(
                f"{type(self).__name__}({self.method!r}) was hardened in mid-ramp: training ended at step "
                f"{trainer.global_step}, at strength {strength:.2f}. What the rest of the ramp would have brought in gently "
                "came at once; train longer, or give an earlier end."
            )

    # -------------------------------------------------------------------------------------------- resuming

    def state_dict(self) -> dict[str, Any]:
        """Total steps, and the state of the plugin's own optimizer; tensors and primitives only."""
        if self._total is None:
            return self._restored or {}
        optimizer = self._optimizer.state_dict() if self._optimizer is not None else None
        if optimizer is not None:
            states = optimizer["state"].items()
            optimizer["state"] = {key: {name: gather(value) for name, value in state.items()} for key, state in states}
        total = self._total if math.isfinite(self._total) else None
        return {"total_steps": total, "base_lr": self._base_lr, "optimizer": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until `on_train_start`, when the optimizer exists."""
        self._restored = state_dict


def _steps(trainer: Trainer, pl_module: LightningModule) -> float:
    """How far `global_step` will go: under manual optimisation it counts each optimizer, taken to step once a batch."""
    steps = trainer.estimated_stepping_batches
    schedulers = [callback for callback in callbacks_of(trainer) if bears(callback, "GradientAccumulationScheduler")]
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    if schedulers and epochs is not None and epochs >= 0 and math.isfinite(batches):
        # Lightning takes the factor of now for that of every epoch. (Known by its name: pytorch_lightning's is another.)
        scheduler: Any = schedulers[0]
        factors = [scheduler.get_accumulate_grad_batches(epoch) for epoch in range(epochs)]
        steps = sum(math.ceil(batches / factor) for factor in factors)
        steps = min(steps, trainer.max_steps) if trainer.max_steps >= 0 else steps
    if not pl_module.automatic_optimization:
        steps *= max(1, len(trainer.optimizers))
        steps = min(steps, trainer.max_steps) if trainer.max_steps >= 0 else steps
    return steps


def _shard(optimizer: Optimizer) -> None:
    """Deal out a state that was gathered, where its Parameter is sharded."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if is_sharded(parameter) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter)
                scatter(value, state[name])
