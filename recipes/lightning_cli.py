"""Compression from LightningCLI: the callbacks in a YAML file, or on the command line.

    python recipes/lightning_cli.py fit --config recipes/lightning_cli.yaml
    python recipes/lightning_cli.py fit --config recipes/lightning_cli.yaml --trainer.callbacks.init_args.threshold 0.9
    python recipes/lightning_cli.py fit --config recipes/lightning_cli.yaml --print_config

Needs `pip install "jsonargparse[jsonnet,signatures]"`. After the fit the small file lies in the trainer's folder.
"""

from __future__ import annotations

from pathlib import Path

import torch
from finetune import Digits, loaders
from lightning import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

import psc_lightning


class DigitsData(LightningDataModule):
    """Scikit-learn's digits."""

    def train_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return loaders()[0]

    def test_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return loaders()[1]


class SmallCLI(LightningCLI):
    """Writes the file when a fit has ended."""

    def after_fit(self) -> None:
        path = Path(self.trainer.default_root_dir, "model.psc")
        print(psc_lightning.save(self.model, path))
        print(f"written: {path}")


if __name__ == "__main__":
    SmallCLI(Digits, DigitsData, seed_everything_default=0)
