"""Callbacks that people have anyway: checkpoints of the best and the last, early stopping, finders, bars, monitors."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from training import (
    COMBINATIONS,
    INPUTS,
    LABELS,
    QUIET,
    Net,
    conductor,
    differences,
    fit,
    latents,
    run_state,
    sidecars,
    slotted,
    trainer,
)

from psc_lightning import load, save
from psc_lightning.artifact import to_bytes

pytestmark = QUIET

RAMP = {"kind": "linear", "begin": 4, "end": 12}


def steps_of(made) -> set[int]:
    """How often what is trained beside the weights was stepped."""
    return {int(state["step"]) for state in conductor(made).cast.sidecars.optimizer.state.values()}


def is_its_file(model: nn.Module, tmp_path, layout: torch.memory_format = torch.contiguous_format) -> None:
    """It is hard, and a plain network of the same memory layout, loaded from its file, computes the same."""
    assert all(slots.phase[i] in (0, 2) for _, slots, _ in slotted(model) for i in range(3))
    assert any(slots.begun for _, slots, _ in slotted(model))
    save(model, tmp_path / "model.psc")
    plain = Net().to(memory_format=layout)
    plain.load_state_dict(load(tmp_path / "model.psc"))
    with torch.no_grad():
        assert torch.equal(plain.eval()(INPUTS), model.eval()(INPUTS))


@pytest.mark.parametrize("mode", ["min", "max"])
def test_resume_from_the_best_and_from_the_last(mode, tmp_path):
    """Of a run that stopped after two of its four epochs; by `min` the best is the last, by `max` another."""

    class Stop(Callback):
        def on_train_epoch_end(self, made, *args):
            made.should_stop = made.current_epoch == 1

    def run(folder, ckpt=None, *more):
        saver = ModelCheckpoint(folder, filename="{step}", monitor="val", mode=mode, save_last=True)
        callbacks = COMBINATIONS["ternary_movement"]({"kind": "linear", "begin": 4, "end": 20})
        return *fit([*callbacks, *more, saver], Net("sgd"), ckpt=ckpt, max_epochs=4), saver

    model, made, _ = run(tmp_path / "whole")
    expected, file = run_state(model, made), to_bytes(model)[0]
    saver = run(tmp_path / "half", None, Stop())[2]
    assert saver.best_model_path.endswith("step=24.ckpt" if mode == "min" else "step=12.ckpt")
    for path in (saver.best_model_path, saver.last_model_path):
        model, made, _ = run(tmp_path / "resumed", path)
        assert made.global_step == 48
        assert differences(expected, run_state(model, made)) == []
        assert to_bytes(model)[0] == file


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:.*was called without a model")  # Lightning's own, where this callback is
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
def test_a_checkpoint_of_an_interrupted_run_is_hard(error, first, tmp_path):
    """In mid-ramp, whoever comes first in the list."""

    class Stopped(Net):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 7:
                assert any(1 in slots.phase for _, slots, _ in slotted(self))
                raise error("stop")
            return super().training_step(batch, batch_idx)

    model, ours, saver = Stopped(), COMBINATIONS["ternary_movement"](RAMP), OnExceptionCheckpoint(tmp_path, "stopped")
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fit([saver, *ours] if first else [*ours, saver], model)
    plain = Net()
    plain.load_state_dict(torch.load(tmp_path / "stopped.ckpt", weights_only=True)["state_dict"])
    assert plain.net[3].weight[0].unique().numel() <= 3
    with torch.no_grad():
        assert torch.equal(plain.eval()(INPUTS), model.eval()(INPUTS))


def test_early_stopping_leaves_a_hard_model(tmp_path):
    stop = EarlyStopping("val", patience=0, min_delta=1e9, check_on_train_epoch_end=False)
    model, made = fit([*COMBINATIONS["float"](RAMP), stop], Net("sgd"), max_epochs=4)
    assert made.global_step == 24  # of 48
    is_its_file(model, tmp_path)


def test_monitors_bars_and_accumulation_on_a_schedule(tmp_path):
    """The accumulation changes in mid-run; the sidecars follow the optimizer's steps."""
    callbacks = COMBINATIONS["separable_lsq"]("constant")
    others = [LearningRateMonitor(), RichProgressBar(), GradientAccumulationScheduler({0: 1, 1: 3})]
    model, made = fit(
        [*callbacks, *others], Net("sgd"), logger=CSVLogger(tmp_path), enable_progress_bar=True, log_every_n_steps=1
    )
    assert made.global_step == 12 + 4
    assert steps_of(made) == {16}
    is_its_file(model, tmp_path)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["float", "separable_lsq"])
@pytest.mark.filterwarnings("ignore:.*swa_utils.*")
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.*")
@pytest.mark.filterwarnings("ignore:Swapping scheduler.*")
def test_stochastic_weight_averaging(name, first, tmp_path):
    """Its last epoch renews the BatchNorm statistics of the averaged, compressed weights; the result is hard."""
    averaging = StochasticWeightAveraging(1e-2, swa_epoch_start=2)
    ours = COMBINATIONS[name](RAMP)
    model, _ = fit([averaging, *ours] if first else [*ours, averaging], Net("sgd"), max_epochs=4)
    is_its_file(model, tmp_path)
    single, _ = fit(COMBINATIONS[name](RAMP), Net("sgd"), max_epochs=4)
    assert not torch.equal(single.net[3].bias, model.net[3].bias)


class Tuned(Net):
    """What the finders turn: a learning rate and a batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 1e-3, 4

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=self.batch_size)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("name", ["ternary_movement", "separable_lsq"])
@pytest.mark.filterwarnings("ignore:.*find.*")
def test_finders_try_and_put_everything_back(name, tmp_path, monkeypatch):
    """They run steps of their own and restore the model: the fit begins from the slots that it would have begun from."""
    monkeypatch.chdir(tmp_path)
    finders = [
        LearningRateFinder(num_training_steps=8, early_stop_threshold=None),
        BatchSizeFinder(init_val=8, max_trials=1),
    ]
    model = Tuned()
    callbacks = COMBINATIONS[name](RAMP)
    made = trainer([*callbacks, *finders], limit_val_batches=1)
    made.fit(model)
    assert (model.batch_size, made.global_step) == (8, 24)
    assert steps_of(made) == {24 - 5}  # a ramp is at 0 when it begins
    is_its_file(model, tmp_path)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["ternary_movement", "separable_lsq"])
@pytest.mark.filterwarnings("ignore:.*find.*")
def test_the_run_after_a_finder_is_the_run_with_what_it_found(name, first, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seed_everything(0, verbose=False)
    finder = LearningRateFinder(num_training_steps=60, early_stop_threshold=None)
    model, callbacks = Tuned(), COMBINATIONS[name](RAMP)
    trainer([finder, *callbacks] if first else [*callbacks, finder], limit_val_batches=1).fit(model)
    assert model.lr != 1e-3
    again = Tuned()
    again.lr = model.lr
    seed_everything(0, verbose=False)
    trainer(COMBINATIONS[name](RAMP), limit_val_batches=1).fit(again)
    assert differences(dict(again.state_dict()), dict(model.state_dict())) == []
    assert differences(latents(again), latents(model)) == []
    assert differences(sidecars(again), sidecars(model)) == []
    assert to_bytes(again)[0] == to_bytes(model)[0]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["ternary_movement", "separable_lsq", "deep"])
def test_activation_checkpointing(name, reentrant):
    """A second forward within the backward changes nothing that is trained."""

    class Checkpointed(Net):
        def forward(self, inputs):
            return checkpoint(self.net, inputs.requires_grad_(self.training), use_reentrant=reentrant)

    plain, _ = fit(COMBINATIONS[name](RAMP), Net("sgd"), limit_val_batches=0)
    model, _ = fit(COMBINATIONS[name](RAMP), Checkpointed("sgd"), limit_val_batches=0)
    parameters = [dict(net.named_parameters()) for net in (plain, model)]
    assert differences(*parameters) == []  # BatchNorm's statistics see each batch twice
    assert differences(latents(plain), latents(model)) == []
    assert differences(sidecars(plain), sidecars(model)) == []


def test_channels_last(tmp_path):
    """A slot's arithmetic does not depend on the layout."""
    striped = Net("sgd").to(memory_format=torch.channels_last)
    fit(COMBINATIONS["ternary_movement"](RAMP), striped)
    is_its_file(striped, tmp_path, torch.channels_last)


@pytest.mark.parametrize("name", ["ternary_movement", "float", "deep"])
def test_channels_last_with_a_depthwise_convolution(name):
    """Its one input channel has strides that may be anything: (9, 9, 3, 1) of a weight is (9, 1, 3, 1) of its gradient."""

    class Depthwise(Net):
        def __init__(self):
            super().__init__("sgd")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                self.net[3] = nn.Conv2d(8, 8, 3, groups=8)

    striped, plain = Depthwise().to(memory_format=torch.channels_last), Depthwise()
    for model in (striped, plain):
        fit(COMBINATIONS[name]("constant"), model, max_steps=2, limit_val_batches=0)
    assert len(list(slotted(striped))) == 3
    for (key, one), other in zip(latents(striped).items(), latents(plain).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=key)
