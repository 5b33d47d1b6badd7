"""The LightningModule around a plain network. It knows nothing of compression: the callbacks do that."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from torchmetrics.regression import MeanAbsoluteError

from psc_lightning.app.errors import UsageError

__all__ = ["Classifier"]

Batch = tuple[Tensor, Tensor]
_SHOWN = 40  # classes, whose confusions are counted in tests


class Classifier(LightningModule):
    """Train a network to name the class of an input, with cross-entropy, or to give numbers, with their squared error.

    Args:
        net: gives (batch, classes) logits; for a regression outputs, as many as the targets.
        optimizer: makes an optimizer from the parameters.
        classes: how many there are.
        decay: `cosine` lets the learning rate fall to 0 along a cosine, step by step; `constant` keeps it.
        channels_last: give images to the network in channels-last memory layout (faster convolutions in bfloat16).
        task: `classification`, which logs accuracy, or `regression`, which logs the mean absolute error, `mae`.

    Raises:
        ValueError: `decay` or `task` is something else.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        classes: int = 10,
        decay: str = "cosine",
        channels_last: bool = False,
        task: str = "classification",
    ) -> None:
        super().__init__()
        if decay not in ("cosine", "constant"):
            raise ValueError(f"decay must be cosine or constant, not {decay!r}")
        if task not in ("classification", "regression"):
            raise ValueError(f"task must be classification or regression, not {task!r}")
        self.net = net
        self.optimizer = optimizer
        self.decay = decay
        self.channels_last = channels_last
        self.regression = task == "regression"
        self.metric = "mae" if self.regression else "accuracy"
        made = [MeanAbsoluteError() if self.regression else MulticlassAccuracy(classes, average="micro") for _ in "12"]
        self.val_metric, self.test_metric = made
        self.confusion = MulticlassConfusionMatrix(classes) if not self.regression and classes <= _SHOWN else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits, or numbers."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        outputs: Tensor = self.net(x)
        return outputs

    def _outputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, targets, and the loss of a batch.

        Raises:
            UsageError: the targets are of the other task.
        """
        x, y = batch
        outputs = self(x)
        if not self.regression:
            if y.is_floating_point():
                raise UsageError(
                    f"model.task=classification: expected whole numbers, the classes, as targets, found {y.dtype}: "
                    "model.task=regression is for numbers"
                )
            return outputs, y, F.cross_entropy(outputs, y)
        if y.numel() != outputs.numel():
            raise UsageError(
                f"model.task=regression: expected as many targets as outputs, found {tuple(y.shape)} and "
                f"{tuple(outputs.shape)}: model.task=classification is for classes"
            )
        y = y.to(outputs.dtype).reshape(
            outputs.shape
        )  # else (batch,) and (batch, 1) would be subtracted each from each
        return outputs, y, F.mse_loss(outputs, y)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        _, _, loss = self._outputs(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and metric on validation data."""
        outputs, y, loss = self._outputs(batch)
        self.val_metric(outputs, y)
        self.log(f"val_{self.metric}", self.val_metric, batch_size=len(y), on_epoch=True)
        self.log("val_loss", loss, batch_size=len(y), sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and metric on test data."""
        outputs, y, loss = self._outputs(batch)
        self.test_metric(outputs, y)
        if self.confusion is not None:
            self.confusion.update(outputs, y)
        self.log(f"test_{self.metric}", self.test_metric, batch_size=len(y), on_epoch=True)
        self.log("test_loss", loss, batch_size=len(y))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, with its schedule."""
        optimizer = self.optimizer(self.parameters())
        if self.decay == "constant":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
