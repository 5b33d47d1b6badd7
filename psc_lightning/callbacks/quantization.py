"""Which values weights may take."""

from __future__ import annotations

from typing import Any

from psc_lightning.callbacks.slot import SlotCallback
from psc_lightning.levels import LEVELS
from psc_lightning.schedule import Schedule
from psc_lightning.words import hinting

__all__ = ["StraightThroughQuantization"]


class StraightThroughQuantization(SlotCallback):
    """Rounds weights to few values while the model is trained, the gradient passing straight through: the levels slot.

    Args:
        levels: `float16`, `bfloat16`, `uniform` (a grid), `binary` (two values), `ternary` (three), `log` (powers of
            two), `codebook` (trained centroids), `ttq` (three values, two of them trained).
        bits: `uniform`: 1 … 8, `log`: 2 … 8. None: 8.
        k: `codebook`: 2 … 256 centroids. None: 16.
        group: entries that share a scale or a codebook: `tensor`, `channel`, or n entries in memory order. None: channel,
            for `codebook` tensor.
        learned_step: `uniform`: train the step (LSQ) instead of taking it from the largest weight.
        form: `binary`: `sign` (±s) or `01` (0 or 1 with a scale and an offset). None: sign.
        root: `log`: 1, 2, 4 or 8; the base is 2^(1/root). None: 1.
        step_lr: `codebook`, `ttq`, and `uniform` with a learned step: learning rate of centroids, scales and steps.
            None: 1e-4.
        refresh: recompute scales and assignments every n optimizer steps.
        targets: globs over tensor names, module names, `re:` expressions or layer types; None: every weight.
        ignore: the same, for what to leave out.
        min_size: fewest entries of a tensor.
        schedule: a `Schedule`, its kind, or a mapping; during the ramp weights are blended with their levels. None:
            linear up to 70 % of training.
        scales: what scales and centroids are stored as, and rounded to while training: `float32`, `float16` (times a power
            of two a tensor), `log8` (8 bits on a grid of 2^(1/8), within 4.5 %). None: float16.
        refresh_batchnorm: training batches from which BatchNorm's statistics are taken anew, before each validation and at
            the end (the last ones' inputs are kept, up to 4 MB of each); 0: none. None: 8 at the end, before a validation
            as many of them as take 2 % of an epoch's time.

    Raises:
        ValueError: a wrong value (the argument is named), or, before training starts, a pattern that matches nothing or
            a slot that is taken.

    >>> StraightThroughQuantization("uniform", bits=4, group=64).options
    {'bits': 4, 'group': 64}

    Source: see the methods in `psc_lightning.levels`.
    """

    slot = "levels"
    methods = LEVELS
    argument = "levels"
    rate = ("step_lr", 1e-4)

    @hinting
    def __init__(
        self,
        levels: str = "uniform",
        bits: int | None = None,
        k: int | None = None,
        group: int | str | None = None,
        learned_step: bool | None = None,
        form: str | None = None,
        root: int | None = None,
        step_lr: float | None = None,
        refresh: int = 1,
        targets: str | list[str] | None = None,
        ignore: str | list[str] | None = None,
        min_size: int = 64,
        schedule: Schedule | str | dict[str, Any] | None = None,
        scales: str | None = None,
        refresh_batchnorm: int | None = None,
    ) -> None:
        given = {"bits": bits, "k": k, "group": group, "learned_step": learned_step, "form": form, "root": root}
        given["scales"] = scales
        super().__init__(
            levels, given, targets, ignore, min_size, schedule, step_lr, refresh, refresh_batchnorm=refresh_batchnorm
        )
