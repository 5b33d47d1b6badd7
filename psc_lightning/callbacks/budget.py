"""How many bytes the file may have."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from psc_lightning.artifact import dense_bytes, measure
from psc_lightning.artifact.leftovers import Precisions
from psc_lightning.callbacks.rate import BITS, LADDERS, Rate, add, has_ladder, like
from psc_lightning.coarseness import AUTO, Folding, foldable
from psc_lightning.numerics.shares import shares
from psc_lightning.report.numbers import Report
from psc_lightning.sharding import gather
from psc_lightning.slots.ladder import rungs_of, set_threshold
from psc_lightning.slots.live import Place
from psc_lightning.training.cast import Cast
from psc_lightning.training.conductor import Conductor
from psc_lightning.words import hinting

__all__ = ["ByteBudget", "in_bytes"]

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_LOOKS = 1000  # at the price, in a run
_MEASURES = 20  # of the file, in a run
_GAIN, _STEP = 0.5, 0.25  # of log(price) a look, by the log of how far the size is off; at most
_RANGE = 1e6  # how far the price may go from its first value, either way
_AHEAD = 0.04  # of a run: how far ahead a size is judged, by its trend
_SMOOTH = 0.3  # of the trend, a look
_FIRST = 0.1  # the first price's gradient, in units of the loss's
_AIM = 0.985  # of the budget: what is steered to, so that the last step's noise stays below it
_FEWEST = 1e-3  # the smallest share that a mask keeps
#: what it has learned so far
_STATE = ("weight", "kept", "_first", "_start", "_last", "_trend", "_outside", "_ratio", "_seen", "_measured")
_TRIM = 0.25  # of the non-zero entries: the most that are set to zero at the end


def in_bytes(budget: int | str, dense: int | None = None) -> int:
    """A number of bytes, as people write it.

    Args:
        budget: bytes, with a unit or without, or a share of the dense size: `"3%"`.
        dense: that size; None: not known yet, and shares count of 100 bytes.

    Raises:
        ValueError: it is none; the message says what is.

    >>> in_bytes("27kB"), in_bytes("1.5 MiB"), in_bytes(900), in_bytes("2.5%", dense=96_000)
    (27000, 1572864, 900, 2400)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b?|%)\s*", str(budget).lower())
    unit = found.group(2) if found else "?"
    unit = unit if unit in _UNITS or unit == "%" else f"{unit}b"
    size = 0.01 * (100 if dense is None else dense) if unit == "%" else float(_UNITS.get(unit, 0))
    if found is None or not float(found.group(1)) * size or (unit == "" and float(found.group(1)) < 1):
        raise ValueError(
            f"budget: expected bytes, as in 900, '27kB', '1.5 MiB' or '3%' of the dense size, found {budget!r}"
        )
    return int(float(found.group(1)) * size)


class ByteBudget(Callback):
    """Trains a network into a file of at most so many bytes: by a price on bytes, steered by the file's own size.

    The size that is wanted falls from that of the first step to the budget, geometrically, until `end` of training, and
    stays there. Up to 1,000 times a run the size is judged 4 % of the run ahead, by its trend: where it will be above what is
    wanted then, the price (`RatePenalty`'s weight) is raised by exp(0.5 · log(size / wanted)), at most 28 % at a time, where
    below, lowered alike (fewer looks move more each). Levels without a zero (`binary`, `float16`) know no price: there the
    share that the mask keeps is steered. The size is that of the price's own model, put right by what
    `psc_lightning.measure` says of the file some twenty times a run. After the last step entries just above zero are set to
    zero until the file fits, a quarter of them at most.

    Args:
        budget: bytes of the file: `27000`, `"27kB"` (1 kB = 1,000 bytes), `"1 MiB"`, `"3%"` of the dense size.
        end: share of training at which the budget is reached, 0 < end ≤ 1.
        leftovers, names, fold_batchnorm: as they will be given to `save`. `"auto"`: `log8`, and folded where every
            convolution's levels can take BatchNorm's factor.

    Attributes:
        budget: in bytes; of a share known when training starts.
        writing: what the file is steered for, known when training is over: ``save(model, path, **budget.writing)``.
        weight: the price now, in units of the loss a kilobyte; None before the first step, and where nothing has a price.
        kept: the share that steered masks keep.
        report: of the last measurement; after training, of the file that `save` will write.

    Raises:
        ValueError: a wrong value (the argument is named), or, before training: nothing that could be steered, a run of
            unknown length, another price of bytes.

    >>> ByteBudget("27kB").budget
    27000

    Source: ours. Prices that follow a size are how video coders keep a bit rate.
    """

    @hinting
    def __init__(
        self,
        budget: int | str,
        end: float = 0.55,
        leftovers: Precisions = AUTO,
        names: bool = True,
        fold_batchnorm: Folding = AUTO,
    ) -> None:
        super().__init__()
        self.given, self.budget = budget, in_bytes(budget)
        if isinstance(end, bool) or not isinstance(end, int | float) or not 0 < end <= 1:
            raise ValueError(f"end: expected a share of training 0 < end ≤ 1, found {end!r}")
        self.end = float(end)
        self.writing: dict[str, Any] = {
            "leftovers": "log8" if leftovers == AUTO else leftovers,
            "names": names,
            "fold_batchnorm": False if fold_batchnorm == AUTO else fold_batchnorm,
        }
        self._folds = fold_batchnorm == AUTO  # where it can be
        self.report: Report | None = None
        self._begin()

    def _begin(self) -> None:
        """Before a fit: nothing is known."""
        self.rate = Rate()
        self.weight: float | None = None
        self.kept: float | None = None
        self._first: float | None = None  # the price that it started with
        self._start: float | None = None  # the size that it started with
        self._last: float | None = None  # that of the last look
        self._trend = 0.0  # of its logarithm, a look
        self._outside, self._ratio = 0.0, 1.0  # bytes beside what has a price; the others' over the price's
        self._seen = -1  # the step of the last look
        self._measured = -math.inf  # that of the last measurement

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take part in a fit."""
        if stage == "fit":
            self._begin()
            Conductor.of(trainer).join_penalty(trainer, self)

    def check(self, cast: Cast) -> None:
        """Refuse what cannot be steered."""
        if not any(has_ladder(place) or _masked(place) for place in cast.everywhere()):
            found = sorted({place.tensor.slots.method for place in cast.everywhere()}) or ["nothing is compressed"]
            raise ValueError(f"ByteBudget has nothing to steer: found {', '.join(found)}. Add {LADDERS}, or a mask")
        if cast.total is None or not math.isfinite(cast.total):
            raise ValueError(
                "ByteBudget: the run has no known length to spread the way over; give max_epochs or max_steps"
            )
        if any(penalty is not self for penalty in cast.penalties):
            raise ValueError(
                "ByteBudget steers the price of bytes itself: leave out RatePenalty, and a second ByteBudget"
            )
        assert cast.module is not None
        self.budget = in_bytes(self.given, dense_bytes(cast.module))

    # ------------------------------------------------------------------------------------------------- steering

    def control(self, cast: Cast, step: int) -> None:
        """Look at the size, where it is time, and move the price."""
        assert cast.total is not None
        if step == self._seen or step % max(1, int(cast.total / _LOOKS)):
            return
        self._seen = step
        self.rate.look(cast.everywhere())
        if not self.rate.bits:
            return  # nothing has begun
        if step - self._measured >= cast.total / _MEASURES:
            self._measured = step
            self._calibrate(cast)
        self._steer(cast, step)

    def wanted(self, progress: float) -> float:
        """The size that the file shall have at a share of training: 0 … 1."""
        start = self._start or float(self.budget)
        aim = min(_AIM * self.budget, start)
        return float(start * (aim / start) ** min(1.0, progress / self.end))

    def _steer(self, cast: Cast, step: int) -> None:
        """Move price and share by how far the size will be off in a while, if it goes on as it does."""
        assert cast.total is not None
        size = self.size()
        self._start = size if self._start is None else self._start
        looks = min(_LOOKS, cast.total)
        if self._last is not None:
            self._trend += _SMOOTH * (math.log(size / self._last) - self._trend)
        self._last = size
        soon = size * math.exp(self._trend * _AHEAD * looks)
        off = math.log(soon / self.wanted(step / cast.total + _AHEAD))
        finer = (_LOOKS / looks) ** 0.5  # of fewer looks each moves more
        change = math.exp(max(-_STEP * finer, min(_STEP * finer, _GAIN * finer * off)))
        if self.weight is not None and self._first is not None:
            self.weight = max(self._first / _RANGE, min(self._first * _RANGE, self.weight * change))
        self._steer_masks(cast, size / self.wanted((step + 1) / cast.total))

    def _steer_masks(self, cast: Cast, over: float) -> None:
        """A mask's share acts at once: half of the way each time."""
        steered = [place for place in cast.everywhere() if _masked(place)]
        if steered and self.kept is None:
            given = [chain.mask.threshold for place in steered for chain in place.tensor.slots.chains() if chain.mask]
            self.kept = 1 - sum(given) / len(given)
        elif steered and self.kept is not None:
            self.kept = min(1.0, max(_FEWEST, self.kept / over**0.5))
            self._share_out(steered)

    def _share_out(self, steered: list[Place]) -> None:
        """One share for all tensors together: small ones keep more."""
        slots = [place.tensor.slots for place in steered]
        shapes = [one.layout.shape(one.stored_shape) for one in slots]
        for one, zeros in zip(slots, shares(shapes, 1 - (self.kept or 1.0), "global"), strict=True):
            set_threshold(one, zeros)

    def size(self) -> float:
        """Bytes of the file, by the price as of the last look."""
        return self._outside + self._ratio * (self.rate.bits or 0.0) / 8

    def _measure(self, cast: Cast) -> Report:
        assert cast.module is not None
        if self._folds:
            self.writing["fold_batchnorm"] = foldable(cast.module)
        self.report = measure(cast.module, **self.writing)
        return self.report

    def _inside(self, report: Report) -> int:
        """Bytes of what has a price."""
        return sum(row.stored_bytes for row in report.tensors if row.name in self.rate.prices)

    def _calibrate(self, cast: Cast) -> None:
        """Put the price's model right. A checkpoint takes BatchNorm's statistics anew, which must not steer."""
        assert cast.module is not None
        with _neutral(cast.module):
            report = self._measure(cast)
        inside = self._inside(report)
        self._outside = report.file_bytes - inside
        self._ratio = inside / max(1.0, (self.rate.bits or 0.0) / 8)

    def before_step(self, places: list[Place], scale: float) -> None:
        """Add the price's gradient."""
        found = list(self.rate.gradients(places))
        if self.weight is None and found:
            own = [gather(parameter.grad) for parameter, _ in found if parameter.grad is not None]
            loss = sum(float(gradient.abs().sum()) for gradient in own)
            price = sum(float(gradient.abs().sum()) for _, gradient in found)
            self.weight = self._first = _FIRST * BITS * loss / scale / price if loss and price else None
        if self.weight is not None:
            for parameter, gradient in found:
                add(parameter, gradient, scale * self.weight / BITS)

    # --------------------------------------------------------------------------------------------------- the end

    @torch.no_grad()
    def finish(self, cast: Cast, settle: Callable[[], None]) -> None:
        """Set the least certain entries to zero until the file fits."""
        report = self._measure(cast)
        if report.file_bytes > self.budget:
            report = self._trim(cast, report, settle)
        if report.file_bytes > self.budget:
            outside = report.file_bytes - self._inside(report)
            rank_zero_warn(
                f"ByteBudget: the file has {report.file_bytes:,} bytes, {self.budget:,} were allowed. Train longer, raise "
                f"the budget, or make smaller what is not priced: {outside:,} bytes are names, biases, statistics and "
                "tensors outside the slots (leftovers='log8', names=False, fold_batchnorm=True of save and of ByteBudget)"
            )

    def _trim(self, cast: Cast, report: Report, settle: Callable[[], None]) -> Report:
        """Bisect how many entries go, those nearest to zero's edge first: the fewest that let the file fit, if any do."""
        places = [place for place in cast.everywhere() if has_ladder(place) and place.tensor.slots.tying is None]
        before = {place.name: place.tensor.dense(place.parameter).clone() for place in places}
        above = {place.name: _above_zero(place, before[place.name]) for place in places}
        if not places:
            return report
        order = torch.cat([size[size.isfinite()] for size in above.values()]).sort().values
        low, high = 0, int(_TRIM * len(order))

        def cut(number: int) -> Report:
            edge = float(order[number - 1]) if number else -math.inf
            for place in places:
                latent = torch.where(above[place.name] <= edge, 0.0, before[place.name])
                place.tensor.follow(place.parameter, like(latent, place.parameter))
            settle()
            return self._measure(cast)

        if cut(high).file_bytes > self.budget:
            return cut(0)  # it is of no use: the file stays as it was trained
        while high - low > max(1, len(order) // 500):
            middle = (low + high) // 2
            low, high = (low, middle) if cut(middle).file_bytes <= self.budget else (middle, high)
        return cut(high)

    # ---------------------------------------------------------------------------------------------- checkpoints

    def penalty_state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {name: getattr(self, name) for name in _STATE} | self.rate.state_dict()

    def load_penalty_state(self, cast: Cast, state: dict[str, Any]) -> None:
        """Put it back."""
        for name in _STATE:
            setattr(self, name, state[name])
        self.rate.load_state_dict(cast.everywhere(), state)
        if self.kept is not None:
            self._share_out([place for place in cast.everywhere() if _masked(place)])


@contextmanager
def _neutral(model: nn.Module) -> Iterator[None]:
    """Within it BatchNorm's statistics are those of a fresh one."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase)]
    statistics = [(norm, norm.running_mean, norm.running_var) for norm in norms]
    try:
        for norm, mean, variance in statistics:
            norm.running_mean = None if mean is None else torch.zeros_like(mean)
            norm.running_var = None if variance is None else torch.ones_like(variance)
        yield
    finally:
        for norm, mean, variance in statistics:
            norm.running_mean, norm.running_var = mean, variance


def _masked(place: Place) -> bool:
    """Whether the mask's share is what can be steered: its levels have no zero of their own."""
    return not has_ladder(place) and "mask" in place.tensor.slots.specs


def _above_zero(place: Place, latent: Tensor) -> Tensor:
    """How far each entry is above the edge of zero, in levels; infinite where it is zero."""
    slots = place.tensor.slots
    for core in rungs_of(slots, latent):
        size = core.position.abs() - 0.5
        dead = (size <= 0) if core.keep is None else (size <= 0) | ~core.keep
        return slots.layout.weight(torch.where(dead, math.inf, size), slots.stored_shape)
    return torch.full_like(latent, math.inf)
