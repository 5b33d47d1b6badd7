"""Which weights exist."""

from __future__ import annotations

from typing import Any

from psc_lightning.callbacks.arguments import grouping, one_of, positive, whole
from psc_lightning.callbacks.slot import SlotCallback
from psc_lightning.masks import GRANULARITIES, MASKS, SALIENCY_LABELS
from psc_lightning.schedule import Schedule

__all__ = ["MaskLearning"]


class MaskLearning(SlotCallback):
    """Sets a share of the weights to zero while the model is trained: the mask slot.

    Of each targeted tensor's N units exactly ``floor(threshold · N + 0.5)`` are zero once the schedule has ended, fewer
    during its ramp; at least one survives.

    Args:
        method: `magnitude` (smallest |w|), `movement` (scores learned from the loss), `saliency` (|g·w| or g² summed
            over the first steps).
        threshold: share of units set to zero, 0 ≤ threshold < 1.
        granularity: what is kept or dropped as one: `element`, `row` (neighbours in an output row), `column`
            (neighbouring outputs), `channel` (an output row).
        group: the share holds for the `tensor`, for each `channel`, or for each n units in memory order.
        block: units of `row` and `column` have this many entries; None: 4, for `row` the kernel's width.
        score_lr: `movement`: learning rate of the scores.
        calibration_steps: `saliency`: optimizer steps over which labels are summed; the mask begins after them.
        label: `saliency`: `gradient_weight` (|g·w|) or `fisher` (g²).
        refresh: choose anew every n optimizer steps.
        targets: globs over tensor names, module names, `re:` expressions or layer types; None: every weight.
        ignore: the same, for what to leave out.
        min_size: fewest entries of a tensor.
        schedule: a `Schedule`, its kind, or a mapping; the ramp scales the share. None: linear up to 70 % of training.

    Raises:
        ValueError: a wrong value (the argument is named), or, before training starts, a pattern that matches nothing or
            a slot that is taken.

    >>> MaskLearning("movement", threshold=0.9, targets="encoder.*").state_key
    "MaskLearning{'targets': ['encoder.*'], 'method': 'movement'}"

    Source: see the methods in `psc_lightning.masks`.
    """

    slot = "mask"

    def __init__(
        self,
        method: str = "magnitude",
        threshold: float = 0.5,
        granularity: str = "element",
        group: int | str = "tensor",
        block: int | None = None,
        score_lr: float = 1e-2,
        calibration_steps: int = 50,
        label: str = "gradient_weight",
        refresh: int = 1,
        targets: str | list[str] | None = None,
        ignore: str | list[str] | None = None,
        min_size: int = 64,
        schedule: Schedule | str | dict[str, Any] | None = None,
    ) -> None:
        one_of("method", method, MASKS)
        one_of("granularity", granularity, GRANULARITIES)
        one_of("label", label, SALIENCY_LABELS)
        if not positive("threshold", threshold) < 1:
            raise ValueError(f"threshold: expected a share 0 ≤ threshold < 1, found {threshold!r}")
        group = grouping(group)
        if group == "channel" and granularity in ("column", "channel"):
            raise ValueError(
                f"group: 'channel' leaves nothing to choose from with granularity={granularity!r}, whose units span "
                "channels or are whole ones; use group='tensor'"
            )
        options: dict[str, Any] = {"threshold": float(threshold), "granularity": granularity, "group": group}
        options["block"] = None if block is None else whole("block", block, 1)
        labels = MASKS[method].labels
        if method == "saliency":
            options["label"] = label
        super().__init__(
            method,
            options,
            targets,
            ignore,
            min_size,
            schedule,
            lr=positive("score_lr", score_lr),
            refresh=refresh,
            calibration_steps=whole("calibration_steps", calibration_steps, 1) if labels == "before" else 0,
        )
        self.threshold = float(threshold)
