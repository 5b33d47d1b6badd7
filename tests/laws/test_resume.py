"""Law 5: a resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from training import QUIET, RUNS, STEERED, CpuScaler, Net, conductor, differences, fit, run_state, slotted

from psc_lightning import detach, export_onnx, save
from psc_lightning.artifact import to_bytes

pytestmark = QUIET

#: Two epochs of twelve batches, two of them to an optimizer step: twelve steps, a step 6 that ends an epoch.
OPTIONS = {"accumulate_grad_batches": 2, "max_epochs": 2}
SCHEDULES = {
    "cubic": {"kind": "cubic", "begin": 0.25, "end": 0.75},
    "linear": {"kind": "linear", "begin": 0.0, "end": 0.5},
    "constant": {"kind": "constant", "begin": 5},
}


def run(name, schedule, folder, resume=None, **options):
    """With a checkpoint of every step, unless it is resumed from one."""
    keep = -1 if resume is None else 0
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=keep)
    callbacks = {**RUNS, **STEERED}[name](SCHEDULES[schedule]) if name != "plain" else []
    return fit([*callbacks, saver], Net(steps=12), ckpt=resume, **{**OPTIONS, **options})


@pytest.mark.parametrize(
    ("name", "schedule", "steps"),
    [
        ("plain", "linear", (2, 6)),
        *((name, "cubic", (2, 6, 8)) for name in RUNS),
        *((name, "linear", (1, 5, 6, 11)) for name in STEERED),
        ("separable_lsq", "constant", (4, 5, 6)),
        ("cross_channel", "linear", (1, 3)),
        ("saliency", "constant", (2, 5)),
        ("ternary_movement", "linear", (1, 11)),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(name, schedule, steps, tmp_path):
    model, made = run(name, schedule, tmp_path / "whole")
    expected, file = run_state(model, made), to_bytes(model)[0]
    assert made.global_step == 12
    for step in steps:
        model, made = run(name, schedule, tmp_path / "resumed", resume=tmp_path / "whole" / f"step={step}.ckpt")
        assert differences(expected, run_state(model, made)) == [], f"from step {step}"
        assert to_bytes(model)[0] == file


class Manual(Net):
    """Two optimizers that step by hand, each for a loss of its own, in turn."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net[:6].parameters(), 1e-2), torch.optim.SGD(self.net[6:].parameters(), 0.05)

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()
            self.untoggle_optimizer(optimizer)


class Overflowing(Net):
    """The scaler skips a step, early in each epoch."""

    def __init__(self):
        super().__init__("sgd")
        self.extra = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.extra.sum() * (float("inf") if batch_idx == 1 else 0.0)


class Keep(Callback):
    """A checkpoint after each of these batches."""

    def __init__(self, folder, batches):
        self.folder, self.batches, self.seen = folder, batches, 0

    def on_train_batch_end(self, made, *args):
        self.seen += 1
        if self.seen in self.batches:
            made.save_checkpoint(self.folder / f"{self.seen}.ckpt")


@pytest.mark.parametrize("name", ["ternary_movement", "separable_lsq", "saliency"])
@pytest.mark.parametrize(("net", "plugins"), [(Manual, list), (Overflowing, lambda: [CpuScaler()])])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_by_hand_and_under_a_scaler(name, net, plugins, tmp_path):
    """With several optimizers, and with steps that are skipped; from among the labels, in the ramp, after an epoch."""

    def run(batches, resume=None):
        ours = [*RUNS[name](SCHEDULES["cubic"]), Keep(tmp_path, batches)]
        return fit(ours, net(), ckpt=resume, plugins=plugins())

    batches = (1, 2, 9, 12)
    model, made = run(batches)
    expected, file = run_state(model, made), to_bytes(model)[0]
    for batch in batches:
        model, made = run((), tmp_path / f"{batch}.ckpt")
        assert differences(expected, run_state(model, made)) == [], f"from batch {batch}"
        assert to_bytes(model)[0] == file


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", ["separable_lsq", "saliency", "integers"])
def test_in_bfloat16(name, precision, tmp_path):
    """Sidecars are float32 in a checkpoint, too, whatever the weights are."""
    model, made = run(name, "cubic", tmp_path / "whole", precision=precision)
    resume = tmp_path / "whole/step=5.ckpt"
    found = run(name, "cubic", tmp_path / "resumed", resume=resume, precision=precision)
    assert differences(run_state(model, made), run_state(*found)) == []
    assert to_bytes(model)[0] == to_bytes(found[0])[0]


@pytest.mark.parametrize("name", ["deep", "separable_lsq", "row", "integers"])
def test_what_is_made_of_a_model_does_not_move_its_run(name, tmp_path):
    """In the ramp and before: a copy that is baked and spoilt, files, graphs."""

    class Uses(Callback):
        exports = 0

        def on_train_batch_end(self, made, model, *args):
            twin = copy.deepcopy(model)
            detach(twin)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.zero_()
            save(model, tmp_path / "model.psc")
            if made.global_step == 7 and name != "integers":  # in either of its two batches: itself, a copy
                net = model.net if self.exports else copy.deepcopy(model.net)
                export_onnx(net, tmp_path / "model.onnx", torch.zeros(1, 2, 6, 6))
                self.exports += 1

    callbacks = [RUNS[name](SCHEDULES["cubic"]) for _ in range(2)]
    untouched = fit(callbacks[0], Net(steps=12), **OPTIONS)
    used = fit([*callbacks[1], Uses()], Net(steps=12), **OPTIONS)
    assert differences(run_state(*untouched), run_state(*used)) == []


@pytest.mark.parametrize("name", ["deep", "separable_lsq", "row", "integers"])
def test_saving_and_validating_do_not_move_a_run(name, tmp_path):
    """The same numbers with a checkpoint and a validation after every step, and with none."""
    model, made = run(name, "cubic", tmp_path, val_check_interval=1)
    callbacks = RUNS[name](SCHEDULES["cubic"])
    bare, other = fit(callbacks, Net(steps=12), limit_val_batches=0, **OPTIONS)
    expected, found = run_state(bare, other), run_state(model, made)
    assert differences(expected["optimizers"], found["optimizers"]) == []
    assert differences(expected["ours"], found["ours"]) == []
    assert to_bytes(bare)[0] == to_bytes(model)[0]


def test_the_total_of_the_first_start_is_kept(tmp_path):
    """A run that is made longer keeps the schedule it began with."""
    callbacks = RUNS["ternary_movement"](SCHEDULES["linear"])
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=4)
    fit([*callbacks, saver], Net("sgd"), **OPTIONS)
    callbacks = RUNS["ternary_movement"](SCHEDULES["linear"])
    _, made = fit(callbacks, Net("sgd"), ckpt=tmp_path / "step=12.ckpt", **{**OPTIONS, "max_epochs": 4})
    assert made.global_step == 24
    assert conductor(made).cast.total == 12


def test_a_plain_checkpoint_is_a_start(tmp_path):
    """Compression may begin from a checkpoint of a run without it; the optimizers go on."""
    run("plain", "linear", tmp_path)
    model, made = run("float", "linear", tmp_path / "ours", resume=tmp_path / "step=3.ckpt")
    assert made.global_step == 12
    assert model.net[3].weight.eq(0).sum() == 288
    steps = [int(state["step"]) for state in made.optimizers[0].state.values()]
    assert set(steps) == {12}


def test_our_checkpoint_goes_on_without_us(tmp_path):
    run("float", "linear", tmp_path)
    model, made = run("plain", "linear", tmp_path / "plain", resume=tmp_path / "step=10.ckpt")
    assert made.global_step == 12
    assert type(model) is Net
    assert not list(slotted(model))
    assert list(model.state_dict()) == list(Net().state_dict())
    assert torch.isfinite(made.callback_metrics["val"])
