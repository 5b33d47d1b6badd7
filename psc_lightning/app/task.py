"""The LightningModule around a plain network. It knows nothing of compression: the callbacks do that."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

__all__ = ["Classifier"]

Batch = tuple[Tensor, Tensor]


class Classifier(LightningModule):
    """Train a network to name the class of an input, with cross-entropy.

    Args:
        net: gives (batch, classes) logits.
        optimizer: makes an optimizer from the parameters.
        classes: how many there are.
        decay: `cosine` lets the learning rate fall to 0 along a cosine, step by step; `constant` keeps it.
        channels_last: give images to the network in channels-last memory layout (faster convolutions in bfloat16).

    Raises:
        ValueError: `decay` is something else.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        classes: int = 10,
        decay: str = "cosine",
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if decay not in ("cosine", "constant"):
            raise ValueError(f"decay must be cosine or constant, not {decay!r}")
        self.net = net
        self.optimizer = optimizer
        self.decay = decay
        self.channels_last = channels_last
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy on validation data."""
        x, y = batch
        logits = self(x)
        self.val_accuracy(logits, y)
        self.log("val_accuracy", self.val_accuracy, batch_size=len(y), on_epoch=True)
        self.log("val_loss", F.cross_entropy(logits, y), batch_size=len(y), sync_dist=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log loss and accuracy on test data."""
        x, y = batch
        logits = self(x)
        self.test_accuracy(logits, y)
        self.log("test_accuracy", self.test_accuracy, batch_size=len(y), on_epoch=True)
        self.log("test_loss", F.cross_entropy(logits, y), batch_size=len(y))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, with its schedule."""
        optimizer = self.optimizer(self.parameters())
        if self.decay == "constant":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
