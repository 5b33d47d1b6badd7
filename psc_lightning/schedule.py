"""Progress of training → strength of a slot.

A schedule is arithmetic on two numbers, the optimizer step and the total number of steps; who counts them is the
callbacks' business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

__all__ = ["KINDS", "Schedule"]

# Each maps t, the share of the way from begin to end (0 ≤ t < 1), to the strength there.
KINDS: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: t,
    "cubic": lambda t: 1.0 - (1.0 - t) ** 3,
    "cosine": lambda t: (1.0 - math.cos(math.pi * t)) / 2.0,
}


@dataclass(frozen=True)
class Schedule:
    """Strength 0 before `begin`, 1 from `end` on, and a ramp of some kind between.

    With t = (step − begin) / (end − begin):
    constant 1 · linear t · cubic 1 − (1 − t)³ · cosine (1 − cos πt) / 2.

    A share counts as `floor(share · total_steps + 0.5)` steps. In YAML `1` is an integer, the first step; `1.0` is the
    end of training.

    Args:
        kind: ``constant`` (1 from `begin` on, `end` is ignored), ``linear``, ``cubic`` or ``cosine``.
        begin: the first step at which the slot is in force: a float 0.0 … 1.0 is a share of training, an int ≥ 0 counts
            optimizer steps.
        end: the first step at full strength, in the same two units; at or before `begin` means at once.

    Raises:
        ValueError: an argument is not among the values above, or `begin` lies behind `end`.

    >>> schedule = Schedule("cubic", begin=0.1, end=0.5)
    >>> [schedule.strength(step, total_steps=100) for step in (9, 10, 30, 50, 100)]
    [0.0, 0.0, 0.875, 1.0, 1.0]
    >>> Schedule("linear", begin=100, end=300).strength(150, total_steps=math.inf)
    0.25

    Source: the cubic ramp is Zhu & Gupta, "To prune, or not to prune", 2017, equation 1, for the share pruned.
    """

    kind: str = "linear"
    begin: int | float = 0.0
    end: int | float = 0.7

    def __post_init__(self) -> None:
        if self.kind not in tuple(KINDS):  # a tuple, so that an unhashable kind gives the same error
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        for name, value in (("begin", self.begin), ("end", self.end)):
            share = isinstance(value, float) and 0.0 <= value <= 1.0
            steps = isinstance(value, int) and not isinstance(value, bool) and value >= 0
            if not (share or steps):
                raise ValueError(
                    f"{name} must be a float 0.0 … 1.0 (a share of training) or an int ≥ 0 (steps), not {value!r}"
                )
        comparable = self.kind != "constant" and isinstance(self.begin, float) == isinstance(self.end, float)
        if comparable and self.begin > self.end:
            raise ValueError(f"begin must not be greater than end, but {self.begin!r} > {self.end!r}")

    @classmethod
    def of(cls, value: Schedule | str | Mapping[str, int | float | str] | None, default: Schedule) -> Schedule:
        """The schedule that a configuration value means.

        Args:
            value: a schedule, a kind, a mapping with any of `kind`, `begin`, `end`, or None.
            default: gives what `value` leaves open.

        Raises:
            ValueError: another type, an unknown key, or a wrong value.

        >>> Schedule.of("cosine", default=Schedule(begin=0.2, end=0.6))
        Schedule(kind='cosine', begin=0.2, end=0.6)
        """
        if value is None:
            return default
        if isinstance(value, cls):
            return value
        names = [field.name for field in fields(cls)]
        changes = {"kind": value} if isinstance(value, str) else value
        if not isinstance(changes, Mapping) or not set(changes) <= set(names):
            raise ValueError(
                f"schedule must be a Schedule, one of {', '.join(KINDS)}, or a mapping of {', '.join(names)},"
                f" not {value!r}"
            )
        try:
            return replace(default, **changes)  # type: ignore[arg-type]  # __post_init__ checks the values
        except ValueError as error:
            raise ValueError(f"schedule: {error}") from None

    @property
    def counts_steps(self) -> bool:
        """Whether it needs no length of the run: it begins at once or after so many steps, and ends after so many.

        >>> Schedule(begin=0.0, end=500).counts_steps, Schedule(begin=0, end=0.7).counts_steps
        (True, False)
        """
        positions = (self.begin,) if self.kind == "constant" else (self.begin, self.end)
        return all(isinstance(position, int) or position == 0.0 for position in positions)

    def begins(self, total_steps: int | float, since: int = 0) -> int:
        """The first step at which the slot is in force, though its strength may still be 0 there.

        Args:
            total_steps: optimizer steps of the whole run (≥ 0; infinite for an endless one).
            since: the step from which shares count (≥ 0): they are shares of what is left from there.

        Raises:
            ValueError: `begin` is a share of an endless run.

        >>> Schedule(begin=0.1).begins(25), Schedule(begin=7).begins(25), Schedule(begin=0.1).begins(25, since=15)
        (3, 7, 16)
        """
        return _steps(self.begin, total_steps, since)

    def ends(self, total_steps: int | float, since: int = 0) -> int:
        """The first step at full strength; arguments and errors as of `begins`.

        >>> Schedule(end=0.7).ends(100), Schedule("constant", begin=0.1).ends(100), Schedule(begin=3, end=3).ends(100)
        (70, 10, 3)
        """
        begin = self.begins(total_steps, since)
        return begin if self.kind == "constant" else max(begin, _steps(self.end, total_steps, since))

    def strength(self, step: int, total_steps: int | float, since: int = 0) -> float:
        """The strength at `step`, 0.0 … 1.0.

        Args:
            step: optimizer steps done so far (≥ 0).
            total_steps: optimizer steps of the whole run (≥ 0; infinite for an endless one).
            since: the step from which shares count (≥ 0): they are shares of what is left from there.

        Raises:
            ValueError: `begin` or `end` is a share of an endless run.

        >>> Schedule("linear", begin=0.2, end=0.6).strength(30, total_steps=100)
        0.25
        >>> Schedule("linear", begin=0.2, end=0.6).strength(65, total_steps=100, since=50)
        0.25
        """
        begin, end = self.begins(total_steps, since), self.ends(total_steps, since)
        if step < begin:
            return 0.0
        return 1.0 if step >= end else KINDS[self.kind]((step - begin) / (end - begin))


def _steps(position: int | float, total_steps: int | float, since: int) -> int:
    if isinstance(position, int):
        return position
    if position == 0.0:  # the start of an endless run is known, too
        return since
    if not 0 <= total_steps < math.inf:
        raise ValueError(
            f"{position!r} is a share of training, but how many steps this run has is not known: give begin/end in steps"
        )
    return since + math.floor(position * max(total_steps - since, 0) + 0.5)
