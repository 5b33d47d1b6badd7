"""What is recorded while a run goes on, and what its loggers see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from psc_lightning import ByteBudget, History, MaskLearning, StraightThroughQuantization, measure


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 16)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.25)


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.ones(8, 16)), batch_size=2)


def fit(
    *callbacks: Any, folder: Path, epochs: int = 2, module: Net | None = None, validate: bool = True, **resume: Any
) -> History:
    history = next(one for one in callbacks if isinstance(one, History))
    quiet: dict[str, Any] = {"limit_val_batches": 1.0 if validate else 0} | {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
        "log_every_n_steps": 1,
    }
    logger = CSVLogger(str(folder), name="logs", version=0)
    trainer = Trainer(callbacks=[*callbacks], max_epochs=epochs, logger=logger, default_root_dir=folder, **quiet)
    module = module or Net()
    trainer.fit(module, data(), data(), **resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return history


def test_what_is_recorded(tmp_path: Path) -> None:
    module = Net()
    mask = MaskLearning("magnitude", threshold=0.25, schedule={"kind": "linear", "begin": 0.0, "end": 1.0}, min_size=0)
    history = fit(mask, History(every=2), folder=tmp_path, module=module)
    series = history.series
    assert [step for step, _ in series["train_loss"]] == [2, 4, 6, 8]
    assert series["learning_rate"] == [(2, 0.25), (4, 0.25), (6, 0.25), (8, 0.25)]
    assert [step for step, _ in series["val_loss"]] == [4, 8]
    assert series["psc/sparsity"] == [(4, 0.25), (8, 0.25)]  # validation sees the hard weights
    strengths = [value for _, value in series["psc/strength/mask"]]
    assert 0 < strengths[0] < strengths[1] <= 1
    assert series["psc/bytes"][-1] == (8, measure(module).file_bytes)
    history.save(tmp_path / "history.json")
    assert json.loads((tmp_path / "history.json").read_text())["series"]["val_loss"][1] == [8, series["val_loss"][1][1]]
    (header, *lines) = (tmp_path / "logs/version_0/metrics.csv").read_text().splitlines()
    names = header.split(",")
    assert {"psc/sparsity", "psc/bytes", "psc/strength/mask"} <= {*names}
    assert sum(line.split(",")[names.index("psc/sparsity")] == "0.25" for line in lines) == 2


def test_without_validation_once_an_epoch_and_of_a_plain_run_no_compression(tmp_path: Path) -> None:
    levels = StraightThroughQuantization("binary", min_size=0)
    history = fit(levels, History(), folder=tmp_path / "a", validate=False)
    assert [step for step, _ in history.series["psc/sparsity"]] == [4, 8]
    plain = fit(History(every=1), folder=tmp_path / "b")
    assert {*plain.series} == {"train_loss", "learning_rate", "val_loss"}


def test_a_budget_tells_its_estimate_and_price(tmp_path: Path) -> None:
    levels = StraightThroughQuantization("uniform", bits=4, min_size=0, schedule="constant")
    budget = ByteBudget("90%")
    history = fit(levels, budget, History(), folder=tmp_path, epochs=4)
    assert len(history.series["psc/bytes"]) == 4
    assert history.series["psc/bytes"][-1][1] == pytest.approx(budget.size())
    assert history.series["psc/price"][-1] == (16, budget.weight)


def test_bytes_are_those_of_how_the_file_will_be_written(tmp_path: Path) -> None:
    module = Net()
    history = fit(
        StraightThroughQuantization("binary", min_size=0), History(leftovers="log8"), folder=tmp_path, module=module
    )
    assert (
        history.series["psc/bytes"][-1][1] == measure(module, leftovers="log8").file_bytes < measure(module).file_bytes
    )
    with pytest.raises(ValueError, match="every"):
        History(every=0)


def test_a_resumed_run_has_all_of_it(tmp_path: Path) -> None:
    def levels() -> StraightThroughQuantization:
        return StraightThroughQuantization("ternary", min_size=0, schedule={"kind": "linear", "begin": 0, "end": 6})

    whole = fit(levels(), History(every=1), folder=tmp_path / "a", epochs=3)
    fit(levels(), History(every=1), folder=tmp_path / "b", epochs=2)
    resumed = fit(
        levels(),
        History(every=1),
        folder=tmp_path / "c",
        epochs=3,
        ckpt_path=tmp_path / "b/last.ckpt",
        weights_only=True,
    )
    assert {name: [tuple(one) for one in points] for name, points in resumed.series.items()} == whole.series
