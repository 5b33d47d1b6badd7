"""How many bytes the file may have."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from psc_lightning.artifact import measure
from psc_lightning.artifact.leftovers import Precisions
from psc_lightning.callbacks.rate import BITS, Rate, add, check_ladders, like
from psc_lightning.live import Place
from psc_lightning.report.numbers import Report
from psc_lightning.training.cast import Cast
from psc_lightning.training.conductor import Conductor

__all__ = ["ByteBudget", "in_bytes"]

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_LOOKS = 1000  # of the price, in a run
_MEASURES = 20  # of the file, in a run
_GAIN, _STEP = 0.3, 0.15  # of log(price) per look, by the log of how far the size is off; at most
_RANGE = 1e6  # how far the price may go from its first value, either way
_FIRST = 0.05  # the first price's gradient, in those of the loss
_AIM = 0.985  # of the budget: what is steered to, so that the last step's noise stays below it
_TRIM = 0.1  # of the non-zero entries: the most that are set to zero at the end


def in_bytes(budget: int | str) -> int:
    """A number of bytes, as people write it.

    Raises:
        ValueError: it is none; the message says what is.

    >>> in_bytes("27kB"), in_bytes("1.5 MiB"), in_bytes(900)
    (27000, 1572864, 900)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?[iI]?[bB]?)\s*", str(budget))
    unit = found.group(2).lower() if found else "?"
    unit = unit if unit in _UNITS else unit + "b"
    if found is None or unit not in _UNITS or not int(float(found.group(1)) * _UNITS[unit]):
        raise ValueError(f"budget: expected bytes, as in 900, '27kB' or '1.5 MiB', found {budget!r}")
    return int(float(found.group(1)) * _UNITS[unit])


class ByteBudget(Callback):
    """Trains a network into a file of at most so many bytes: a `RatePenalty` whose weight is steered by the file's size.

    The size wanted falls from that of the first step to the budget, geometrically, until `end` of training, and stays
    there. The size is that of the price, corrected by what `psc_lightning.measure` says of the file some twenty times a run;
    the price is raised where the size is above what is wanted, and lowered where it is below: by a factor of
    exp(0.3 · log(size/wanted)), at most 16 % at a time, up to 1,000 times a run. After the last step, entries that are just
    above zero are set to zero until the file fits, a tenth of all at most.

    Args:
        budget: bytes of the file: `27000`, `"27kB"` (1 kB = 1,000 bytes), `"1 MiB"`.
        end: share of training at which the budget is reached, 0 < end ≤ 1.
        leftovers, fold_batchnorm: as they will be given to `save`.

    Attributes:
        weight: the price now: loss a kilobyte.
        report: of the last measurement.

    Raises:
        ValueError: a wrong value (the argument is named), or, before training: no levels with a zero, a run of unknown
            length.

    >>> ByteBudget("27kB").budget
    27000

    Source: ours. A price that follows a size: the controller of a video coder's bit rate.
    """

    def __init__(
        self,
        budget: int | str,
        end: float = 0.55,
        leftovers: Precisions = "float32",
        fold_batchnorm: bool | dict[str, str] = False,
    ) -> None:
        super().__init__()
        self.budget = in_bytes(budget)
        if isinstance(end, bool) or not isinstance(end, int | float) or not 0 < end <= 1:
            raise ValueError(f"end: expected a share of training 0 < end ≤ 1, found {end!r}")
        self.end, self.leftovers, self.fold_batchnorm = float(end), leftovers, fold_batchnorm
        self.rate = Rate()
        self.weight: float | None = None
        self.report: Report | None = None
        self._first: tuple[float, float] | None = None  # the first price, the first size
        self._outside, self._ratio = 0.0, 1.0  # bytes beside the levels'; their bytes over the price's
        self._seen = -1  # the step of the last look
        self._measured = -math.inf  # of the last measurement

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take part in a fit."""
        if stage == "fit":
            Conductor.of(trainer).join_penalty(trainer, self)

    def check(self, cast: Cast) -> None:
        """Refuse a model without levels that have a zero, and a run without an end."""
        check_ladders(self, cast)
        if cast.total is None or not math.isfinite(cast.total):
            raise ValueError(
                "ByteBudget: the run has no known length to spread the way over; give max_epochs or max_steps"
            )
        if any(penalty is not self for penalty in cast.penalties):
            raise ValueError(
                "ByteBudget steers the price of bytes itself: leave out RatePenalty, and a second ByteBudget"
            )

    # ------------------------------------------------------------------------------------------------- steering

    def control(self, cast: Cast, step: int) -> None:
        """Look at the size, where it is time, and move the price."""
        assert cast.total is not None
        if step == self._seen or step % max(1, int(cast.total / _LOOKS)):
            return
        self._seen = step
        self.rate.look(cast.everywhere())
        if not self.rate.bits:
            return  # no levels have begun
        if step - self._measured >= cast.total / _MEASURES:
            self._measured = step
            self._calibrate(cast)
        size = self.size()
        if self._first is None:
            self._first = (0.0, size)
        start, aim = self._first[1], min(_AIM * self.budget, self._first[1])
        wanted = start * (aim / start) ** min(1.0, step / (self.end * cast.total))
        if self.weight is not None:
            change = max(-_STEP, min(_STEP, _GAIN * math.log(size / wanted)))
            first = self._first[0]
            self.weight = max(first / _RANGE, min(first * _RANGE, self.weight * math.exp(change)))

    def size(self) -> float:
        """Bytes of the file, by the price as of the last look."""
        return self._outside + self._ratio * (self.rate.bits or 0.0) / 8

    def _measure(self, cast: Cast) -> Report:
        assert cast.module is not None
        self.report = measure(cast.module, leftovers=self.leftovers, fold_batchnorm=self.fold_batchnorm)
        return self.report

    def _calibrate(self, cast: Cast) -> None:
        report = self._measure(cast)
        inside = sum(row.stored_bytes for row in report.tensors if _priced(row.name, self.rate))
        self._outside = report.file_bytes - inside
        self._ratio = inside / max(1.0, (self.rate.bits or 0.0) / 8)

    def before_step(self, places: list[Place], scale: float) -> None:
        """Add the price's gradient."""
        found = [(place, gradient) for place, gradient in self.rate.gradients(places) if gradient is not None]
        if self.weight is None and self._first is not None and found:
            loss = sum(
                float(place.parameter.grad.abs().sum()) for place, _ in found if place.parameter.grad is not None
            )
            price = sum(float(gradient.abs().sum()) for _, gradient in found)
            self.weight = _FIRST * BITS * loss / scale / price if loss and price else None
            self._first = (self.weight or 0.0, self._first[1])
        if self.weight is not None:
            for place, gradient in found:
                add(place, gradient, scale * self.weight / BITS)

    # --------------------------------------------------------------------------------------------------- the end

    @torch.no_grad()
    def finish(self, cast: Cast) -> None:
        """Set the least certain entries to zero until the file fits."""
        report = self._measure(cast)
        if report.file_bytes > self.budget:
            report = self._trim(cast)
        if report.file_bytes > self.budget:
            smaller = "train longer" if self.end < 0.9 else "give a smaller end, train longer"
            rank_zero_warn(
                f"ByteBudget: the file has {report.file_bytes:,} bytes, {self.budget:,} were allowed. {smaller}, raise the "
                f"budget, or compress what is not priced: {report.file_bytes - self._inside(report):,} bytes are names, "
                "biases, statistics and tensors outside the slots (leftovers='log8', names=False, fold_batchnorm=True)"
            )

    def _inside(self, report: Report) -> int:
        return sum(row.stored_bytes for row in report.tensors if _priced(row.name, self.rate))

    def _trim(self, cast: Cast) -> Report:
        """Bisect how many entries go, those nearest to the edge of zero first; the least that fits, or the most there may be."""
        places = [place for place in cast.everywhere() if place.name in self.rate.prices and _plain(place)]
        whole = {place.name: place.tensor.dense(place.parameter).clone() for place in places}
        edges = {place.name: _above_zero(place, whole[place.name]) for place in places}
        if not places:
            return self._measure(cast)
        sure = torch.cat([edge[edge.isfinite()] for edge in edges.values()]).sort().values
        low, high = 0, int(_TRIM * len(sure))

        def cut(number: int) -> Report:
            limit = float(sure[number - 1]) if number else -math.inf
            for place in places:
                latent = torch.where(edges[place.name] <= limit, 0.0, whole[place.name])
                place.tensor.follow(place.parameter, like(latent, place.parameter))
            return self._measure(cast)

        report = cut(high)
        while high - low > max(1, len(sure) // 500) and report.file_bytes <= self.budget:
            middle = (low + high) // 2
            found = cut(middle)
            low, high = (low, middle) if found.file_bytes <= self.budget else (middle, high)
        return cut(high)

    # ---------------------------------------------------------------------------------------------- checkpoints

    def penalty_state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        own = {"weight": self.weight, "first": self._first, "outside": self._outside, "ratio": self._ratio}
        return {**own, "seen": self._seen, "measured": self._measured, **self.rate.state_dict()}

    def load_penalty_state(self, state: dict[str, Any]) -> None:
        """Put it back."""
        self.weight, self._outside, self._ratio = state["weight"], state["outside"], state["ratio"]
        self._first = None if state["first"] is None else tuple(state["first"])
        self._seen, self._measured = state["seen"], state["measured"]
        self.rate.load_state_dict(state)


def _priced(name: str, rate: Rate) -> bool:
    return name in rate.prices


def _plain(place: Place) -> bool:
    """Whether an entry of the latent weight is one of the core: no tying is between them."""
    return place.tensor.slots.tying is None


def _above_zero(place: Place, latent: Tensor) -> Tensor:
    """How far each entry is above the edge of zero, in levels; infinite where it is zero."""
    slots = place.tensor.slots
    for _, position, _, keep, _ in slots.rungs(latent):
        size = position.abs() - 0.5
        dead = size <= 0 if keep is None else (size <= 0) | ~keep
        return slots.layout.weight(torch.where(dead, math.inf, size), slots.stored_shape)
    return torch.full_like(latent, math.inf)
