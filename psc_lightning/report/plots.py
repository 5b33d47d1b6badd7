"""Pictures of one run: where the bytes are, and how training went."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning import Callback, LightningModule, Trainer

from psc_lightning.report.notes import main_metric

if TYPE_CHECKING:
    from psc_lightning.report.numbers import Report

__all__ = ["Curve", "draw"]


class Curve(Callback):
    """Remember the training loss and what validation logs; goes through checkpoints, so that a resumed run has it all.

    Args:
        every: optimizer steps between two points of the loss, 1 or more.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self.loss: list[tuple[int, float]] = []
        self.validation: dict[str, list[tuple[int, float]]] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the points so far."""
        return {"loss": self.loss, "validation": self.validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from these points."""
        self.loss = list(state_dict["loss"])
        self.validation = {name: list(points) for name, points in state_dict["validation"].items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss."""
        if trainer.global_step % self.every == 0 and isinstance(outputs, dict) and "loss" in outputs:
            self.loss.append((trainer.global_step, float(outputs["loss"])))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the metrics that the model logs as `val…`."""
        for name, value in {} if trainer.sanity_checking else trainer.callback_metrics.items():
            if name.startswith("val") and value.numel() == 1:
                self.validation.setdefault(name, []).append((trainer.global_step, float(value)))

    def chosen(self, metric: str | None) -> str | None:
        """The validation metric to show: that of this name, after `val_`, `val/` and the like, or else the main one.

        >>> curve = Curve()
        >>> curve.validation = {"val_loss": [], "val/mae": [(10, 0.5)]}
        >>> curve.chosen("mae"), curve.chosen(None), curve.chosen("loss")
        ('val/mae', 'val/mae', 'val_loss')
        """
        names = {re.sub("^val(id(ation)?)?[_/]?", "", name) or name: name for name in self.validation}
        found = main_metric(names, metric)
        return None if found is None else names[found]


def draw(report: Report, curve: Curve, folder: Path, metric: str | None = None) -> None:
    """Write `bytes.png` (dense and stored bytes of each tensor) and `training.png` (loss, and a metric of validation)."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    folder.mkdir(exist_ok=True)
    rows = [tensor for tensor in reversed(report.tensors) if tensor.dense_bytes >= report.dense_bytes / 200]
    figure = Figure(figsize=(8, 1.5 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    axes.barh(places, [row.dense_bytes for row in rows], height=0.8, color="0.85", label="dense")
    axes.barh(places, [row.stored_bytes for row in rows], height=0.5, label="stored")
    axes.set_yticks(places, [row.name for row in rows])
    axes.set_xscale("log")
    axes.set_xlabel("bytes")
    axes.set_title(
        f"{report.file_bytes:,} of {report.dense_bytes:,} bytes: {report.compression_ratio:.1f} times smaller"
    )
    axes.legend()
    figure.savefig(folder / "bytes.png")

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*curve.loss, strict=True) if curve.loss else ([], []), color="0.5", linewidth=1)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss")
    if name := curve.chosen(metric):
        right = axes.twinx()
        right.plot(*zip(*curve.validation[name], strict=True), marker=".")
        right.set_ylabel(name)
    figure.savefig(folder / "training.png")
