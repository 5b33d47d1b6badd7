"""Which weights exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from psc_lightning.callbacks.slot import SlotCallback
from psc_lightning.masks import MASKS
from psc_lightning.numerics.shares import SCOPES, shares
from psc_lightning.options import one_of
from psc_lightning.schedule import Schedule
from psc_lightning.slots.spec import Spec
from psc_lightning.slots.targets import Target
from psc_lightning.words import hinting

__all__ = ["MaskLearning"]


class MaskLearning(SlotCallback):
    """Sets a share of the weights, `threshold` (0.9: nine of ten), to zero while the model is trained: the mask slot.

    It is no magnitude below which weights vanish. Of each targeted tensor's N units exactly ``floor(threshold · N + 0.5)``
    are zero once the schedule has ended, fewer during its ramp; at least one survives.

    Args:
        method: `magnitude` (smallest |w|), `movement` (scores learned from the loss), `saliency` (|g·w| or g² summed
            over the first steps).
        threshold: share of units set to zero, 0 ≤ threshold < 1.
        granularity: what is kept or dropped as one: `element`, `row` (neighbours in an output row), `column`
            (neighbouring outputs), `channel` (an output row).
        scope: `layer`: each tensor has the share. `global`: all tensors of this callback together have it, and small ones
            keep more of their weights (see `psc_lightning.numerics.shares`). `auto`: `global` above 0.5, as presets with
            `movement` or `saliency` have it.
        group: the share holds for the `tensor`, for each `channel`, or for each n units in memory order.
        block: units of `row` and `column` have this many entries; None: 4, for `row` the kernel's width.
        score_lr: `movement`: learning rate of the scores. None: 1e-2.
        calibration_steps: `saliency`: optimizer steps over which labels are summed; the mask begins after them.
            None: 50, at most a third of the run.
        label: `saliency`: `gradient_weight` (|g·w|) or `fisher` (g²). None: gradient_weight.
        refresh: choose anew every n optimizer steps.
        targets: globs over tensor names, module names, `re:` expressions or layer types; None: every weight.
        ignore: the same, for what to leave out.
        min_size: fewest entries of a tensor.
        schedule: a `Schedule`, its kind, or a mapping; the ramp scales the share. None: linear up to 70 % of training. It
            starts from the units that are zero when it begins, as in a weight that was pruned before; they stay zero.

        refresh_batchnorm: training batches from which BatchNorm's statistics are taken anew, before each validation and at
            the end (the last ones' inputs are kept, up to 4 MB of each); 0: none. None: 8 at the end, before a validation
            as many of them as take 2 % of an epoch's time.

    Raises:
        ValueError: a wrong value (the argument is named), or, before training starts, a pattern that matches nothing or
            a slot that is taken.

    >>> MaskLearning("movement", threshold=0.9, targets="encoder.*").state_key
    "MaskLearning{'targets': ['encoder.*'], 'method': 'movement'}"

    Source: see the methods in `psc_lightning.masks`.
    """

    slot = "mask"
    methods = MASKS
    rate = ("score_lr", 1e-2)

    @hinting
    def __init__(
        self,
        method: str = "magnitude",
        threshold: float = 0.5,
        granularity: str = "element",
        group: int | str = "tensor",
        block: int | None = None,
        score_lr: float | None = None,
        calibration_steps: int | None = None,
        label: str | None = None,
        refresh: int = 1,
        targets: str | list[str] | None = None,
        ignore: str | list[str] | None = None,
        min_size: int = 64,
        schedule: Schedule | str | dict[str, Any] | None = None,
        refresh_batchnorm: int | None = None,
        scope: str = "layer",
    ) -> None:
        for name, value in {"threshold": threshold, "granularity": granularity, "group": group}.items():
            if value is None:
                raise ValueError(f"{name}: expected a value, found None")
        given = {"threshold": threshold, "granularity": granularity, "group": group, "block": block, "label": label}
        super().__init__(
            method,
            given,
            targets,
            ignore,
            min_size,
            schedule,
            score_lr,
            refresh,
            calibration_steps=calibration_steps,
            refresh_batchnorm=refresh_batchnorm,
        )
        self.threshold: float = self.options["threshold"]
        self.scope = one_of("scope", scope, SCOPES)
        if group == "channel" and granularity in ("column", "channel"):
            raise ValueError(
                f"group: 'channel' leaves nothing to choose from with granularity={granularity!r}, whose units span "
                "channels or are channels; use group='tensor'"
            )
        if block is not None and granularity not in ("row", "column"):
            raise ValueError(f"block: granularity={granularity!r} does not read it; it is of row and column")

    def specs(self, targets: Sequence[Target]) -> list[Spec]:
        """Each tensor has a share of zeros of its own, where the scope is global."""
        each = shares([target.matrix_shape for target in targets], self.threshold, self.scope)
        given = zip(super().specs(targets), each, strict=True)
        return [replace(spec, options={**spec.options, "threshold": share}) for spec, share in given]
