"""Whole runs of the command line."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import onnxruntime
import pytest
import torch
from hydra.utils import instantiate
from lightning import LightningDataModule, LightningModule
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import psc_lightning
from psc_lightning.app.models import DigitsCNN
from psc_lightning.cli import main as psc

Command = Callable[..., tuple[int, str]]

TINY = ["baseline.max_epochs=2", "trainer.max_epochs=2", "logger=none", "data.batch_size=256"]


class OwnModule(LightningModule):
    """A user's: another metric, no accuracy, an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.layer(batch[0].flatten(1)), batch[1])}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        pass

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        wrong = self.layer(batch[0].flatten(1)).argmax(1) != batch[1]
        self.log("test_error", wrong.float().mean(), on_epoch=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


class Steps(OwnModule):
    """Makes its steps itself, which needs a Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        found = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(found["loss"])
        optimizer.step()
        return found


class OwnNet(nn.Sequential):
    """A user's plain network."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 3))


class OwnData(LightningDataModule):
    """A user's: random images of three kinds."""

    def __init__(self, n: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, 3, (n,), generator=generator)
        self.samples = TensorDataset(torch.randn(n, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1), labels)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.samples, 32, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.samples, 64)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.samples, 64)


PRESETS = ["none", "float", "binary", "ternary", "mask", "cross_channel", "row", "column", "separable", "low_rank"]
PRESETS += ["log", "codebook", "deep"]


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_from_command_to_file(cli: Command, tmp_path: Path, name: str) -> None:
    sooner = ["compression.calibration_steps=3"] if name == "cross_channel" else []
    status, said = cli(f"compression={name}", "compression.threshold=0.6", "hydra.run.dir=run", *TINY, *sooner)
    assert status == 0, said
    run = tmp_path / "run"
    report = json.loads((run / "report.json").read_text())
    assert report["file_bytes"] == (run / "model.psc").stat().st_size
    assert {*report["metrics"]} == {"dense", "one_shot", "compressed"}
    assert all({*values} == {"accuracy", "loss"} for values in report["metrics"].values())
    assert f"{report['file_bytes']:,} bytes" in (run / "report.html").read_text()
    series = json.loads((run / "history.json").read_text())["series"]
    assert ("psc/sparsity" in series) == (name != "none")
    assert {"train_loss", "val_accuracy", "learning_rate"} <= {*series}
    for file in ("config.yaml", "run.json", "plots/bytes.png", "plots/training.png", "checkpoints/last.ckpt"):
        assert (run / file).is_file()
    assert OmegaConf.load(run / "config.yaml").compression.threshold == 0.6
    assert json.loads((run / "run.json").read_text())["status"] == "completed"
    assert ("ignores compression.threshold" in said) == (name == "none")
    state = psc_lightning.load(run / "model.psc")
    net = DigitsCNN()
    net.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    weight = state["net.conv3.weight"]
    zeros = int((weight == 0).sum())
    if name in ("float", "binary", "codebook", "mask", "deep"):
        assert zeros >= int(0.6 * weight.numel() + 0.5)
    if name in ("binary", "codebook"):
        assert zeros == int(0.6 * weight.numel() + 0.5)
    if name == "none":
        assert zeros == 0


def test_binary_is_good_and_small(cli: Command, tmp_path: Path) -> None:
    status, said = cli("compression=binary", "hydra.run.dir=run")
    assert status == 0, said
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["metrics"]["compressed"]["accuracy"] >= 0.95
    assert report["compression_ratio"] > 15
    assert "net.conv3.weight" in said
    # A run's folder knows its own model.
    assert psc(["export", str(tmp_path / "run"), "--onnx", str(tmp_path / "m.onnx"), "--example", "3,1,8,8"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    plain = DigitsCNN(10)
    state = psc_lightning.load(tmp_path / "run/model.psc")
    plain.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), plain.eval()(x), rtol=1e-5, atol=1e-5)


def test_the_reported_numbers_are_those_of_the_rounded_file(cli: Command, tmp_path: Path) -> None:
    """Leftovers are rounded only when written: the numbers of the model in memory differ."""
    assert cli("compression=float", "leftovers=float16", "hydra.run.dir=run", *TINY)[0] == 0
    state = psc_lightning.load(tmp_path / "run/model.psc")
    assert torch.equal(state["net.bn1.bias"], state["net.bn1.bias"].half().float())
    plain = DigitsCNN()
    plain.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    data = instantiate(OmegaConf.load(tmp_path / "run/config.yaml").data, _convert_="all")
    data.setup("test")
    ((images, labels),) = data.test_dataloader()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(plain.eval()(images), labels)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["metrics"]["compressed"]["loss"] == pytest.approx(loss.item(), rel=1e-6)


def test_clipping_clips_and_logs(cli: Command, tmp_path: Path) -> None:
    small = ["clipping=layer", "clipping.max_norm=1e-6", "logger=csv", "trainer.log_every_n_steps=1"]
    assert cli("compression=binary", "hydra.run.dir=run", *TINY, *small)[0] == 0
    with (tmp_path / "run/logs/version_0/metrics.csv").open() as file:
        shares = [row["grad_norm/clipped_share"] for row in csv.DictReader(file)]
    assert {float(share) for share in shares if share} == {1.0}


def test_batchnorm_statistics_are_those_of_the_final_weights(cli: Command, tmp_path: Path) -> None:
    """Means over the batches, taken on the weights of the file; the weights are those of a run without it."""
    for name, batches in (("without", 0), ("with", 3)):
        exact = ["leftovers=float32", "fold_batchnorm=false"]
        assert cli("compression=binary", f"batchnorm={batches}", f"hydra.run.dir={name}", *exact, *TINY)[0] == 0
    without, state = (psc_lightning.load(tmp_path / name / "model.psc") for name in ("without", "with"))
    changed = {name for name, value in state.items() if not torch.equal(value, without[name])}
    assert changed == {f"net.bn{i}.{name}" for i in (1, 2, 3) for name in ("running_mean", "running_var")}
    assert json.loads((tmp_path / "with/report.json").read_text())["batchnorm_batches"] == 3
    data = instantiate(OmegaConf.load(tmp_path / "with/config.yaml").data, _convert_="all")
    data.setup("fit")
    seen = [
        nn.functional.conv2d(x, state["net.conv1.weight"], padding=1) for x, _ in islice(data.train_dataloader(), 3)
    ]
    mean = torch.stack([x.mean(dim=(0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(state["net.bn1.running_mean"], mean, rtol=1e-4, atol=1e-6)
    assert cli("batchnorm=-1", *TINY)[0] == 1


def test_the_same_command_gives_the_same_bytes_and_shares_the_baseline(cli: Command, tmp_path: Path) -> None:
    for name in ("a", "b"):
        _, said = cli("compression=mask", f"hydra.run.dir={name}", *TINY)
    assert "training it once" not in said
    assert (tmp_path / "a/model.psc").read_bytes() == (tmp_path / "b/model.psc").read_bytes()
    _, said = cli("compression=none", "seed=1", "hydra.run.dir=c", *TINY)
    assert "training it once" in said


def test_the_saved_configuration_is_the_run(cli: Command, tmp_path: Path) -> None:
    assert cli("compression=mask", "seed=3", "hydra.run.dir=first", *TINY)[0] == 0
    status, said = cli("--config-path", str(tmp_path / "first"), "--config-name", "config", "hydra.run.dir=again")
    assert status == 0, said
    assert (tmp_path / "again/model.psc").read_bytes() == (tmp_path / "first/model.psc").read_bytes()
    reports = [json.loads((tmp_path / name / "report.json").read_text())["metrics"] for name in ("first", "again")]
    assert reports[0] == reports[1]


def test_a_given_checkpoint_is_the_dense_model(cli: Command, tmp_path: Path) -> None:
    cli("hydra.run.dir=a", *TINY)
    trained = psc_lightning.load(tmp_path / "a/model.psc")
    torch.save({"module." + key.removeprefix("net."): value for key, value in trained.items()}, tmp_path / "mine.pt")
    status, said = cli("compression=float", "model.checkpoint=mine.pt", "hydra.run.dir=b", *TINY)
    assert status == 0, said
    before, after = (json.loads((tmp_path / name / "report.json").read_text())["metrics"] for name in "ab")
    assert before["compressed"] == after["dense"]


def test_a_users_lightning_module_is_used_as_it_is(cli: Command, tmp_path: Path) -> None:
    target = f"{OwnModule.__module__}.OwnModule"
    status, said = cli(
        "compression=ternary",
        "model=custom",
        f"model.net._target_={target}",
        "hydra.run.dir=run",
        "objective=error",
        *TINY,
    )
    assert status == 0, said
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert [tensor["name"] for tensor in report["tensors"]][:1] == ["layer.weight"]
    assert {*report["metrics"]["compressed"]} == {"error"}


def test_batchnorm_is_folded_and_leftovers_are_on_a_grid(cli: Command, tmp_path: Path) -> None:
    """A smaller file, which is what is tested; what cannot be folded is said before training."""
    sizes = []
    for options in (["fold_batchnorm=false", "leftovers=float32"], ["fold_batchnorm=true", "leftovers=log8"]):
        status, output = cli("compression=binary", "hydra.run.dir=run", *options, *TINY)
        assert status == 0, output
        sizes.append(json.loads((tmp_path / "run/report.json").read_text())["file_bytes"])
    assert sizes[1] < 0.8 * sizes[0]
    state = psc_lightning.load(tmp_path / "run/model.psc")
    assert not any(state[key].any() for key in state if key.endswith("running_mean"))
    status, output = cli("compression=log", "hydra.run.dir=refused", "fold_batchnorm=true", *TINY)
    assert status == 1
    assert "LogLevels cannot take a factor" in output
    assert not list((tmp_path / "refused/checkpoints").glob("*"))


@pytest.mark.filterwarnings("ignore:ByteBudget. the file has")  # it is an error of the run, too
def test_a_budget_holds_for_any_preset_or_the_run_fails(cli: Command, tmp_path: Path) -> None:
    """Where it does not: exit status 1, the file under another name, what to do; its accuracy is reported all the same."""
    quick = ["trainer.max_epochs=6", "baseline.max_epochs=1", "data.batch_size=128", "leftovers=log8", "names=false"]
    status, output = cli("compression=ternary", "compression.budget=3.5%", "hydra.run.dir=kept", *quick)
    assert status == 0, output
    assert (tmp_path / "kept/model.psc").stat().st_size <= int(0.035 * 97152)
    status, output = cli("compression=small", "compression.budget=300", "hydra.run.dir=missed", *quick)
    assert status == 1
    assert "compression.budget=300: " in output
    assert "model.over-budget.psc has" in output
    size = (tmp_path / "missed/model.over-budget.psc").stat().st_size
    assert not (tmp_path / "missed/model.psc").exists()
    report = json.loads((tmp_path / "missed/report.json").read_text())
    assert report["file_bytes"] == size > 300
    assert "accuracy" in report["metrics"]["compressed"]


def test_a_users_network_and_data_from_command_to_file(cli: Command, tmp_path: Path) -> None:
    status, said = cli(
        "compression=ternary",
        "model=custom",
        f"model.net._target_={OwnNet.__module__}.OwnNet",
        "+model.net.width=16",
        "model.classes=3",
        "data=custom",
        f"data._target_={OwnData.__module__}.OwnData",
        "+data.n=128",
        "hydra.run.dir=run",
        *TINY[:3],
    )
    assert status == 0, said
    own = OwnNet(16)
    state = psc_lightning.load(tmp_path / "run/model.psc")
    own.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
    images, labels = OwnData(128).samples.tensors
    accuracy = json.loads((tmp_path / "run/report.json").read_text())["metrics"]["compressed"]["accuracy"]
    assert accuracy == pytest.approx((own(images).argmax(1) == labels).float().mean().item())


def test_the_one_shot_numbers_do_not_depend_on_the_cache(cli: Command, tmp_path: Path) -> None:
    """A user's loader shuffles by torch's own generator, which training the baseline moves."""
    own = ["data=custom", f"data._target_={OwnData.__module__}.OwnData", "+data.n=600", "model.classes=3"]
    said = [
        cli("compression=mask", "compression.threshold=0.9", *own, f"hydra.run.dir={name}", *TINY[:3]) for name in "ab"
    ]
    assert ["training it once" in text for _, text in said] == [True, False]
    first, again = (json.loads((tmp_path / name / "report.json").read_text())["metrics"] for name in "ab")
    assert first == again


def test_what_is_outside_the_slots_is_stored_as_coarsely_as_the_loss_allows(cli: Command, tmp_path: Path) -> None:
    """By default; the report says how, and a plain run stores its weights as they are."""
    sizes = {}
    for name, options in {"auto": [], "exact": ["leftovers=float32", "fold_batchnorm=false"]}.items():
        status, output = cli("compression=binary", f"hydra.run.dir={name}", *options, *TINY)
        assert status == 0, output
        report = json.loads((tmp_path / name / "report.json").read_text())
        sizes[name] = report["file_bytes"]
        assert (report["stored_as"] == "") == (name == "exact")
    assert sizes["auto"] < sizes["exact"]
    status, output = cli("compression=none", "hydra.run.dir=none", *TINY)
    assert status == 0, output
    state = psc_lightning.load(tmp_path / "none/model.psc")
    assert len(state["net.conv2.weight"].unique()) > 4000


def test_a_step_that_cannot_be_called_by_itself_costs_no_run(cli: Command, tmp_path: Path) -> None:
    """What is outside the slots is then stored as it is, and the report says why."""
    own = ["model=custom", f"model.net._target_={Steps.__module__}.Steps", "objective=error"]
    status, said = cli("compression=ternary", "hydra.run.dir=run", *own, *TINY)
    assert status == 0, said
    stored_as = json.loads((tmp_path / "run/report.json").read_text())["stored_as"]
    assert stored_as.startswith("leftovers float32, BatchNorm not folded: the training step cannot be called by itself")
