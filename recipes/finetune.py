"""Fine-tune your own LightningModule under compression, and hand over a small file.

    python recipes/finetune.py

Nothing here but torch, Lightning and our callbacks: no Hydra, no base class of ours.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset

import psc_lightning
from psc_lightning import GradientClipping, MaskLearning, StraightThroughQuantization, WeightSharing


class Digits(LightningModule):
    """Your model, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def loaders() -> tuple[DataLoader[tuple[torch.Tensor, ...]], DataLoader[tuple[torch.Tensor, ...]]]:
    """Training and test digits."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    data = TensorDataset(x, torch.tensor(digits.target))
    split = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    train, test = torch.utils.data.Subset(data, split[360:]), torch.utils.data.Subset(data, split[:360])
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=360)


def main() -> None:
    torch.manual_seed(0)
    train, test = loaders()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }

    model = Digits()
    Trainer(max_epochs=10, **quiet).fit(model, train)  # the network that you have

    callbacks = [
        MaskLearning("movement", threshold=0.8),  # which weights exist
        WeightSharing("cross_channel", groups=2, targets="Linear", ignore="net.10"),  # which weights are one weight
        StraightThroughQuantization("ternary"),  # which values weights may take
        GradientClipping(max_norm=1.0, scope="layer"),  # how hard a step may pull
    ]
    print(psc_lightning.plan(model, callbacks))
    Trainer(max_epochs=20, callbacks=callbacks, **quiet).fit(model, train)
    update_bn(train, model)  # BatchNorm's averages lag behind weights that jump between few levels

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "digits.psc")
        report = psc_lightning.save(model, path)
        print(report)
        plain = Digits()
        plain.load_state_dict(psc_lightning.load(path))  # your own class, strict
        Trainer(**quiet).test(plain, test)


if __name__ == "__main__":
    main()
