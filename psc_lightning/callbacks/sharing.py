"""Which weights are one weight."""

from __future__ import annotations

from typing import Any

from psc_lightning.callbacks.slot import SlotCallback
from psc_lightning.schedule import Schedule
from psc_lightning.tying import TYINGS
from psc_lightning.words import hinting

__all__ = ["WeightSharing"]


class WeightSharing(SlotCallback):
    """Ties many positions of a weight to few numbers while the model is trained: the tying slot.

    When it begins, the weight is overwritten by its tied form; from then on ties hold in the effective weight at every
    step, by construction. A tensor to which the method does not apply is left out and the plan says why; if it was named
    exactly, or nothing is left, that is an error.

    Args:
        method: `cross_channel` (groups of input channels share a bank), `row`, `column` (neighbours share a number),
            `separable` (depthwise and pointwise), `low_rank` (two thin matrices).
        groups: `cross_channel`: G ≥ 2, a divisor of the input channels. None: 2.
        labels: `cross_channel`: which member of each position stays: `saliency` (largest Σ|g·w| over the first steps)
            or `magnitude`. None: saliency.
        block: `row`, `column`: n ≥ 1 neighbours. None: 4, for `row` the kernel's width.
        rank: `separable`, `low_rank`: R ≥ 1, or a share of the full rank in (0, 1). None: 1 and 0.25.
        calibration_steps: `cross_channel` by saliency: optimizer steps over which labels are summed. None: 50, at most
            a third of the run.
        factor_lr: `separable`, `low_rank`: learning rate of the factors. None: 1e-3.
        targets: globs over tensor names, module names, `re:` expressions or layer types; None: every weight.
        ignore: the same, for what to leave out.
        min_size: fewest entries of a tensor.
        schedule: a tying has no soft phase: it begins at the schedule's `begin`.
        refresh_batchnorm: training batches from which BatchNorm's statistics are taken anew, before each validation and at
            the end (the last ones' inputs are kept, up to 4 MB of each); 0: none. None: 8 at the end, before a validation
            as many of them as take 2 % of an epoch's time.

    Raises:
        ValueError: a wrong value (the argument is named), or, before training starts, a pattern that matches nothing, a
            method that applies nowhere, or a slot that is taken.

    >>> WeightSharing("cross_channel", groups=4).options
    {'groups': 4}

    Source: see the methods in `psc_lightning.tying`.
    """

    slot = "tying"
    methods = TYINGS
    rate = ("factor_lr", 1e-3)

    @hinting
    def __init__(
        self,
        method: str,
        groups: int | None = None,
        labels: str | None = None,
        block: int | None = None,
        rank: int | float | None = None,
        calibration_steps: int | None = None,
        factor_lr: float | None = None,
        targets: str | list[str] | None = None,
        ignore: str | list[str] | None = None,
        min_size: int = 64,
        schedule: Schedule | str | dict[str, Any] | None = None,
        refresh_batchnorm: int | None = None,
    ) -> None:
        given = {"groups": groups, "labels": labels, "block": block, "rank": rank}
        super().__init__(
            method,
            given,
            targets,
            ignore,
            min_size,
            schedule,
            factor_lr,
            calibration_steps=calibration_steps,
            refresh_batchnorm=refresh_batchnorm,
        )
