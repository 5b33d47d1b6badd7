"""The one Lightning callback that does something: it owns the order of a step, for all of ours.

    control → forward, backward → pull → lend → clip → labels → the optimizer's step → sidecars' step → show

Between steps every Parameter is hard, within the batches of a ramp blended. The latent weight is in its place only within
``optimizer.step``, whose own hooks say when that is: whatever calls it, how often, or skips it. An optimizer that asks for
the loss within its step (Lightning's automatic optimization does, LBFGS several times) sees hard weights each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import distributed, nn
from torch.optim import Optimizer

from psc_lightning.latent import trace
from psc_lightning.live import Place, compressed, hand_back
from psc_lightning.schedule import Schedule
from psc_lightning.sharding import gather, is_sharded, local, sharded_modules
from psc_lightning.slots import HARD, SLOTS, SOFT, Slots
from psc_lightning.training.averaging import Average
from psc_lightning.training.run import bears, builds_late, callbacks_of, insert, steps_of, user_rate
from psc_lightning.training.sidecars import Sidecars

__all__ = ["Clipper", "Conductor", "SlotFiller"]

#: its entry in a checkpoint, and the version of what lies there
KEY, VERSION = "psc_lightning", 2

_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


class SlotFiller(Protocol):
    """A callback that fills one slot of some tensors."""

    slot: str
    method: str
    schedule: Schedule
    lr: float
    refresh: int
    calibration_steps: int

    @property
    def state_key(self) -> str:
        """What tells it from others."""

    def attach(self, model: nn.Module) -> list[Place]:
        """Fill the slot of every tensor it chooses; what it has filled before is left alone."""


class Clipper(Protocol):
    """A callback that limits the gradients that a step sees."""

    def check(self, trainer: Trainer) -> None:
        """Refuse, before training, what cannot work."""

    def before_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Limit the gradients of an optimizer's parameters, which hold latent weights now."""


class Conductor(Callback):
    """Put into the Trainer by the first of our callbacks; the others are declarations that it reads."""

    def __init__(self) -> None:
        self.fillers: list[SlotFiller] = []
        self.clippers: list[Clipper] = []
        self.places: dict[str, list[Place]] = {}
        self.averages: list[Average] = []
        self.sidecars = Sidecars([])
        self.total: float | None = None
        self._base_rate: float | None = None
        self._restored: dict[str, Any] | None = None
        self._hooked: list[tuple[Optimizer, list[Any]]] = []
        self._depth: dict[int, int] = {}
        self._lent: dict[int, list[Place]] = {}
        self._shown: set[int] = set()
        self._units: list[Any] = []  # that fully_shard was called on
        self._borrowed: list[nn.Parameter] = []
        self._module: LightningModule | None = None
        self._trainer: Trainer | None = None

    # ------------------------------------------------------------------------------------------- who takes part

    @classmethod
    def of(cls, trainer: Trainer) -> Conductor:
        """The conductor of a run: before all callbacks but those that average weights, whose averages it makes hard."""
        callbacks = callbacks_of(trainer)
        found = next((callback for callback in callbacks if isinstance(callback, cls)), None)
        if found is None:
            found = cls()
            averaging = [index for index, one in enumerate(callbacks) if bears(one, *_AVERAGING)]
            insert(trainer, 1 + max(averaging, default=-1), found)
        return found

    def join_slot(self, trainer: Trainer, module: LightningModule, filler: SlotFiller) -> None:
        """Take in a callback that fills a slot; attach it, where the layers are there already."""
        who = f"{type(filler).__name__}({filler.method!r})"
        if bears(trainer.strategy, "FSDPStrategy", "DeepSpeedStrategy"):
            raise ValueError(
                f"{who} cannot see whole weights under {type(trainer.strategy).__name__}; "
                "use DDP or ModelParallelStrategy (FSDP2)"
            )
        owners = [t.slots.specs[filler.slot].owner for _, t, _ in compressed(module) if filler.slot in t.slots.specs]
        if _spawns(trainer) and filler.state_key not in owners:
            raise ValueError(
                f"{who}: the processes of strategy='ddp_spawn' (ddp_fork, ddp_notebook) "
                "hand back a state dict, which a model without slots would take as if nothing had been compressed: call "
                "psc_lightning.attach(model, callbacks) before fit, or use strategy='ddp'"
            )
        self._start(trainer)
        if filler not in self.fillers:
            # In the order of the slots, whatever the user's.
            self.fillers = sorted([*self.fillers, filler], key=lambda one: SLOTS.index(one.slot))
        try:
            filler.attach(module)
        except ValueError:
            if not builds_late(module):
                raise

    def join_clipping(self, trainer: Trainer, clipper: Clipper) -> None:
        """Take in a callback that clips."""
        self._start(trainer)
        if clipper not in self.clippers:
            self.clippers.append(clipper)

    def _start(self, trainer: Trainer) -> None:
        """Forget an older run."""
        present = callbacks_of(trainer)
        self.fillers = [one for one in self.fillers if one in present]
        self.clippers = [one for one in self.clippers if one in present]
        self.total = self._base_rate = self._restored = None

    # -------------------------------------------------------------------------------------------- before training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Verify that every target is attached, also in layers that were built since."""
        self._trainer, self._module = trainer, pl_module
        self._units = sharded_modules(pl_module)
        for clipper in self.clippers:
            clipper.check(trainer)
        self._attach(pl_module)
        self._refuse_pruning(trainer)
        for place in self._everywhere() if _spawns(trainer) else ():
            place.tensor.unshare()
        self.averages = [Average(one) for one in callbacks_of(trainer) if bears(one, *_AVERAGING)]
        groups = [(one.lr, self._trained(one)) for one in self.fillers]
        self.sidecars = Sidecars(groups)
        self._restore()

    def _attach(self, module: LightningModule) -> None:
        self.places = {filler.state_key: filler.attach(module) for filler in self.fillers}

    def _refuse_pruning(self, trainer: Trainer) -> None:
        """Lightning's own pruning puts another Parameter in the place of each that it prunes, in mid-training."""
        for callback in callbacks_of(trainer):
            pruned = {(id(layer), name) for layer, name in getattr(callback, "_parameters_to_prune", None) or ()}
            both = [place.name for place in self._everywhere() if (id(place.layer), place.attribute) in pruned]
            if bears(callback, "ModelPruning") and both:
                raise ValueError(
                    f"{type(callback).__name__} and psc_lightning's callbacks both take {', '.join(both[:4])}: leave them to "
                    "one of the two (`ignore` here, `parameters_to_prune` there), or use MaskLearning for both"
                )

    def _trained(self, filler: SlotFiller) -> list[nn.Parameter]:
        found = [p for place in self.places[filler.state_key] for p in place.tensor.slots.sidecars(filler.slot)]
        return list(dict.fromkeys(found))

    def _everywhere(self) -> list[Place]:
        """Every compressed tensor once."""
        found = {id(place.tensor): place for places in self.places.values() for place in places}
        return list(found.values())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where a checkpoint was (sharded ones are read after `on_fit_start`); count the steps; listen to optimizers.

        Not earlier: asking for the total loads the data, which a resume still positions.
        """
        self._restore()
        if self.total is None:
            self.total = steps_of(trainer, pl_module)
        if self._base_rate is None:  # not before: a finder may still change it
            self._base_rate = user_rate(trainer.optimizers, initial=True)
        for filler in self.fillers:
            filler.schedule.strength(0, self.total)  # an endless run with a schedule in shares is told before it starts
            self._tell_blind(filler)
        self._listen(trainer)

    def _tell_blind(self, filler: SlotFiller) -> None:
        blind = [
            place.name
            for place in self.places[filler.state_key]
            if not place.parameter.requires_grad and not any(True for _ in place.tensor.slots.sidecars("tying"))
        ]
        if filler.calibration_steps and blind:
            rank_zero_warn(
                f"{type(filler).__name__}({filler.method!r}) gets no labels from frozen weights, and goes by their "
                f"magnitude: {', '.join(blind)}"
            )

    def _listen(self, trainer: Trainer) -> None:
        if [optimizer for optimizer, _ in self._hooked] == trainer.optimizers:
            return
        self._hush()
        for optimizer in trainer.optimizers:
            if not isinstance(optimizer, Optimizer):
                raise ValueError(
                    f"{type(optimizer).__name__} is no torch.optim.Optimizer: it does not say when it steps, so the latent "
                    "weights cannot be put in its hands; derive it from torch.optim.Optimizer"
                )
            hooks = [
                optimizer.register_step_pre_hook(self._before_step),
                optimizer.register_step_post_hook(self._after_step),
            ]
            self._hooked.append((optimizer, hooks))

    def _hush(self) -> None:
        for _, hooks in self._hooked:
            for hook in hooks:
                hook.remove()
        self._hooked = []
        self._depth.clear()

    # -------------------------------------------------------------------------------------------------- control

    def begins(self, filler: SlotFiller) -> int:
        """The optimizer step at which a slot begins: not before its labels are in, which only a tied core can have."""
        assert self.total is not None
        begin = filler.schedule.begins(self.total)
        if not filler.calibration_steps:
            return begin
        mine = {id(place.tensor) for place in self.places[filler.state_key]}
        tied = [
            self.begins(other)
            for other in self.fillers
            if other.slot == "tying" != filler.slot
            and any(id(place.tensor) in mine for place in self.places[other.state_key])
        ]
        return max(begin, max(tied, default=0) + filler.calibration_steps)

    def strength(self, filler: SlotFiller, step: int) -> float:
        """How hard a slot acts at an optimizer step."""
        assert self.total is not None
        return filler.schedule.strength(step, self.total) if step >= self.begins(filler) else 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the scheduled strengths."""
        self._listen(trainer)
        self._reshard()
        step = trainer.global_step
        for filler in self.fillers:
            strength = self.strength(filler, step)
            for place in self.places[filler.state_key]:
                tensor = place.tensor
                if strength > 0 and not tensor.slots.phase[SLOTS.index(filler.slot)]:
                    for average in self.averages:
                        average.begin(pl_module, place)
                tensor.set_strength(filler.slot, strength, place.parameter)
        for place in self._everywhere():
            if place.tensor.traced(place.parameter):  # written to since the last batch
                place.tensor.absorb(place.parameter)
            place.tensor.show_if_stale(place.parameter)
            if place.tensor.slots.inputs is not None:
                place.tensor.slots.inputs.observing = True
        self._borrow()

    def _borrow(self) -> None:
        """Ask for the gradients of frozen weights beside which something learns."""
        for place in self._everywhere():
            parameter = place.parameter
            trained = any(True for slot in SLOTS for _ in place.tensor.slots.sidecars(slot))
            if trained and not parameter.requires_grad and not is_sharded(parameter):
                parameter.requires_grad_()
                self._borrowed.append(parameter)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Everything is hard until the next batch."""
        self._settle()
        self._agree_on_inputs()
        for average in self.averages:
            average.follow(self._everywhere())

    def _settle(self) -> None:
        """Whatever happened in a batch: hard weights, frozen ones frozen, no inputs seen."""
        self._reshard()
        self._lent.clear()
        self._depth.clear()
        for parameter in self._borrowed:
            parameter.requires_grad_(False)
            parameter.grad = None
        self._borrowed = []
        for place in self._everywhere():
            tensor = place.tensor
            if tensor.slots.inputs is not None:
                tensor.slots.inputs.observing = False
            for slot, phase in zip(SLOTS, list(tensor.slots.phase)):
                if phase == SOFT:
                    tensor.set_strength(slot, 1.0, place.parameter)
            if id(tensor) not in self._shown:
                tensor.absorb(place.parameter)
            tensor.show_if_stale(place.parameter)
        self._shown.clear()

    def _agree_on_inputs(self) -> None:
        """All processes go on with the mean of the ranges that they have seen."""
        seen = [place.tensor.slots.inputs for place in self._everywhere() if place.tensor.slots.inputs is not None]
        if seen and distributed.is_available() and distributed.is_initialized():
            bounds = [bound for inputs in seen for bound in inputs.buffers()]
            sums = torch.cat([bound.reshape(-1) for bound in bounds])
            distributed.all_reduce(sums)
            means = sums / distributed.get_world_size()
            for bound, mean in zip(bounds, torch.split(means, [bound.numel() for bound in bounds])):
                bound.copy_(mean.reshape(bound.shape))

    def _reshard(self) -> None:
        """Let go of weights that a forward pass has left whole: what is written to the shards would not reach them."""
        for unit in self._units:
            unit.reshard()

    # ----------------------------------------------------------------------------------------- an optimizer's step

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before `optimizer.step`, the outermost of it: a step may call that of the class it derives from."""
        self._depth[id(optimizer)] = self._depth.get(id(optimizer), 0) + 1
        if self._depth[id(optimizer)] > 1:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._ready(optimizer)
            return None
        kept: list[tuple[Place, torch.Tensor, tuple[int, int]]] = []
        if not type(optimizer).__module__.startswith("torch.optim."):
            kept = self._lend_early(optimizer)
        seen = partial(self._ask, optimizer, closure, kept)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": seen}
        return (args[0], seen, *args[2:]), kwargs

    def _lend_early(self, optimizer: Optimizer) -> list[tuple[Place, torch.Tensor, tuple[int, int]]]:
        """For an optimizer of others, which may look at weights, or move them, before it asks for a loss."""
        kept = []
        places = self._of(optimizer)
        for place in places:
            parameter = place.parameter
            shown = local(parameter) if place.tensor.swaps(parameter) else local(parameter).clone()
            place.tensor.lend(parameter)
            kept.append((place, shown, trace(parameter)))
        self._lent[id(optimizer)] = places
        return kept

    def _ask(
        self,
        optimizer: Optimizer,
        closure: Callable[..., Any],
        kept: list[tuple[Place, torch.Tensor, tuple[int, int]]],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """A loss, of hard weights: the first time of those that were there, as others have written them."""
        lent = self._lent.pop(id(optimizer), [])
        for place, shown, mark in kept:
            place.tensor.show_again(place.parameter, shown, mark)
        for place in lent if not kept else ():
            place.tensor.show(place.parameter)
        kept.clear()
        result = closure(*args, **kwargs)
        self._ready(optimizer)
        return result

    def _ready(self, optimizer: Optimizer) -> None:
        """The gradients are there, at the hard weights: make them the latent ones', and lend these."""
        assert self._trainer is not None and self._module is not None
        self._reshard()
        places = self._of(optimizer)
        for place in places:
            place.tensor.pull(place.parameter)
        self._share_frozen(places)
        self._lend(optimizer, places)
        for clipper in self.clippers:
            clipper.before_step(self._trainer, self._module, optimizer)
        self._show_labels(optimizer, places)
        for parameter in self._borrowed:
            parameter.grad = None  # an optimizer that holds it leaves it alone

    def _of(self, optimizer: Optimizer) -> list[Place]:
        """The tensors that an optimizer may move now; frozen ones that nobody moves go with the first."""
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        frozen = {id(parameter) for parameter in self._borrowed}
        found = []
        for place in self._everywhere():
            parameter = place.parameter
            if (id(parameter) in own or id(parameter) in frozen) and parameter.grad is not None:
                found.append(place)
        return found

    def _lend(self, optimizer: Optimizer, places: list[Place]) -> None:
        frozen = {id(parameter) for parameter in self._borrowed}
        for place in places:
            if id(place.parameter) not in frozen:
                place.tensor.lend(place.parameter)
        self._lent[id(optimizer)] = places

    def _share_frozen(self, places: list[Place]) -> None:
        """Sidecars of frozen weights get the mean of all processes' gradients, as DDP gives others."""
        if not (self._borrowed and distributed.is_available() and distributed.is_initialized()):
            return
        frozen = {id(parameter) for parameter in self._borrowed}
        for place in places:
            for sidecar in place.tensor.slots.awake() if id(place.parameter) in frozen else ():
                if sidecar.grad is not None:
                    distributed.all_reduce(sidecar.grad)
                    sidecar.grad.div_(distributed.get_world_size())

    def _show_labels(self, optimizer: Optimizer, places: list[Place]) -> None:
        """Let methods that want them see the gradients, before they begin."""
        assert self._trainer is not None
        scale = _scale(optimizer)
        here = set() if _overflowed(optimizer) else {id(place.tensor) for place in places}
        for filler in self.fillers:
            if filler.calibration_steps and self._trainer.global_step < self.begins(filler):
                for place in self.places[filler.state_key]:
                    if id(place.tensor) in here:
                        parameter = place.parameter
                        gradient = None if parameter.grad is None else gather(parameter.grad) / scale
                        place.tensor.slots.observe(filler.slot, place.tensor.dense(parameter), gradient)

    def _after_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After `optimizer.step`: step what is trained beside these weights, and make them hard."""
        self._depth[id(optimizer)] = self._depth.get(id(optimizer), 1) - 1
        if self._depth[id(optimizer)] > 0:
            return
        assert self._trainer is not None
        now = user_rate(self._trainer.optimizers)
        factor = now / self._base_rate if now is not None and self._base_rate else 1.0
        if _overflowed(optimizer):
            self.sidecars.forget()
        self.sidecars.step(factor, _scale(optimizer))
        self._mark_due(self._trainer.global_step + 1)
        for place in self._lent.pop(id(optimizer), []):
            place.tensor.slots.stale = place.tensor.slots.begun
            place.tensor.show(place.parameter)
            self._shown.add(id(place.tensor))

    def _mark_due(self, step: int) -> None:
        """Which slots recompute thresholds, scales and assignments after this step."""
        for filler in self.fillers:
            for place in self.places[filler.state_key]:
                place.tensor.slots.due[SLOTS.index(filler.slot)] = step % filler.refresh == 0

    # --------------------------------------------------------------------------------------- averages, endings

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's SWA takes the model's place for its last epoch, which renews the BatchNorm statistics."""
        for average in self.averages:
            average.follow(self._everywhere())
            average.adopt(self._everywhere())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An average may take the model's place next."""
        self._show_averages(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An average may take the model's place now."""
        self._show_averages(pl_module)

    def _show_averages(self, module: LightningModule) -> None:
        for average in self.averages:
            average.follow(self._everywhere())
            average.show(module, self._everywhere())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a usable model: what has begun is hard."""
        self._hush()
        self._settle()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so where training was too short for a slot's schedule."""
        self._hush()
        self._reshard()
        for average in self.averages:
            average.adopt(self._everywhere(), end=True)
        for place in self._everywhere():
            place.tensor.absorb(place.parameter)
            place.tensor.show_if_stale(place.parameter)
        if _spawns(trainer):
            hand_back(pl_module)
        if bool(trainer.fast_dev_run):  # type: ignore[attr-defined]  # assigned, declared nowhere
            return
        for filler in self.fillers:
            self._tell_short(filler, trainer.global_step)

    def _tell_short(self, filler: SlotFiller, step: int) -> None:
        index, who = SLOTS.index(filler.slot), f"{type(filler).__name__}({filler.method!r})"
        places = self.places[filler.state_key]
        if not places:
            return
        if all(place.tensor.slots.phase[index] != HARD for place in places):
            rank_zero_warn(
                f"{who} never began: training ended at step {step}, the slot begins at step {self.begins(filler)}. The "
                "model is uncompressed in this slot; train longer, or give an earlier begin."
            )
        elif (strength := self.strength(filler, step)) < 1 and filler.slot != "tying":  # which knows no ramp
            rank_zero_warn(
                f"{who} was hardened in mid-ramp: training ended at step {step}, at strength {strength:.2f}. What the rest "
                "of the ramp would have brought in gently came at once; train longer, or give an earlier end."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hold on to nothing of the run."""
        self._trainer = self._module = None
        self._units = []

    # --------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Beside the plain weights, what training needs to go on: under one key, tensors and primitives only."""
        if not self.fillers or not self.places:
            return
        self._reshard()
        self._show_averages(pl_module)
        checkpoint[KEY] = {
            "version": VERSION,
            "tensors": {
                place.name: {
                    "slots": _methods(place.tensor.slots),
                    "state": place.tensor.training_state(place.parameter),
                }
                for place in self._everywhere()
            },
            "optimizer": self.sidecars.state_dict(),
            "total_steps": self.total if self.total is not None and math.isfinite(self.total) else None,
            "base_rate": self._base_rate,
            "averages": [average.state_dict() for average in self.averages],
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Kept until what it is for exists."""
        found = checkpoint.get(KEY)
        if found is None:
            return
        if not isinstance(found, dict) or found.get("version") != VERSION:
            raise ValueError(
                f"the checkpoint's entry {KEY!r} is of another version of psc_lightning and cannot be resumed from; its "
                "weights can be trained on: model.load_state_dict(torch.load(path)['state_dict'])"
            )
        self._restored = found
        if self._hooked:  # in mid-run, as a learning rate finder does
            self._restore()

    def _restore(self) -> None:
        restored, self._restored = self._restored, None
        if restored is None:
            return
        tensors = restored["tensors"]
        self._compare(tensors)
        for place in self._everywhere():
            if place.name in tensors:
                place.tensor.load_training_state(place.parameter, tensors[place.name]["state"])
                place.tensor.reconcile(place.parameter)
        self.sidecars.load_state_dict(restored["optimizer"])
        self.total = restored["total_steps"]
        self._base_rate = restored["base_rate"] or self._base_rate
        for average, state in zip(self.averages, restored["averages"]):
            average.load_state_dict(state)

    def _compare(self, tensors: dict[str, Any]) -> None:
        """Refuse to go on with other methods than those that the checkpoint is of."""
        now = {place.name: _methods(place.tensor.slots) for place in self._everywhere()}
        then = {name: dict(found["slots"]) for name, found in tensors.items()}
        for name in [*now, *then]:
            if (has := now.get(name, {})) != (had := then.get(name, {})):
                raise ValueError(
                    f"{name}: the checkpoint was trained with {_told(had)}, this run has {_told(has)}: resume with the same "
                    "callbacks, or start from its weights: model.load_state_dict(torch.load(path)['state_dict'])"
                )


def _spawns(trainer: Trainer) -> bool:
    """Whether the run's processes start from this one, and hand back a state dict."""
    return bears(trainer.strategy.launcher, "_MultiProcessingLauncher")


def _scale(optimizer: Optimizer) -> float:
    """What the gradients are multiplied by, where an optimizer undoes it within its step (a fused one, under a scaler)."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def _methods(slots: Slots) -> dict[str, str]:
    """The methods and their options, in the order of the slots: what must be the same to go on."""
    told = {slot: (slots.specs[slot].method, slots.specs[slot].told) for slot in SLOTS if slot in slots.specs}
    return {slot: ", ".join([method, *(f"{k}={v}" for k, v in options.items())]) for slot, (method, options) in told.items()}


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether such an optimizer leaves its step out."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def _told(methods: dict[str, str]) -> str:
    return " + ".join(f"{slot} ({method})" for slot, method in methods.items()) or "no slots"
