"""How long a run is: what is known at its start, and better estimates as it goes on.

The clock is `trainer.global_step`, which counts the steps of every optimizer. At the start it is taken that each optimizer
steps once a batch, or as gradients are accumulated. Who steps by hand may do otherwise: what the run has done so far is then
projected onto all of its batches, after each. A loader without a length has one from the end of the first epoch on; and a
run that a time limits is as long as its time lets it be.
"""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from psc_lightning.training.run import callbacks_of, is_named

__all__ = ["Length", "planned"]


def planned(trainer: Trainer, module: LightningModule, batches: float) -> float:
    """The optimizer steps that so many batches take from the start of a run, one a batch or as gradients are accumulated."""
    whole = trainer.num_training_batches
    if not math.isfinite(whole) or not math.isfinite(batches):
        return math.inf
    # Lightning takes the factor of now for that of every epoch. (Known by its name: pytorch_lightning's is another.)
    schedulers: list[Any] = [one for one in callbacks_of(trainer) if is_named(one, "GradientAccumulationScheduler")]
    epochs, rest = divmod(int(batches), int(whole)) if whole else (0, 0)
    steps = 0
    for epoch, number in [*((epoch, whole) for epoch in range(epochs)), (epochs, rest)]:
        factor = schedulers[0].get_accumulate_grad_batches(epoch) if schedulers else trainer.accumulate_grad_batches
        steps += math.ceil(number / factor)
    return steps * (1 if module.automatic_optimization else max(1, len(trainer.optimizers)))


def _epochs(trainer: Trainer) -> float:
    return math.inf if trainer.max_epochs is None or trainer.max_epochs < 0 else max(trainer.max_epochs, 1)


def _timer(trainer: Trainer) -> Any:
    """What ends a run after some time; None without such a thing."""
    timers: list[Any] = [one for one in callbacks_of(trainer) if is_named(one, "Timer")]
    return next((one for one in timers if one.time_remaining() is not None), None)


class Length:
    """How many optimizer steps a run has.

    Attributes:
        total: of the whole run, by the best estimate; None before training, infinite where nothing is known.
        since: the step from which a schedule's shares of training count: 0, or where a run was taken up that had begun
            without us, or where a length became known.
    """

    def __init__(self) -> None:
        self.total: float | None = None
        self.since = 0
        self._guess: float | None = None  # the first one, until an epoch is over
        self._counted = math.inf  # the total by epochs, whatever time allows
        self._mark = (0, 0)  # the last epoch that began, and the step there
        self._timed_from = 0  # the step at which the timer was at 0

    def start(self, trainer: Trainer, module: LightningModule, taken_up: bool) -> None:
        """Training starts, or goes on; what a checkpoint said of the length holds.

        Args:
            trainer, module: of the run.
            taken_up: whether it goes on from a checkpoint of a run without us.
        """
        if self.total is None:
            if taken_up:
                self.since = self._timed_from = trainer.global_step
            self._counted = planned(trainer, module, _epochs(trainer) * trainer.num_training_batches)
            self._take(trainer, math.inf)
            self._guess = self.total
        timer = _timer(trainer)
        if timer is not None and timer.time_elapsed() == 0:
            self._timed_from = trainer.global_step

    @property
    def known(self) -> bool:
        """Whether there is an estimate."""
        return self.total is not None and math.isfinite(self.total)

    def will_be_known(self, trainer: Trainer) -> bool:
        """Whether there is one, or will be before the run ends: with a timer, or with a second epoch."""
        return self.known or _timer(trainer) is not None or 2 <= _epochs(trainer) - trainer.current_epoch < math.inf

    def follows_time(self, trainer: Trainer) -> bool:
        """Whether a time limits the run."""
        return _timer(trainer) is not None

    def after_epoch(self, trainer: Trainer, module: LightningModule) -> float | None:
        """Before another epoch: those so far may have had fewer or more steps than was taken.

        Returns:
            The first time, what the total was taken to be at the start.
        """
        epoch, now, whole = trainer.current_epoch, trainer.global_step, trainer.num_training_batches
        (then, step), self._mark = self._mark, (epoch, now)
        if epoch <= then:
            return None
        if not math.isfinite(whole):
            self._counted = now + (_epochs(trainer) - epoch) * (now - step) / (epoch - then)
        elif module.automatic_optimization:
            so_far = planned(trainer, module, epoch * whole)
            expected, left = (
                so_far - planned(trainer, module, then * whole),
                planned(trainer, module, _epochs(trainer) * whole),
            )
            if now - step != expected:  # else a run that was made longer keeps the length that it began with
                self._counted = now + (left - so_far) * (now - step) / expected
        self._take(trainer, self._time(trainer))
        guess, self._guess = self._guess, None
        return guess

    def after_batch(self, trainer: Trainer, module: LightningModule, batch_idx: int) -> None:
        """Under manual optimization, and where a time ends the run, each batch tells more."""
        now, whole = trainer.global_step, trainer.num_training_batches
        by_hand = not module.automatic_optimization and math.isfinite(whole) and now > 0
        if by_hand:
            self._counted = now * _epochs(trainer) * whole / (trainer.current_epoch * whole + batch_idx + 1)
        if by_hand or _timer(trainer) is not None:
            self._take(trainer, self._time(trainer))

    def _time(self, trainer: Trainer) -> float:
        """The total that a timer lets expect from the steps so far, the same on all ranks."""
        timer, now = _timer(trainer), trainer.global_step
        if timer is None:
            return math.inf
        elapsed, steps = timer.time_elapsed(), now - self._timed_from
        guess = now + steps * max(timer.time_remaining(), 0.0) / elapsed if steps > 0 and elapsed > 0 else math.inf
        agreed: float = trainer.strategy.broadcast(guess)
        return agreed

    def _take(self, trainer: Trainer, timed: float) -> None:
        total = min(self._counted, timed, trainer.max_steps if trainer.max_steps >= 0 else math.inf)
        if self.total == math.inf > total:
            self.since = trainer.global_step
        self.total = math.floor(total + 0.5) if math.isfinite(total) else total

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; None for what is infinite."""
        known = {"total": self.total, "counted": self._counted}
        finite = {key: value if value is not None and math.isfinite(value) else None for key, value in known.items()}
        return {**finite, "since": self.since, "mark": list(self._mark), "timed_from": self._timed_from}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put it back."""
        self.total, self._counted = state["total"], math.inf if state["counted"] is None else state["counted"]
        self.since, self._mark, self._timed_from = state["since"], tuple(state["mark"]), state["timed_from"]
