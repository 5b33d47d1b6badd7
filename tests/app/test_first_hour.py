"""What a new user tries first, from the README alone, in a folder with a module of their own (case 40)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import psc_lightning
from psc_lightning.app.main import main
from psc_lightning.report.notes import notes_of, predictions

Command = Callable[..., tuple[int, str]]
ROOT = Path(__file__).resolve().parents[2]

MINE = """
import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x):
        return self.net(x)

    def step(self, batch, name):
        error = self(batch["x"]) - batch["y"]
        self.log(f"{name}_loss", error.square().mean(), batch_size=32)
        self.log(f"{name}_mae", error.abs().mean(), batch_size=32)
        return error.square().mean()

    def training_step(self, batch, batch_idx):
        return self.step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self.step(batch, "val")

    def test_step(self, batch, batch_idx):
        self.step(batch, "test")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class Data(lightning.LightningDataModule):
    def __init__(self):
        super().__init__()
        x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
        self.rows = [{"x": row, "y": row[:3].sum(0, keepdim=True)} for row in x]

    def loader(self):
        return DataLoader(self.rows, 32)

    train_dataloader = val_dataloader = test_dataloader = loader
"""


def test_a_sweep_over_a_module_of_ones_own(tmp_path: Path) -> None:
    """One process: found beside the command, its own metric in the table, notes, where the file is, no progress in a pipe."""
    (tmp_path / "mine.py").write_text(MINE)
    own = ["model=custom", "model.net._target_=mine.Net", "data=custom", "data._target_=mine.Data", "logger=none"]
    sizes = ["baseline.max_epochs=2", "trainer.max_epochs=2", "compression=binary", "hydra.sweep.dir=sweep"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *own, *sizes, "compression.threshold=0,0.6"],
        cwd=tmp_path,
        env={**os.environ, "PSC_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = json.loads((tmp_path / "sweep/sweep.json").read_text())["jobs"]
    assert jobs[0]["notes"] == []
    (note,) = jobs[1]["notes"]
    assert note.startswith(f"the mask costs more than it saves: {jobs[1]['file_bytes']:,} bytes with it")
    assert f"job 1: {note}\n" in done.stdout
    assert done.stdout.count("dense mae") == 1
    assert f"{jobs[0]['metrics']['compressed']['mae']:.4f}" in done.stdout
    for number in (0, 1):
        report = json.loads((tmp_path / f"sweep/{number}/report.json").read_text())
        assert report["batchnorm_batches"] == 8
        assert f"run folder: sweep/{number}\n" in done.stdout
        assert f"file: sweep/{number}/model.psc (psc_lightning.load_into(model, path)" in done.stdout
    assert done.stdout.count("BatchNorm's statistics: taken anew from 8 training batches") == 2
    assert "Epoch" not in done.stdout + done.stderr


def test_the_readmes_way_into_ones_own_hydra_application() -> None:
    code = "import psc_lightning; psc_lightning.configs.register(); print(psc_lightning.export.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("psc_lightning.export\n", "")
    assert not hasattr(psc_lightning, "nothing")


def test_help_into_a_pipe_that_is_closed_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = os.pipe()
    os.close(ends[0])  # head has gone
    monkeypatch.setattr(sys, "argv", ["psc-train", "--help"])
    with open(ends[1], "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit) as caught:
            main()
    assert caught.value.code == 141


def test_a_file_that_is_worse_than_its_start_says_so_and_what_to_try(cli: Command, tmp_path: Path) -> None:
    tiny = ["trainer.max_epochs=1", "logger=none", "data.batch_size=256", "hydra.run.dir=run"]
    status, said = cli("compression=mask", "compression.threshold=0.99", "baseline.max_epochs=6", *tiny)
    assert status == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    found = {stage: report["metrics"][stage]["accuracy"] for stage in ("dense", "compressed")}
    assert found["compressed"] < found["dense"] - 0.05
    said_of_it = [note for note in report["notes"] if "points below the dense start" in note]
    assert len(said_of_it) == 1
    assert f"{100 * (found['dense'] - found['compressed']):.1f} points" in said_of_it[0]
    for advice in (
        "longer training (trainer.max_epochs is 1)",
        "a lower compression.threshold (it is 0.99)",
        "another preset",
    ):
        assert advice in said_of_it[0]
    assert f"note: {said_of_it[0]}" in said


def test_a_file_that_predicts_one_class_says_so() -> None:
    model = nn.Linear(2, 3)
    nn.init.zeros_(model.weight)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    with predictions(model) as predicted:
        for size in (4, 3):
            model(torch.randn(size, 2))
    model(torch.randn(5, 2))
    assert predicted == {1: 7}
    same = {"dense": {"accuracy": 0.5, "loss": 1.0}, "compressed": {"accuracy": 0.48, "loss": 9.0}}
    assert notes_of(same, predicted, ["longer training", "another preset"]) == [
        "the file predicts one class, 1, for all 7 test inputs; what may help: longer training, another preset"
    ]
    assert notes_of(same, {0: 3, 1: 4}, []) == []
    regression = {"dense": {"mae": 0.1}, "compressed": {"mae": 0.9}}
    assert notes_of(regression, predicted, []) == []  # whose outputs are no classes


@pytest.mark.parametrize(
    ("name", "fall", "said"), [("accuracy", 0.06, 1), ("accuracy", 0.04, 0), ("top1_acc", 0.06, 1)]
)
def test_five_points_are_the_limit(name: str, fall: float, said: int) -> None:
    metrics = {"dense": {name: 0.9}, "compressed": {name: 0.9 - fall}}
    assert len(notes_of(metrics, {}, ["another preset"])) == said
