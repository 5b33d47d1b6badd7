"""The one Lightning callback that does something: it owns the order of a step, for all of ours.

    control → forward, backward → (around the optimizer's step: see `stepping`) → settle

Between steps every Parameter is hard, within the batches of a ramp blended.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from psc_lightning.activations import activations
from psc_lightning.numerics.asking import answers
from psc_lightning.sharding import sharded_modules
from psc_lightning.slots.live import compressed, hand_back
from psc_lightning.slots.slots import SLOTS
from psc_lightning.training import entry
from psc_lightning.training.averaging import Average
from psc_lightning.training.batchnorm import Inputs, note_refreshed
from psc_lightning.training.cast import Cast, Clipper, Penalty, SlotFiller
from psc_lightning.training.rounding import Rounder
from psc_lightning.training.run import builds_late, callbacks_of, idle_in, insert, is_named, notices, user_rate
from psc_lightning.training.stepping import Stepping

__all__ = ["Conductor"]

_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


class Conductor(Callback):
    """Put into the Trainer by the first of our callbacks; the others are declarations that it reads."""

    def __init__(self) -> None:
        self.cast = Cast()
        self.stepping = Stepping(self.cast)
        self.averages: list[Average] = []
        self.inputs: Inputs | None = None  # of the last batches, to take BatchNorm's statistics anew from
        self._loaded = self._resumed = False  # from a checkpoint; from one of ours
        self._restored: dict[str, Any] | None = None
        self._each = 0  # how many of them before each validation
        self._kept: list[Any] = []  # of a checkpoint, until there are inputs

    # ------------------------------------------------------------------------------------------- who takes part

    @classmethod
    def of(cls, trainer: Trainer) -> Conductor:
        """The conductor of a run: before all callbacks but those that average weights, whose averages it makes hard."""
        callbacks = callbacks_of(trainer)
        found = next((callback for callback in callbacks if isinstance(callback, cls)), None)
        if found is None:
            found = cls()
            averaging = [index for index, one in enumerate(callbacks) if is_named(one, *_AVERAGING)]
            insert(trainer, 1 + max(averaging, default=-1), found)
        return found

    def join_slot(self, trainer: Trainer, module: LightningModule, filler: SlotFiller) -> None:
        """Take in a callback that fills a slot; attach it, where the layers are there already."""
        who = f"{type(filler).__name__}({filler.method!r})"
        if is_named(trainer.strategy, "FSDPStrategy", "DeepSpeedStrategy"):
            raise ValueError(
                f"{who} cannot see whole weights under {type(trainer.strategy).__name__}; "
                "use DDP or ModelParallelStrategy (FSDP2)"
            )
        owners = [t.slots.specs[filler.slot].owner for _, t, _ in compressed(module) if filler.slot in t.slots.specs]
        _check_spawned(trainer, who, filler.state_key in owners)
        self._start(trainer)
        self.cast.add(filler)
        _attach(filler, trainer, module)

    def join_rounding(self, trainer: Trainer, module: LightningModule, rounder: Rounder) -> None:
        """Take in a callback that has inputs rounded; attach it, where the layers are there already."""
        owners = [inputs.owner for _, _, inputs in activations(module)]
        _check_spawned(trainer, type(rounder).__name__, rounder.state_key in owners)
        self._start(trainer)
        self.cast.rounding.add(rounder)
        _attach(rounder, trainer, module)

    def join_clipping(self, trainer: Trainer, clipper: Clipper) -> None:
        """Take in a callback that clips."""
        self._start(trainer)
        if clipper not in self.cast.clippers:
            self.cast.clippers.append(clipper)

    def join_penalty(self, trainer: Trainer, penalty: Penalty) -> None:
        """Take in a callback that adds to gradients."""
        self._start(trainer)
        if penalty not in self.cast.penalties:
            self.cast.penalties.append(penalty)

    def _start(self, trainer: Trainer) -> None:
        self.cast.start(callbacks_of(trainer))
        self._restored, self._loaded, self._resumed = None, False, False

    # -------------------------------------------------------------------------------------------- before training

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Verify that every target is attached, also in layers that were built since."""
        self.cast.trainer, self.cast.module = trainer, pl_module
        self.stepping.units = sharded_modules(pl_module)
        for clipper in self.cast.clippers:
            clipper.check(trainer)
        self.cast.attach(pl_module, idle_in(trainer, trainer.optimizers))
        self._refuse_pruning(trainer)
        for filler in self.cast.fillers[:1]:
            filler.check(pl_module)
        if _spawns(trainer):
            self.cast.rounding.unshare()
            for place in self.cast.everywhere():
                place.tensor.unshare()
        self.averages = [Average(one) for one in callbacks_of(trainer) if is_named(one, *_AVERAGING)]
        self._restore()

    def _refuse_pruning(self, trainer: Trainer) -> None:
        """Lightning's own pruning puts another Parameter in the place of each that it prunes, in mid-training."""
        for callback in callbacks_of(trainer):
            pruned = {(id(layer), name) for layer, name in getattr(callback, "_parameters_to_prune", None) or ()}
            both = [place.name for place in self.cast.everywhere() if (id(place.layer), place.attribute) in pruned]
            if is_named(callback, "ModelPruning") and both:
                raise ValueError(
                    f"{type(callback).__name__} and psc_lightning's callbacks both take {', '.join(both[:4])}: leave them to "
                    "one of the two (`ignore` here, `parameters_to_prune` there), or use MaskLearning for both"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where a checkpoint was (sharded ones are read after `on_fit_start`); count the steps; listen to optimizers.

        Not earlier: asking for the total loads the data, which a resume still positions.
        """
        self._restore()
        cast = self.cast
        taken_up = self._loaded and not self._resumed
        cast.length.start(trainer, pl_module, taken_up)
        if cast.base_rate is None:  # not before: a finder may still change it
            cast.base_rate = user_rate(trainer.optimizers, initial=True)
        notices.at_start(cast, trainer, pl_module, taken_up, self._resumed)
        for penalty in cast.penalties:
            penalty.check(cast)
        if cast.left is not None:
            rank_zero_warn(cast.left)
        self.stepping.listen(trainer.optimizers)
        kept, self._each = cast.batchnorm_batches(trainer.num_training_batches)
        # Averages have statistics of their own: Lightning's SWA takes them anew, EMA follows them.
        self.inputs = Inputs(pl_module, kept) if kept and not self.averages else None
        if self.inputs is not None:
            self.inputs.load_state_dict(self._kept)
        self._kept = []

    # ------------------------------------------------------------------------------------------------- a batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the scheduled strengths."""
        # Not when an epoch starts: Lightning leaves that hook out after some resumes.
        if batch_idx == 0 and (guess := self.cast.length.after_epoch(trainer, pl_module)) is not None:
            notices.when_known(guess, self.cast)
        self.stepping.listen(trainer.optimizers)
        self.stepping.reshard()
        self._act(trainer, pl_module)
        answers(  # what was written to since the last batch
            place.tensor.settling(place.parameter, place.tensor.traced(place.parameter))
            for place in self.cast.everywhere()
        )
        for place in self.cast.everywhere():
            place.tensor.refreshed = 0
        for penalty in self.cast.penalties:
            penalty.control(self.cast, trainer.global_step)
        self.cast.rounding.observe()
        self.stepping.borrow()
        if self.inputs is not None and any(place.tensor.slots.begun for place in self.cast.everywhere()):
            self.inputs.see(batch)

    def _act(self, trainer: Trainer, module: LightningModule) -> None:
        """Set the strengths that the schedules have for the step that comes."""
        for filler in self.cast.fillers:
            for place in self.cast.of(filler):
                strength = self.cast.strength_in(place, filler, trainer.global_step)
                if strength > 0 and not place.tensor.slots.phase[SLOTS.index(filler.slot)]:
                    for average in self.averages:
                        average.begin(module, place)
                place.tensor.set_strength(filler.slot, strength, place.parameter)
            self.cast.reached[filler.state_key] = self.cast.strength(filler, trainer.global_step)
        for rounder in self.cast.rounding.rounders:
            strength = self.cast.reached[rounder.state_key] = self.cast.scheduled(rounder, trainer.global_step)
            self.cast.rounding.act(rounder, strength)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Harden all weights: from here to the next batch they are what a file would hold."""
        self.cast.length.after_batch(trainer, pl_module, batch_idx)
        if trainer.global_step >= self.cast.total:  # the last: what begins in the very end begins
            self._act(trainer, pl_module)
        self._settle()
        self.cast.rounding.agree()
        for average in self.averages:
            average.follow(self.cast.everywhere())

    def _settle(self) -> None:
        """End a batch: hard weights, frozen Parameters frozen again, no activation ranges recorded."""
        self.stepping.reshard()
        self.cast.rounding.settle()
        for place in self.cast.everywhere():
            tensor = place.tensor
            tensor.end_ramp(place.parameter)
        stepped = self.stepping.stepped
        answers(
            place.tensor.settling(place.parameter, id(place.tensor) not in stepped) for place in self.cast.everywhere()
        )
        self.stepping.settled()

    # --------------------------------------------------------------------------------------- averages, endings

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's SWA takes the model's place for its last epoch, which renews the BatchNorm statistics."""
        for average in self.averages:
            average.follow(self.cast.everywhere())
            average.adopt(self.cast.everywhere())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An average may take the model's place next."""
        self._show_averages(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An average may take the model's place now; BatchNorm's statistics become those of the weights as they are."""
        self._show_averages(pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._refresh_batchnorm(trainer)

    def _refresh_batchnorm(self, trainer: Trainer) -> None:
        """Once after a step; from all inputs after the last one, so that what is validated then is what is saved."""
        inputs = self.inputs
        if inputs is None or inputs.fresh or not any(place.tensor.slots.begun for place in self.cast.everywhere()):
            return
        last = trainer.global_step >= self.cast.total
        try:
            with trainer.precision_plugin.forward_context():
                taken = inputs.replay(None if last else self._each)
            note_refreshed(inputs.model, taken)
        except Exception as error:  # the user's module cannot be called with what its signature asks for
            inputs.problem = f"calling {type(inputs.model).__name__} raised {error!r}"
        if inputs.norms and inputs.problem and not inputs.warned:
            inputs.warned = True
            rank_zero_warn(
                "BatchNorm's statistics are a running average over weights that moved, which costs networks of few levels "
                f"accuracy. They could not be taken anew ({inputs.problem}): before saving, call "
                "psc_lightning.refresh_batchnorm(model, batches, forward=…), or give refresh_batchnorm=0"
            )

    def _refresh_anew(self, trainer: Trainer) -> None:
        """After weights have changed without a step."""
        if self.inputs is not None:
            self.inputs.fresh = False
        self._refresh_batchnorm(trainer)

    def _show_averages(self, module: LightningModule) -> None:
        for average in self.averages:
            average.follow(self.cast.everywhere())
            average.show(module, self.cast.everywhere())

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave a usable model: what has begun is hard."""
        self.stepping.stop()
        self._settle()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Harden all weights; warn where training ended before a slot's schedule did."""
        self.stepping.stop()
        self.stepping.reshard()
        for average in self.averages:
            average.adopt(self.cast.everywhere(), end=True)
        self._act(trainer, pl_module)
        for place in self.cast.everywhere():
            place.tensor.end_ramp(place.parameter)
        answers(place.tensor.settling(place.parameter, absorb=True) for place in self.cast.everywhere())
        self._refresh_batchnorm(trainer)
        for penalty in self.cast.penalties:
            penalty.finish(self.cast, partial(self._refresh_anew, trainer))
        if _spawns(trainer):
            hand_back(pl_module)
        if bool(trainer.fast_dev_run):  # type: ignore[attr-defined]  # assigned, declared nowhere
            return
        notices.at_end(self.cast, trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop all references to the run."""
        self.cast.trainer = self.cast.module = self.inputs = None
        self.stepping.units = []

    # --------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add our entry."""
        if self.cast.places or self.cast.rounding.layers:
            self.stepping.reshard()
            self._show_averages(pl_module)
            self._refresh_batchnorm(trainer)
            checkpoint[entry.KEY] = entry.write(self.cast, self.averages)
            inputs = self.inputs
            if inputs is not None and inputs.fresh:  # the state was taken before
                checkpoint["state_dict"] |= inputs.statistics(checkpoint["state_dict"])
            # After an epoch of as many batches as are kept the next validation has only later ones.
            later = inputs is None or (
                trainer.is_last_batch and trainer.num_training_batches >= (inputs.batches.maxlen or 0)
            )
            checkpoint[entry.KEY]["inputs"] = [] if later or inputs is None else inputs.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep our entry until the layers and optimizers exist."""
        self._loaded, self._resumed = True, entry.KEY in checkpoint
        if self._resumed:
            self._restored = entry.check(checkpoint[entry.KEY])

    def _restore(self) -> None:
        restored, self._restored = self._restored, None
        if restored is not None:
            entry.read(restored, self.cast, self.averages)
            self._kept = restored["inputs"]


def _spawns(trainer: Trainer) -> bool:
    """Whether the run's processes start from this one, and hand back a state dict."""
    return is_named(trainer.strategy.launcher, "_MultiProcessingLauncher")


def _check_spawned(trainer: Trainer, who: str, attached: bool) -> None:
    if _spawns(trainer) and not attached:
        raise ValueError(
            f"{who}: the processes of strategy='ddp_spawn' (ddp_fork, ddp_notebook) "
            "hand back a state dict, which a model without slots would take as if nothing had been compressed: call "
            "psc_lightning.attach(model, callbacks) before fit, or use strategy='ddp'"
        )


def _attach(callback: SlotFiller | Rounder, trainer: Trainer, module: LightningModule) -> None:
    """Attach a callback; again, when all layers are there, where the user's hooks may build some."""
    try:
        callback.attach(module, callback.choose(module, idle_in(trainer, [])))  # those of an older run do not count
    except ValueError:
        if not builds_late(module):
            raise
