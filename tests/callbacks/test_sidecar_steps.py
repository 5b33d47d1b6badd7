"""What is trained beside the weights learns from the steps, and from the losses, that the weights learn from."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from training import COMBINATIONS, QUIET, CpuScaler, Net, conductor, fit, latents, slotted

from psc_lightning import GradientClipping, MaskLearning, WeightSharing, load, save

pytestmark = QUIET

M, W = MaskLearning, WeightSharing


def steps_of(made):
    """How often each sidecar was stepped."""
    return {int(state["step"]) for state in conductor(made).cast.sidecars.optimizer.state.values()}


def totals_of(model):
    """The labels that each tensor has collected."""
    return [
        buffer for _, slots, _ in slotted(model) for name, buffer in slots.named_buffers() if name.endswith("total")
    ]


class Scaled(Net):
    """A parameter far from any sidecar, whose gradient overflows in one batch: the scaler skips the whole step."""

    def __init__(self, fused=False):
        super().__init__()
        self.extra, self.fused = nn.Parameter(torch.zeros(1)), fused

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.extra.sum() * (float("inf") if batch_idx == 3 else 0.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, fused=self.fused)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
@pytest.mark.parametrize("others", [[], [lambda: GradientClipping(max_value=0.1)], ["fused"]])
def test_a_step_that_the_scaler_skips_is_skipped_beside_the_weights_too(others):
    """Also where clipping by value has hidden the overflow by then, or a fused optimizer looks for it itself."""
    callback = M("movement", schedule="constant")
    fused = others == ["fused"]
    extra = [] if fused else [make() for make in others]
    model, made = fit([callback, *extra], Scaled(fused), max_epochs=1, limit_val_batches=0, plugins=[CpuScaler()])
    assert steps_of(made) == {11}
    assert all(parameter.isfinite().all() for parameter in model.parameters())


class Twice(Net):
    """Two losses, each with a step of its own, in one batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for factor in (1.0, 2.0):
            optimizer.zero_grad()
            self.manual_backward(factor * nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()


class Steps(Callback):
    """The gradient that each step of the sidecars takes."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, made, model):
        conductor(made).cast.sidecars.optimizer.register_step_pre_hook(self.look)

    def look(self, optimizer, *args):
        grads = [p.grad for p in optimizer.param_groups[0]["params"]]
        self.seen.append([None if grad is None else grad.clone() for grad in grads])


def test_two_scaled_steps_in_a_batch_are_brought_back_each():
    runs = []
    for plugins in ([], [CpuScaler()]):
        callback = M("movement", schedule="constant")
        steps = Steps()
        fit([callback, steps], Twice(), max_epochs=1, limit_val_batches=0, plugins=plugins)
        assert len(steps.seen) == 24
        runs.append(steps.seen)
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-6)


class Adversaries(Net):
    """Two networks, one loss and its opposite, as in Lightning's example of a GAN."""

    def __init__(self, second=-1.0):
        super().__init__()
        self.automatic_optimization, self.second = False, second
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(72, 72), nn.ReLU(), nn.Linear(72, 72))

    def configure_optimizers(self):
        return torch.optim.SGD(self.net[0].parameters(), 0.0), torch.optim.SGD(self.net[2].parameters(), 0.0)

    def training_step(self, batch, batch_idx):
        for optimizer, factor in zip(self.optimizers(), (1.0, self.second)):
            self.toggle_optimizer(optimizer)
            loss = factor * self.net(batch[0].flatten(1)).square().mean()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def validation_step(self, batch, batch_idx):
        pass


@pytest.mark.parametrize("plugins", [list, lambda: [CpuScaler()]])
def test_each_networks_sidecars_learn_from_its_own_loss(plugins):
    """Nothing moves (rate 0), so that the two gradients are those of one pass over one loss and its opposite."""
    both = []
    for second in (-1.0, 0.0):
        callback = M("movement", score_lr=0.0, schedule="constant")
        steps = Steps()
        fit([callback, steps], Adversaries(second), max_epochs=1, limit_val_batches=0, plugins=plugins())
        both.append(steps.seen)
        assert len(steps.seen) == 24
        assert [[grad is None for grad in grads] for grads in steps.seen] == [[False, True], [True, False]] * 12
    for (first, _), (alone, _) in zip(both[0][::2], both[1][::2]):
        assert first.abs().max() > 0
        torch.testing.assert_close(first, alone, rtol=1e-4, atol=1e-7)
    for (_, second), (_, none) in zip(both[0][1::2], both[1][1::2]):
        assert second.abs().max() > 0
        assert not none.any()


def test_sidecars_of_weights_frozen_for_good_learn_beside_two_optimizers():
    """Although an optimizer holds the weight: that it is frozen now is no toggling."""
    model = Adversaries(second=2.0)
    model.net[2].weight.requires_grad_(False)
    callback = M("movement", schedule="constant", targets="net.*")
    before = model.net[2].weight.clone()
    _, made = fit([callback], model, max_epochs=1, limit_val_batches=0)
    learned = conductor(made).cast.sidecars.parameters
    assert len(learned) == 2
    assert all(p.detach().any() for p in learned)
    assert not model.net[2].weight.requires_grad
    assert torch.equal(before, latents(model)["net.2.weight"])


@pytest.mark.parametrize("first", [True, False])
def test_labels_of_trained_factors_are_unscaled_whatever_the_order(first):
    """A saliency reads the gradients of low-rank factors, which another of our callbacks trains."""
    totals = []
    for plugins in ([], [CpuScaler()]):
        ours = [M("saliency", calibration_steps=3, schedule="constant"), W("low_rank", schedule="constant")]
        model, _ = fit(ours if first else ours[::-1], Net("sgd"), max_steps=4, limit_val_batches=0, plugins=plugins)
        totals.append(totals_of(model))
    assert totals[0]
    assert all(total.any() for total in totals[0])
    torch.testing.assert_close(*totals, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("callback", [M("saliency", calibration_steps=5, schedule="constant"),
                                      W("cross_channel", calibration_steps=5, schedule="constant")])  # fmt: skip
@pytest.mark.parametrize(("plugins", "others"), [(list, []), (lambda: [CpuScaler()], []),
                                                 (lambda: [CpuScaler()], [GradientClipping(max_value=0.1)])])  # fmt: skip
def test_a_step_whose_gradient_is_not_finite_has_no_label(callback, plugins, others):
    """The scaler, or the optimizer itself, skips it, clipping by value may have hidden it; the others' labels count."""
    totals = []

    class Guarded(torch.optim.SGD):
        def step(self, closure=None):
            loss = closure()
            if all(p.grad.isfinite().all() for group in self.param_groups for p in group["params"]):
                super().step()
            return loss

    class Bad(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 1 else 1.0)

        def configure_optimizers(self):
            return Guarded(self.parameters(), 0.05) if not plugins() else super().configure_optimizers()

    class Look(Callback):
        def on_train_batch_end(self, made, model, *args):
            totals.append([total.clone() for total in totals_of(model)])
            assert all(parameter.isfinite().all() for parameter in model.parameters())

    fit([*others, callback, Look()], Bad("sgd"), max_steps=7, limit_val_batches=0, plugins=plugins())
    for before, bad, after in zip(*totals[:3]):
        assert before.any()
        assert torch.equal(bad, before)
        assert after.isfinite().all()
        assert (after >= bad).all()
        assert not torch.equal(after, bad)


def test_labels_are_of_the_loss_that_an_optimizer_steps_for():
    """What `toggle_optimizer` leaves out keeps the gradient of an older loss, which is no label of this one."""
    labels, totals = {}, {}

    class Look(Callback):
        def on_before_optimizer_step(self, made, model, optimizer):
            for index, layer in ((0, model.net[0]), (2, model.net[2])):
                weight = layer.weight
                if made.global_step < 10 and any(weight is p for p in optimizer.param_groups[0]["params"]):
                    labels[index] = labels.get(index, 0) + (weight.grad * weight).abs().detach()

        def on_train_batch_end(self, made, model, *args):
            totals.update(zip((0, 2), totals_of(model), strict=True))

    callback = M("saliency", calibration_steps=10, schedule="constant")
    fit([callback, Look()], Adversaries(second=2.0), max_steps=12, limit_val_batches=0)
    for index in (0, 2):
        torch.testing.assert_close(totals[index], labels[index], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("factors", "steps"), [({0: 1, 1: 3}, 16), ({0: 3, 1: 1}, 16), ({0: 2, 1: 4}, 9)])
@pytest.mark.parametrize("limit", [-1, 8])
def test_a_ramp_ends_with_training_whatever_accumulates_when(factors, steps, limit):
    steps = steps if limit < 0 else limit
    strengths = []

    class Strengths(Callback):
        def on_train_batch_start(self, made, model, *args):
            strengths.append(float(next(slots for _, slots, _ in slotted(model)).strength[1]))

    callback = M(schedule={"kind": "linear", "begin": 0.1, "end": 0.7})
    others = [Strengths(), GradientAccumulationScheduler(factors)]
    made = fit([callback, *others], Net("sgd"), max_steps=limit, limit_val_batches=0)[1]
    assert made.global_step == conductor(made).cast.total == steps
    assert strengths[-1] == 1


@pytest.mark.parametrize("rate", [0.0, 1e-3, 1e-2])
def test_factors_are_stepped_at_their_own_rate(rate):
    """AdamW's first step is the rate, whatever the gradient: of the factors' rate, not of the weights'."""
    before, after = [], []

    class Factors(Callback):
        def on_before_optimizer_step(self, made, model, optimizer):
            before.append([p.detach().clone() for p in conductor(made).cast.sidecars.parameters])

        def on_train_batch_end(self, made, model, *args):
            after.append([p.detach().clone() for p in conductor(made).cast.sidecars.parameters])

    class Alive(Net):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

    callback = W("low_rank", factor_lr=rate, schedule="constant")
    fit([Factors(), callback, Factors()], Alive(), max_steps=1, limit_val_batches=0)
    steps = torch.cat([(old - new).abs().flatten() for old, new in zip(before[0], after[-1])])
    assert steps.numel() > 100
    assert steps.max().item() == pytest.approx(rate, rel=1e-3, abs=1e-9)
    assert steps.median().item() == pytest.approx(rate, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("name", ["separable_lsq", "deep", "cross_channel", "saliency", "low_rank"])
def test_a_model_trained_in_real_fp16_is_what_its_file_holds(name, tmp_path):
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    ramp = {"kind": "linear", "begin": 4, "end": 12}
    model, _ = fit(COMBINATIONS[name](ramp), Net("sgd"), plugins=[scaled])
    save(model, tmp_path / "model.psc")
    state = load(tmp_path / "model.psc")
    assert all(torch.equal(state[name], weight) for name, _, weight in slotted(model))
    assert all(value.isfinite().all() for value in state.values())
