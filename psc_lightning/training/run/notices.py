"""What users are told of a run: at its start, when it becomes known, at its end."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from psc_lightning.slots.live import Place
from psc_lightning.slots.slots import HARD, SLOTS
from psc_lightning.training.cast import Cast, SlotFiller
from psc_lightning.training.rounding import Rounder
from psc_lightning.training.run import callbacks_of, is_named
from psc_lightning.training.run.length import planned

__all__ = ["at_end", "at_start", "when_known"]

_SPARSE = 0.5  # share of zeros from which on a weight has been pruned: ternary levels alone give 0.42


def _who(one: SlotFiller | Rounder) -> str:
    method = getattr(one, "method", None)  # no Rounder has one
    return type(one).__name__ + (f"({method!r})" if method else "")


def _scheduled(cast: Cast) -> list[SlotFiller | Rounder]:
    return [*cast.fillers, *cast.rounding.rounders]


def at_start(cast: Cast, trainer: Trainer, module: LightningModule, taken_up: bool, resumed: bool) -> None:
    """What can be known before the first step; ValueError where a schedule needs a length that a run never has.

    Args:
        cast, trainer, module: of the run.
        taken_up: whether it goes on from a checkpoint of a run without us.
        resumed: whether it goes on from one of ours.
    """
    for one in _scheduled(cast):
        if not cast.known(one) and not cast.length.will_be_known(trainer):
            try:
                one.schedule.strength(0, cast.total)  # says what is a share
            except ValueError as error:
                raise ValueError(
                    f"{_who(one)}: {error} (Schedule(begin=100, end=500)), or give the run a length: "
                    "Trainer(max_steps=…), or for data without one limit_train_batches=…"
                ) from None
    for filler in cast.fillers:
        _labels(cast, filler)
    _unknown(cast, trainer)
    if taken_up:
        _taken_up(cast)
    _stopping_early(cast, trainer, module)
    if not resumed:
        _sparse(cast, trainer.global_step)
        _left_in_force(cast)


def _labels(cast: Cast, filler: SlotFiller) -> None:
    blind = [
        place.name
        for place in cast.of(filler)
        if not place.parameter.requires_grad and not any(True for _ in place.tensor.slots.sidecars("tying"))
    ]
    if filler.calibration_given and cast.known(filler) and filler.calibration_steps > cast.begins(filler):
        rank_zero_warn(
            f"{_who(filler)}: calibration_steps={filler.calibration_steps} do not fit into a run of {cast.total} steps; it "
            f"begins at step {cast.begins(filler)}, with the labels of those before"
        )
    if filler.calibration_steps and blind:
        rank_zero_warn(
            f"{_who(filler)} gets no labels from frozen weights, and goes by their magnitude: {', '.join(blind)}"
        )


def _unknown(cast: Cast, trainer: Trainer) -> None:
    """A length that is known later, or never exactly."""
    relative = [_who(one) for one in _scheduled(cast) if not one.schedule.counts_steps]
    if relative and cast.length.follows_time(trainer):
        rank_zero_info(
            f"a time limits this run: {', '.join(relative)} follow(s) the share of it that is used, and a second run will "
            "not be the same bit for bit; give begin and end of the schedule in steps if it should be"
        )
    elif relative and not cast.length.known:
        rank_zero_warn(
            f"the data has no length, so how many steps this run has is not known before its first epoch is over: "
            f"{', '.join(relative)} wait(s) until then, and its schedule takes shares of what is left; give begin and end of "
            "the schedule in steps, or Trainer(max_steps=…) or (limit_train_batches=…), to begin at once"
        )


def _taken_up(cast: Cast) -> None:
    told = []
    for filler in (one for one in cast.fillers if cast.known(one)):
        begin, end = _span(cast, filler)
        when = f"ramps from step {begin} to step {end}" if end > begin else f"acts in full from step {begin} on"
        told.append(f"{_who(filler)} {when}")
    if told:
        rank_zero_info(
            f"the checkpoint was trained without psc_lightning until step {cast.length.since} of {cast.total}: "
            f"{', '.join(told)} (shares of training are shares of what is left)"
        )


def _span(cast: Cast, filler: SlotFiller) -> tuple[float, float]:
    """From which step on a slot acts, and from which on in full."""
    begin = max(cast.begins(filler), cast.length.since)
    end = (
        begin if filler.slot == "tying" else filler.schedule.ends(cast.total, cast.length.since)
    )  # which knows no ramp
    return begin, max(begin, end)


def _stopping_early(cast: Cast, trainer: Trainer, module: LightningModule) -> None:
    """EarlyStopping knows nothing of ramps: a run that it ends within one is hardened at once."""
    stopping = [one for one in callbacks_of(trainer) if is_named(one, "EarlyStopping")]
    known = [filler for filler in cast.fillers if cast.known(filler)]
    if not stopping or not known:
        return
    last = max(known, key=lambda filler: _span(cast, filler)[1])
    end = _span(cast, last)[1]
    between = min(trainer.val_check_batch or math.inf, trainer.num_training_batches)
    checks = min(_checks(one) for one in stopping) * between
    least = (
        planned(trainer, module, number)
        for number in (checks, (trainer.min_epochs or 0) * trainer.num_training_batches)
    )
    if max(trainer.min_steps or 0, trainer.global_step, *(steps for steps in least if math.isfinite(steps))) < end:
        total = cast.total if math.isfinite(cast.total) else "as many as it takes"
        rank_zero_warn(
            f"{type(stopping[0]).__name__} may end this run in mid-ramp: {_who(last)} acts in full from step {end} of "
            f"{total} on, and is hardened at once if the run stops before. Trainer(min_steps={end}) keeps it from that; or "
            "give the schedule's begin and end in steps that come early enough"
        )


def _checks(stopping: Any) -> int:
    """How often it looks at its metric before it can end a run: the first time is the best so far."""
    thresholds = (stopping.stopping_threshold, stopping.divergence_threshold)
    return 1 if any(one is not None for one in thresholds) else 1 + max(stopping.patience, 1)


def _sparse(cast: Cast, step: int) -> None:
    """Weights that are mostly zero already, and what keeps these zeros."""
    kept: dict[int, float] = {}
    for filler in cast.fillers:
        if (
            filler.slot == "mask"
            and cast.known(filler)
            and filler.schedule.begins(cast.total, cast.length.since) <= step
        ):
            kept |= {
                id(place.tensor): place.tensor.slots.specs["mask"].options["threshold"] for place in cast.of(filler)
            }
    shares = {place: _zeros(place) for place in cast.everywhere()}
    lost = {
        place: share
        for place, share in shares.items()
        if _SPARSE <= share < 1 and share > kept.get(id(place.tensor), 0.0) + 0.01
    }
    if lost:
        place, share = next(iter(lost.items()))
        rank_zero_warn(
            f"{_named(list(lost))}: {share:.0%} of it is zero already, and {place.tensor.slots.method} keeps only "
            f"{kept.get(id(place.tensor), 0.0):.0%} so from the start: the other zeros become numbers again. "
            f"MaskLearning(threshold={share:.2f}) keeps them, if its schedule begins at 0.0"
        )


def _named(places: list[Place]) -> str:
    return places[0].name + (f" (and the like in {len(places) - 1} more)" if len(places) > 1 else "")


def _zeros(place: Place) -> float:
    """The share of zeros in a weight that nothing of ours acts on so far."""
    if place.tensor.latent is not None:
        return 0.0
    weight = place.tensor.dense(place.parameter)
    return int((weight == 0).sum()) / weight.numel()


def _left_in_force(cast: Cast) -> None:
    """Slots that an earlier fit has filled, under callbacks that are not there now."""
    owners = {filler.state_key for filler in cast.fillers}
    left = [
        (place, slot, spec)
        for place in cast.everywhere()
        for slot, spec in place.tensor.slots.specs.items()
        if spec.owner not in owners and place.tensor.slots.phase[SLOTS.index(slot)]
    ]
    if left:
        _, slot, spec = left[0]
        rank_zero_warn(
            f"{_named([place for place, _, _ in left])}: its {slot} slot ({spec.method}) is in force since an earlier fit, "
            f"and without its callback {spec.owner} nothing is trained or scheduled in it; psc_lightning.detach(model) "
            "before fit keeps the compressed weights and empties all slots"
        )


def when_known(before: float, cast: Cast) -> None:
    """The length has become known, or another than was taken by more than a hundredth."""
    now = cast.total
    if not math.isfinite(before):
        rank_zero_info(f"this run is taken to have {now} optimizer steps; schedules begin at step {cast.length.since}")
    elif abs(now - before) > 0.01 * before:
        rank_zero_info(f"this run is taken to have {now} optimizer steps, not {before}; schedules follow")


def at_end(cast: Cast, step: int) -> None:
    """Slots that never began, or were hardened in mid-ramp."""
    for filler in cast.fillers:
        _cut_short(cast, filler, step)
    cast.rounding.warn_unbegun(step)


def _cut_short(cast: Cast, filler: SlotFiller, step: int) -> None:
    index, places = SLOTS.index(filler.slot), cast.of(filler)
    if not places:
        return
    if all(place.tensor.slots.phase[index] != HARD for place in places):
        begins = (
            f"begins at step {cast.begins(filler)}" if cast.known(filler) else "waits for the end of the first epoch"
        )
        rank_zero_warn(
            f"{_who(filler)} never began: training ended at step {step}, the slot {begins}. The "
            "model is uncompressed in this slot; train longer, or give an earlier begin."
        )
    elif (strength := cast.strength(filler, step)) < 1 and filler.slot != "tying":  # which knows no ramp
        rank_zero_warn(
            f"{_who(filler)} was hardened in mid-ramp: training ended at step {step}, at strength {strength:.2f}. What the "
            "rest of the ramp would have brought in gently came at once; train longer, or give an earlier end."
        )
