"""StraightThroughQuantization in a run: counts of levels, the blend of the ramp, what is trained beside the weights."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from training import QUIET, Net, Shown, fit, latents, slots_at

from psc_lightning import MaskLearning, StraightThroughQuantization
from psc_lightning.slots.live import compressed

pytestmark = QUIET


@pytest.mark.parametrize(
    ("levels", "options", "most"),
    [
        ("binary", {}, 2),
        ("binary", {"form": "01"}, 2),
        ("ternary", {}, 3),
        ("ttq", {}, 3),
        ("uniform", {"bits": 1}, 2),
        ("uniform", {"bits": 3}, 7),
        ("uniform", {"bits": 3, "learned_step": True}, 7),
        ("uniform", {}, 255),
        ("log", {"bits": 3}, 8),
        ("log", {"bits": 4, "root": 2}, 16),
        ("codebook", {"k": 5, "group": "channel"}, 5),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_each_group_has_so_many_levels(levels, options, most, masked):
    callbacks = [StraightThroughQuantization(levels, schedule="constant", **options)]
    if masked:
        callbacks.append(MaskLearning(threshold=0.4, schedule="constant"))
    model, _ = fit(callbacks, max_steps=8)
    for index, rows in ((0, 8), (3, 8), (7, 4)):
        weight = model.net[index].weight.detach().reshape(rows, -1)
        for row in weight:
            values = row[row != 0].unique() if masked else row.unique()
            assert 1 < values.numel() <= most or (masked and values.numel() == 1)
        if levels == "log":
            exponents = weight[weight != 0].abs().log2() * options.get("root", 1)
            torch.testing.assert_close(exponents, exponents.round(), rtol=0, atol=1e-4)
        if masked:
            assert int(weight.eq(0).sum()) >= int(0.4 * weight.numel() + 0.5)
        if levels == "binary" and not options and not masked:
            assert torch.equal(weight.abs(), weight.abs()[:, :1].expand_as(weight))


@pytest.mark.parametrize("levels", ["float16", "bfloat16"])
def test_halves_are_the_casts(levels):
    model, _ = fit([StraightThroughQuantization(levels, schedule="constant")], max_steps=3)
    dtype, dense = getattr(torch, levels), latents(model)
    for name, tensor, weight in compressed(model):
        assert torch.equal(weight, dense[name].to(dtype).to(weight.dtype))
        assert not torch.equal(weight, tensor.latent)


def test_a_ramp_blends():
    """In a training step the weight is hard + (1 - strength)·(latent - hard)."""
    found = []

    class Look(Net):
        def training_step(self, batch, batch_idx):
            ((_, tensor, weight),) = compressed(self)
            if tensor.slots.phase[2]:
                latent = tensor.dense(weight).clone()
                hard = tensor.slots.cores["core"].levels.hard(latent)
                strength = callback.schedule.strength(self.trainer.global_step, 24)
                found.append((strength, weight.detach().clone(), hard, latent))
            return super().training_step(batch, batch_idx)

    callback = StraightThroughQuantization(
        "ternary", targets="net.3", schedule={"kind": "linear", "begin": 2, "end": 12}
    )
    fit([callback], Look("sgd"))
    assert [strength for strength, *_ in found][:3] == pytest.approx([0.1, 0.2, 0.3])
    for strength, value, hard, latent in found:
        torch.testing.assert_close(value, hard + (1 - strength) * (latent - hard), rtol=1e-5, atol=1e-7)
    assert torch.equal(found[-1][1], found[-1][2])


def test_the_gradient_passes_straight_through():
    """The gradient that an optimizer is given, with the latent weight, is the one at the levels."""
    gradients, weights = [], []

    class Look(Net):
        def configure_optimizers(self):
            return Shown(self.parameters(), self.look)

        def look(self, optimizer):
            gradients.append(self.net[3].weight.grad.clone())
            weights.append(self.net[3].weight.detach().clone())

    class Dense(Look):
        def on_train_start(self):
            self.net[3].weight.data.copy_(start)

    model, _ = fit([StraightThroughQuantization("binary", targets="net.3", schedule="constant")], max_steps=0)
    ((_, tensor, weight),) = compressed(model)
    tensor.harden(weight)
    start = weight.detach().clone()
    fit([StraightThroughQuantization("binary", targets="net.3", schedule="constant")], Look(), max_steps=1)
    fit([], Dense(), max_steps=1)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(weights[0], Net().net[3].weight)
    assert torch.equal(weights[1], start)


@pytest.mark.parametrize(("options", "name"), [({"levels": "codebook", "k": 4}, "centroids"),
                                               ({"levels": "ttq"}, "sizes"),
                                               ({"levels": "uniform", "bits": 4, "learned_step": True}, "step")])  # fmt: skip
@pytest.mark.parametrize("step_lr", [0.0, 1e-3, 1e-2])
def test_steps_and_centroids_learn_at_their_own_rate(options, name, step_lr):
    """AdamW's first step is ± the learning rate (in the units of the sidecar), whatever the gradient."""
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, made, model, *args):
            seen.append(getattr(slots_at(model, "net.3.weight").cores["core"].levels, name).detach().clone())

    class Begin(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                seen.append(getattr(slots_at(self, "net.3.weight").cores["core"].levels, name).detach().clone())
            return super().training_step(batch, batch_idx)

    fit(
        [StraightThroughQuantization(**options, step_lr=step_lr, schedule="constant"), Look()],
        Begin("sgd"),
        max_steps=1,
    )
    before, after = seen
    torch.testing.assert_close((after - before).abs(), torch.full_like(before, step_lr), rtol=1e-3, atol=1e-6)


def test_levels_wait_for_nothing_but_their_begin():
    """Until `begin` the weight is dense, from it on it has its levels, at validation too."""
    counts = []

    class Look(Callback):
        def on_validation_batch_end(self, made, model, *args):
            counts.append((made.global_step, model.net[3].weight[0].unique().numel()))

    callback = StraightThroughQuantization("ternary", schedule={"kind": "linear", "begin": 10, "end": 20})
    fit([callback, Look()], val_check_interval=4, limit_val_batches=1)
    assert [(step, count <= 3) for step, count in counts] == [(step, step > 10) for step in (4, 8, 12, 16, 20, 24)]
