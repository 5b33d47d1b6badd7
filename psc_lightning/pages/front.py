"""Many runs to points: repetitions averaged, the Pareto front, the smallest that is good enough."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from psc_lightning.pages.jobs import Job
from psc_lightning.report.notes import is_share

__all__ = ["Point", "Scale", "falls", "front_of", "points_of", "smallest"]

_FALLING = ("loss", "error", "perplex", "diverg", "distance")  # anywhere in a metric's name
_FALLING_WORDS = (
    "mae",
    "mse",
    "rmse",
    "msle",
    "mape",
    "smape",
    "nll",
    "ppl",
    "err",
    "cer",
    "wer",
    "fid",
    "ece",
    "brier",
    "kl",
)


@dataclass(frozen=True)
class Point:
    """A setting: one run, or several that differ by their seed.

    Attributes:
        jobs: which of the jobs, one a seed.
        size: mean bytes of their files.
        value: mean metric of their files.
        size_deviation, value_deviation: standard deviations of these over the seeds (n - 1); 0 of a single one.
        dense: mean metric of the networks that they started from; None where it is not known.
    """

    jobs: tuple[int, ...]
    size: float
    value: float
    size_deviation: float = 0.0
    value_deviation: float = 0.0
    dense: float | None = None

    @property
    def change(self) -> float | None:
        """How much higher the metric is than that of the dense start."""
        return None if self.dense is None else self.value - self.dense


def falls(metric: str | None) -> bool:
    """Whether less of a metric is better, by its name.

    >>> [name for name in ("accuracy", "loss", "val/mae", "top1_err", "maestro", "f1", "Perplexity") if falls(name)]
    ['loss', 'val/mae', 'top1_err', 'Perplexity']
    """
    name = (metric or "").lower()
    words = "".join(letter if letter.isalnum() else " " for letter in name).split()
    return any(part in name for part in _FALLING) or any(word in _FALLING_WORDS for word in words)


def points_of(jobs: Sequence[Job], metric: str | None) -> list[Point]:
    """Average the jobs that differ by their seed only, in the order of the first; of the same seed the last one counts.

    A job without a file's size or without the metric is no point.
    """
    groups: dict[tuple[object, ...], dict[object, int]] = {}
    for index, job in enumerate(jobs):
        if job.number("file_bytes") and job.metric(metric) is not None:
            groups.setdefault(job.setting, {})[job.seed] = index
    return [_point(jobs, [*group.values()], metric) for group in groups.values()]


def _point(jobs: Sequence[Job], members: Sequence[int], metric: str | None) -> Point:
    sizes = [job.number("file_bytes") or 0.0 for job in (jobs[index] for index in members)]
    values = [jobs[index].metric(metric) or 0.0 for index in members]
    dense = [found for index in members if (found := jobs[index].metric(metric, "dense")) is not None]
    return Point(
        tuple(members),
        fmean(sizes),
        fmean(values),
        stdev(sizes) if len(sizes) > 1 else 0.0,
        stdev(values) if len(values) > 1 else 0.0,
        fmean(dense) if len(dense) == len(members) else None,
    )


def front_of(points: Sequence[Point], falling: bool) -> list[int]:
    """Which points no other one beats: smaller and as good, or better and as small. From the smallest to the best.

    >>> a, b, c, d = Point((0,), 100, 0.9), Point((1,), 200, 0.95), Point((2,), 300, 0.94), Point((3,), 200, 0.7)
    >>> front_of([a, b, c, d], falling=False), front_of([a, b, c, d], falling=True)
    ([0, 1], [0, 3])
    """
    sign = 1.0 if falling else -1.0
    order = sorted(range(len(points)), key=lambda index: (points[index].size, sign * points[index].value))
    front: list[int] = []
    best = math.inf
    for index in order:
        cost = sign * points[index].value
        twin = front and (points[front[-1]].size, points[front[-1]].value) == (points[index].size, points[index].value)
        if cost < best or twin:
            front.append(index)
            best = min(best, cost)
    return front


@dataclass(frozen=True)
class Scale:
    """How far a metric is from dense, in the unit that people say it in: points of a share, else % of the dense value.

    Args:
        metric: its name.
        unit: what a point is worth; None: a hundredth of the dense value.
        falling: whether less is better.
    """

    metric: str
    unit: float | None
    falling: bool

    @classmethod
    def of(cls, metric: str, values: Iterable[float], falling: bool) -> Scale:
        """The scale of a metric with these values; a share above 1.5 is taken for one in percent."""
        percent = max(values, default=0.0) > 1.5
        return cls(metric, (1.0 if percent else 0.01) if is_share(metric) else None, falling)

    @property
    def word(self) -> str:
        """What a unit is called."""
        return "points" if self.unit else "%"

    @property
    def limits(self) -> tuple[float, ...]:
        """How far from dense is asked for: losses move more than accuracies do."""
        return (0.5, 1.0, 2.0) if self.unit else (1.0, 5.0, 10.0)

    def near(self, dense: float, values: Sequence[float]) -> tuple[float, float] | None:
        """The part of a metric's axis that is near dense, where it is worth a picture of its own.

        Args:
            dense: metric of the dense network.
            values: of all settings.

        Returns:
            Lowest and highest value; None where all settings are near, or less than two.

        >>> Scale("accuracy", 0.01, False).near(0.9, [0.91, 0.89, 0.5])
        (0.87, 0.915)
        """
        unit = self.unit or abs(dense) / 100
        reach = (3.0 if self.unit else 20.0) * unit
        worst = dense + reach if self.falling else dense - reach
        inside = [value for value in values if (value <= worst if self.falling else value >= worst)]
        if not unit or len(inside) < 2 or len(inside) == len(values):
            return None
        best = min(*inside, dense) - reach / 6 if self.falling else max(*inside, dense) + reach / 6
        low, high = sorted((worst, best))
        return round(low, 12), round(high, 12)

    def change(self, point: Point) -> float | None:
        """How many units better than dense a point is; None where that cannot be said.

        >>> Scale("accuracy", 0.01, False).change(Point((0,), 9, 0.97, dense=0.99))
        -2.0
        >>> Scale("loss", None, True).change(Point((0,), 9, 0.3, dense=0.2))
        -50.0
        """
        if point.dense is None or point.change is None:
            return None
        unit = self.unit or abs(point.dense) / 100
        return round((-point.change if self.falling else point.change) / unit, 6) if unit else None


def smallest(points: Sequence[Point], scale: Scale) -> list[tuple[float, int | None]]:
    """The smallest point within each limit of its dense start: limit and index, None where none is."""
    found: list[tuple[float, int | None]] = []
    for limit in scale.limits:
        near = [i for i, one in enumerate(points) if (change := scale.change(one)) is not None and change >= -limit]
        found.append((limit, min(near, key=lambda index: points[index].size, default=None)))
    return found
