"""Law 6: checkpoints load in the user's own class, where psc_lightning was never installed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from torch import Tensor, nn
from training import COMBINATIONS, INPUTS, LABELS, QUIET, RUNS, Loader, Net, differences, fit, layers, trainer

from psc_lightning import GradientClipping, MaskLearning, StraightThroughQuantization, detach, save
from psc_lightning.cli import main

pytestmark = QUIET

RAMP = {"kind": "cubic", "begin": 0.25, "end": 0.75}
BLOCKED = """
import sys

class Nobody:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "psc_lightning":
            raise ImportError("psc_lightning is not installed here")

sys.meta_path.insert(0, Nobody())
"""
WITHOUT_US = (
    BLOCKED
    + """import torch
from torch import nn

torch.set_num_threads(1)
net = nn.Sequential(
    nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
    nn.Flatten(), nn.Identity(), nn.Linear(128, 4),
)
inputs, out, *paths = sys.argv[1:]
logits = {}
for path in paths:
    checkpoint = torch.load(path, weights_only=True)
    net.load_state_dict({key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()})
    with torch.no_grad():
        logits[path] = net.eval()(torch.load(inputs, weights_only=True))
try:
    import psc_lightning
except ImportError:
    torch.save(logits, out)
"""
)


LIGHTNING_WITHOUT_US = (
    BLOCKED
    + """
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)

class Own(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
            nn.Flatten(), nn.Identity(), nn.Linear(128, 4),
        )

    def test_step(self, batch, batch_idx):
        self.log("test", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

data, out, *paths = sys.argv[1:]
inputs, labels = torch.load(data, weights_only=True)
found = {}
for path in paths:
    model = Own.load_from_checkpoint(path, weights_only=True).eval()
    with torch.no_grad():
        logits = model.net(inputs)
    made = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, num_nodes=1)
    loader = DataLoader(TensorDataset(inputs, labels), 8)
    (result,) = made.test(Own(), loader, ckpt_path=path, weights_only=True, verbose=False)
    found[path] = {"logits": logits, "test": result["test"]}
assert "psc_lightning" not in sys.modules
torch.save(found, out)
"""
)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(INPUTS)


def plain_copy(model: nn.Module) -> nn.Module:
    plain = Net()
    plain.load_state_dict(model.state_dict())
    return plain


def test_checkpoints_load_where_we_are_not_installed(tmp_path):
    expected = {}
    for name, make in RUNS.items():
        model, made = fit(make(RAMP))
        for weights_only in (False, True):
            path = str(tmp_path / f"{name}-{weights_only}.ckpt")
            made.save_checkpoint(path, weights_only=weights_only)
            # No plain class rounds its inputs.
            expected[path] = logits(model if name != "integers" else plain_copy(model))
    torch.save(INPUTS, tmp_path / "inputs")
    command = [sys.executable, "-c", WITHOUT_US, str(tmp_path / "inputs"), str(tmp_path / "out"), *expected]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert differences(expected, torch.load(tmp_path / "out", weights_only=True)) == []


def test_lightning_loads_and_tests_them_where_we_are_not_installed(tmp_path):
    torch.save((INPUTS, LABELS), tmp_path / "data")
    expected = {}
    for name in ("deep", "separable_lsq"):
        model, made = fit(RUNS[name](RAMP))
        path = str(tmp_path / f"{name}.ckpt")
        made.save_checkpoint(path)
        (result,) = made.test(model, Loader(), verbose=False)
        expected[path] = {"logits": logits(model), "test": result["test"]}
    command = [sys.executable, "-c", LIGHTNING_WITHOUT_US, str(tmp_path / "data"), str(tmp_path / "out"), *expected]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert differences(expected, torch.load(tmp_path / "out", weights_only=True)) == []


def test_a_configuration_leaks_nothing_into_a_checkpoint(tmp_path):
    """What Hydra and NumPy hand to callbacks is no part of a file that is read with `weights_only`."""
    schedule = {"kind": "linear", "begin": 4, "end": 12}
    cfg = OmegaConf.create({"targets": ["net.*"], "schedule": schedule, "threshold": 0.5})
    mask = MaskLearning(
        "movement", cfg.threshold, targets=cfg.targets, schedule=cfg.schedule, score_lr=np.float64(0.01)
    )
    levels = StraightThroughQuantization("ternary", targets=cfg.targets, schedule=cfg.schedule)
    _, made = fit([mask, levels, GradientClipping(max_norm=np.float64(1))])
    made.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert list(checkpoint["callbacks"]) == ["GradientClipping"]
    only_primitives(checkpoint["callbacks"])
    only_primitives(checkpoint["psc_lightning"])


def only_primitives(state, path="checkpoint"):
    kinds = {dict, list, tuple, str, int, float, bool, type(None), Tensor}
    assert type(state) in kinds or type(state).__name__ == "OrderedDict", f"{path} is a {type(state)}"
    if isinstance(state, dict):
        for key, value in state.items():
            assert type(key) in (str, int), f"{path} has the key {key!r}"
            only_primitives(value, f"{path}.{key}")
    elif isinstance(state, list | tuple):
        for i, value in enumerate(state):
            only_primitives(value, f"{path}.{i}")


@pytest.mark.parametrize("name", ["separable_lsq", "deep", "saliency", "integers"])
def test_checkpoints_hold_tensors_and_primitives(name, tmp_path):
    _, made = fit(RUNS[name](RAMP), Net())
    made.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == list(Net().state_dict())
    only_primitives(checkpoint["state_dict"])
    assert set(checkpoint["psc_lightning"]["tensors"]) == {f"net.{index}.weight" for index in (0, 3, 7)}
    only_primitives(checkpoint["psc_lightning"])
    assert checkpoint["callbacks"] == {}  # all that is ours lies under one key


@pytest.mark.parametrize("name", ["cross_channel", "low_rank", "ternary_movement"])
def test_a_test_with_and_without_the_callbacks_measures_the_same(name, tmp_path):
    model, made = fit([*RUNS[name](RAMP), ModelCheckpoint(dirpath=tmp_path, filename="last")])
    path = str(tmp_path / "last.ckpt")
    after = made.test(model, Loader(count=4), ckpt_path=path, weights_only=True, verbose=False)
    with_callbacks = trainer(RUNS[name](RAMP)).test(
        Net(), Loader(count=4), ckpt_path=path, weights_only=True, verbose=False
    )
    without = trainer().test(Net(), Loader(count=4), ckpt_path=path, weights_only=True, verbose=False)
    assert after == with_callbacks == without
    loaded = Net.load_from_checkpoint(path, weights_only=True)
    assert type(loaded) is Net
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("step", [1, 7, 8, 12, 24])
def test_a_checkpoint_of_a_ramp_holds_the_hard_model(step, tmp_path):
    """Whatever the strength in the step before: a checkpoint holds what a file would."""
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit([*RUNS["float"](RAMP), saver])
    weight = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]["net.3.weight"]
    begun = step > 7  # the ramp leaves 0 after step 6
    assert max(row.unique().numel() for row in weight.reshape(8, 72)) <= (255 if begun else 72)
    assert int(weight.eq(0).sum()) >= (288 if begun else 0)
    assert bool(weight.eq(0).any()) == begun


def test_plain_states_load_strictly_in_a_live_model():
    model, _ = fit(RUNS["float"](RAMP))
    plain = Net()
    plain.net[0].bias.data.fill_(3.0)
    model.load_state_dict(plain.state_dict())
    assert model.net[0].bias[0] == 3
    with pytest.raises(RuntimeError, match=r"net\.9\.weight"):
        model.load_state_dict({**plain.state_dict(), "net.9.weight": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"net.0.weight": plain.net[0].weight})


class Twice(LightningModule):
    """One layer under two names, one Parameter in two layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.again = self.first
        self.tied = nn.Linear(12, 12)
        self.tied.weight = self.first.weight
        self.loader = Loader()

    def training_step(self, batch, batch_idx):
        inputs = batch[0].flatten(1)[:, :12]
        return self.tied(self.again(self.first(inputs))).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_one_layer_under_two_names_and_one_parameter_in_two_layers(tmp_path):
    seed_everything(0, verbose=False)
    model = Twice()
    made = trainer([MaskLearning(threshold=0.5, schedule="constant"), StraightThroughQuantization("binary")])
    made.fit(model, Loader())
    made.save_checkpoint(tmp_path / "model.ckpt")
    state = torch.load(tmp_path / "model.ckpt", weights_only=True)["state_dict"]
    assert list(state) == list(Twice().state_dict())
    assert state["first.weight"].eq(0).sum() == 72
    assert torch.equal(state["first.weight"], state["again.weight"])
    assert torch.equal(state["first.weight"], state["tied.weight"])
    Twice().load_state_dict(state)


def test_after_detach_it_is_the_users_class_again():
    model, _ = fit(RUNS["row"](RAMP))
    expected = logits(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    detach(model)
    assert type(model) is Net
    assert [type(layer) for layer in model.net] == [type(layer) for layer in layers()]
    assert list(model.state_dict()) == list(Net().state_dict())
    assert differences(weights, dict(model.state_dict())) == []
    assert torch.equal(logits(model), expected)
    fit((), model.train(), max_epochs=1)
    assert not torch.equal(logits(model), expected)


def test_a_checkpoint_holds_what_the_file_holds(tmp_path, capsys):
    for name in ("binary", "cross_channel", "low_rank"):
        model, made = fit(COMBINATIONS[name]("constant"))
        made.save_checkpoint(tmp_path / "last.ckpt")
        for held in (model, model.net):  # with the names of the checkpoint, and without the LightningModule's prefix
            save(held, tmp_path / "model.psc")
            assert main(["verify", str(tmp_path / "model.psc"), "--against", str(tmp_path / "last.ckpt")]) == 0, name
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    checkpoint["state_dict"]["net.0.weight"][0, 0, 0, 0] += 1
    torch.save(checkpoint, tmp_path / "last.ckpt")
    assert main(["verify", str(tmp_path / "model.psc"), "--against", str(tmp_path / "last.ckpt")]) == 1
    assert "0.weight in 1 entries" in capsys.readouterr().err
