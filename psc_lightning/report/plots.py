"""Pictures of one run: where the bytes are, and how training went."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning import Callback, LightningModule, Trainer

if TYPE_CHECKING:
    from psc_lightning.report.numbers import Report

__all__ = ["Curve", "draw"]


class Curve(Callback):
    """Remember the training loss and the validation accuracy; goes through checkpoints, so that a resumed run has it all.

    Args:
        every: optimizer steps between two points of the loss, 1 or more.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self.loss: list[tuple[int, float]] = []
        self.accuracy: list[tuple[int, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the points so far."""
        return {"loss": self.loss, "accuracy": self.accuracy}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from these points."""
        self.loss, self.accuracy = list(state_dict["loss"]), list(state_dict["accuracy"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss."""
        if trainer.global_step % self.every == 0 and isinstance(outputs, dict) and "loss" in outputs:
            self.loss.append((trainer.global_step, float(outputs["loss"])))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the accuracy, where the model logs one."""
        if "val_accuracy" in trainer.callback_metrics and not trainer.sanity_checking:
            self.accuracy.append((trainer.global_step, float(trainer.callback_metrics["val_accuracy"])))


def draw(report: Report, curve: Curve, folder: Path) -> None:
    """Write `bytes.png` (dense and stored bytes of each tensor) and `training.png`."""
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
    if curve.accuracy:
        right = axes.twinx()
        right.plot(*zip(*curve.accuracy, strict=True), marker=".")
        right.set_ylabel("validation accuracy")
    figure.savefig(folder / "training.png")
