"""MaskLearning in a run: counts, the ramp, and labels that find what magnitude cannot."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from training import QUIET, Net, Shown, fit, slots_at, slotted, trainer

from psc_lightning import MaskLearning, StraightThroughQuantization, WeightSharing
from psc_lightning.numerics.functional import zero_count

pytestmark = QUIET


def keep(model, index=3):
    (chain,) = slots_at(model, f"net.{index}.weight").cores.values()
    return chain.mask.keep


# ------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.333, 0.5, 0.999])
@pytest.mark.parametrize("group", ["tensor", "channel", 50])
def test_the_share_is_exact_in_every_group(threshold, group):
    model, _ = fit([MaskLearning(threshold=threshold, group=group, schedule="constant")], max_steps=3)
    flat = keep(model).reshape(-1)
    size = {"tensor": 576, "channel": 72}.get(group, group)
    for part in flat.split(size):
        assert int((~part).sum()) == min(int(threshold * part.numel() + 0.5), part.numel() - 1)
    assert torch.equal(model.net[3].weight.reshape(-1).ne(0) | ~flat, torch.ones(576, dtype=torch.bool))


@pytest.mark.parametrize(("granularity", "zeros"), [("channel", 4 * 72), ("row", 96 * 3), ("column", 72 * 4)])
def test_units_fall_together(granularity, zeros):
    model, _ = fit([MaskLearning(threshold=0.5, granularity=granularity, schedule="constant")], max_steps=5)
    weight = model.net[3].weight
    assert int(weight.eq(0).sum()) == zeros
    units = {
        "channel": weight.reshape(8, 1, 72),
        "row": weight.reshape(192, 1, 3),
        "column": weight.reshape(2, 4, 72).transpose(1, 2),
    }[granularity]
    dropped = units.eq(0)
    assert torch.equal(dropped.all(-1), dropped.any(-1))


@pytest.mark.parametrize("kind", ["linear", "cubic", "cosine"])
def test_a_ramp_scales_the_share(kind):
    """In a training step the share is strength · threshold; whoever looks between steps sees the whole."""
    inside, between = [], []

    class Look(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            inside.append(int(self.net[3].weight.eq(0).sum()))
            return loss

    class After(Callback):
        def on_train_batch_end(self, made, model, *args):
            between.append(int(model.net[3].weight.eq(0).sum()))

    callback = MaskLearning(threshold=0.6, schedule={"kind": kind, "begin": 4, "end": 14})
    fit([callback, After()], Look())
    strengths = [callback.schedule.strength(step, 24) for step in range(24)]
    assert inside == [zero_count(strength * 0.6, 576) for strength in strengths]
    assert inside == sorted(inside)
    assert between == [346 if strength else 0 for strength in strengths]


# ------------------------------------------------------------------------------------------------------- labels


class Planted(LightningModule):
    """Only inputs 0-3 of 16 matter; their weights are right but small. Those of the others are large and see noise.

    Nothing but the labels tells which matter: by size the useless weights win.
    """

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        right = torch.randn(8, 4, generator=generator).sign() * (0.75 + 0.5 * torch.rand(8, 4, generator=generator))
        self.layer = nn.Linear(16, 8, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(torch.randn(8, 16, generator=generator) * 0.2 + 1.5)
            self.layer.weight[:, :4] = 0.1 * right
        inputs = torch.randn(320, 16, generator=generator)
        target = inputs[:, :4] @ right.T
        inputs[:, 4:] *= 1e-3
        self.data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, target), batch_size=8)

    def training_step(self, batch, batch_idx):
        return nn.functional.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize(
    ("method", "options", "found"),
    [
        ("magnitude", {}, 0),
        ("movement", {"score_lr": 0.05}, 32),
        ("saliency", {"calibration_steps": 10}, 32),
        ("saliency", {"calibration_steps": 10, "label": "fisher"}, 32),
    ],
)
def test_labels_find_what_matters_where_magnitude_misses_it(method, options, found):
    model = Planted()
    schedule = {"kind": "constant", "begin": 0}
    callback = MaskLearning(method, threshold=0.75, schedule=schedule, **options)
    trainer([callback], max_epochs=1).fit(model, model.data)
    kept = slots_at(model, "layer.weight").cores["core"].mask.keep
    assert int(kept.sum()) == 32
    assert int(kept[:, :4].sum()) == found


@pytest.mark.parametrize(
    "callback", [MaskLearning("saliency", targets="net.*"), WeightSharing("cross_channel", targets="net.*")]
)
@pytest.mark.filterwarnings("ignore:.*never began")
def test_frozen_weights_without_labels_are_told(callback):
    model = Net()
    model.net[3].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"no labels from frozen weights.*: net\.3\.weight$"):
        fit([callback], model, max_epochs=1)


def test_saliency_counts_the_gradients_of_its_steps():
    """Σ |g·w| over three accumulated, clipped gradients, by hand; the mask begins at the fourth step and stays."""
    labels, masks = [], []

    class Look(Callback):
        def on_before_optimizer_step(self, made, model, optimizer):
            weight = model.net[3].weight
            labels.append((weight.grad * weight).abs().detach().reshape(8, -1).clone())

        def on_train_batch_end(self, made, model, *args):
            masks.append(keep(model).clone())

    callback = MaskLearning("saliency", threshold=0.5, calibration_steps=3, schedule="constant")
    model, _ = fit([callback, Look()], Net("sgd"), accumulate_grad_batches=2, limit_val_batches=0)
    mask = slots_at(model, "net.3.weight").cores["core"].mask
    expected = sum(labels[:3])
    torch.testing.assert_close(mask.total, expected, rtol=1e-6, atol=0)
    kept = torch.zeros(576, dtype=torch.bool)
    kept[expected.reshape(-1).argsort(descending=True)[:288]] = True
    assert all(bool(mask.all()) for mask in masks[:6])
    assert all(torch.equal(mask.reshape(-1), kept) for mask in masks[6:])


@pytest.mark.parametrize("tying", ["cross_channel", "row", "separable"])
def test_saliency_of_a_tied_weight_waits_for_its_cores(tying):
    """Labels of a core can be seen only when there is one: the mask begins that many steps after the tying."""
    options = {"calibration_steps": 4} if tying == "cross_channel" else {}
    begin = {"kind": "constant", "begin": 3}
    callbacks = [
        MaskLearning("saliency", threshold=0.5, calibration_steps=5, schedule="constant", targets="net.3"),
        WeightSharing(tying, schedule=begin, **options, targets="net.3"),
    ]
    phases = []

    class Look(Callback):
        def on_train_batch_end(self, made, model, *args):
            phases.append(tuple(slots_at(model, "net.3.weight").phase[:2]))

    model, _ = fit([*callbacks, Look()])
    tied = 4 if tying == "cross_channel" else 3
    assert phases == [(2 * (step >= tied), 2 * (step >= tied + 5)) for step in range(24)]
    for chain in slots_at(model, "net.3.weight").cores.values():
        assert chain.mask.total.ne(0).any()


def test_movement_scores_learn_from_the_masked_too():
    """A score is moved where its weight is zero as well: what was dropped can come back."""
    first = []

    class Look(Callback):
        def on_train_batch_end(self, made, model, *args):
            first.append(keep(model).clone())

    callback = MaskLearning("movement", threshold=0.5, score_lr=0.05, schedule="constant")
    model, _ = fit([callback, Look()], Net("sgd"))
    scores = slots_at(model, "net.3.weight").cores["core"].mask.scores
    assert scores.ne(0).all()
    assert any(bool((~before & after).any()) for before, after in pairwise(first))


def test_masked_weights_get_no_gradient_from_labels_and_keep_one_from_magnitude():
    """What an optimizer is given: the gradient of the latent weight."""
    seen = {}
    for method in ("movement", "magnitude"):

        class Look(Net):
            def configure_optimizers(self):
                return Shown(self.parameters(), self.look)

            def look(self, optimizer, method=method):
                seen[method] = (self.net[3].weight.grad.reshape(8, -1).clone(), keep(self).clone())

        fit([MaskLearning(method, threshold=0.5, schedule="constant")], Look(), max_steps=1)
    gradient, kept = seen["movement"]
    assert not gradient[~kept.reshape(8, -1)].any()
    gradient, kept = seen["magnitude"]
    assert gradient[~kept.reshape(8, -1)].ne(0).sum() > 250


def test_counts_hold_on_the_cores_of_a_tied_weight():
    callbacks = [
        WeightSharing("cross_channel", groups=2, labels="magnitude", schedule="constant"),
        MaskLearning(threshold=0.3, schedule="constant"),
        StraightThroughQuantization("uniform", bits=4, schedule="constant"),
    ]
    model, _ = fit(callbacks)
    for name, slots, weight in slotted(model):
        (shape,) = slots.core_shapes().values()
        entries = torch.Size(shape).numel()
        zeros = int((~next(iter(slots.cores.values())).mask.keep).sum())
        assert zeros == int(0.3 * entries + 0.5), name
        assert int(weight.eq(0).sum()) >= 2 * zeros
