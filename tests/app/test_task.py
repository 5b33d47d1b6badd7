"""What the app's own module computes: classes or numbers, by `model.task`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from psc_lightning.app.errors import UsageError
from psc_lightning.app.task import Classifier

Command = Callable[..., tuple[int, str]]


class Line(nn.Sequential):
    """Sixteen numbers to one."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))


class Numbers(LightningDataModule):
    """Sums of sixteen numbers, as one axis of targets."""

    def __init__(self) -> None:
        super().__init__()
        x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
        self.samples = TensorDataset(x, x.sum(1))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.samples, 32, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.samples, 64)

    test_dataloader = val_dataloader


def module(task: str, outputs: list[list[float]]) -> Classifier:
    """Its network gives these outputs, whatever comes in."""

    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor(outputs)

    return Classifier(Fixed(), torch.optim.SGD, 2, task=task)


def loss(made: Classifier, y: Tensor) -> float:
    made.log = lambda *args, **options: None  # type: ignore[method-assign]  # there is no Trainer
    return made.training_step((torch.zeros(2), y), 0).item()


@pytest.mark.parametrize("y", [torch.tensor([1.0, 4.0]), torch.tensor([[1], [4]])])
def test_a_regression_has_the_squared_error(y: Tensor) -> None:
    """(1, 4) beside outputs of (2, 2): (1 + 4) / 2; not each from each, (1 + 1 + 4 + 4) / 4, and of any type."""
    assert loss(module("regression", [[2.0], [2.0]]), y) == 2.5


def test_a_classification_has_the_cross_entropy() -> None:
    assert loss(module("classification", [[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])) == pytest.approx(0.693147)


def test_targets_of_the_other_task_are_refused_by_the_key() -> None:
    with pytest.raises(UsageError, match=r"^model\.task=classification: expected whole numbers.*found torch\.float32"):
        loss(module("classification", [[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0.5, 1.5]))
    with pytest.raises(UsageError, match=r"^model\.task=regression: expected as many targets.*\(2,\) and \(2, 2\)"):
        loss(module("regression", [[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="task must be classification or regression, not 'detection'"):
        module("detection", [])


OWN = ["model=custom", f"model.net._target_={__name__}.Line", "data=custom", f"data._target_={__name__}.Numbers"]
OWN += ["compression=float", "logger=none", "baseline.max_epochs=12", "trainer.max_epochs=8", "optimizer.lr=0.01"]


def test_a_regressor_goes_through_the_command_line(cli: Command) -> None:
    """The file's mean absolute error is reported, and is small; a target's own spread is 3.2."""
    status, said = cli(*OWN, "model.task=regression", "objective=mae", "hydra.run.dir=run")
    assert status == 0, said
    metrics = json.loads(Path("run/report.json").read_text())["metrics"]
    assert sorted(metrics["compressed"]) == ["loss", "mae"]
    assert metrics["compressed"]["mae"] < 1.0
    status, said = cli(*OWN, "hydra.run.dir=other")
    assert status != 0
    assert "model.task=classification: expected whole numbers, the classes, as targets, found torch.float32" in said
    assert "Traceback" not in said
    assert not Path("other/model.psc").exists()
