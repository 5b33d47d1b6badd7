"""A teacher pulls on the output; the loss stays the user's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies.strategy import _ForwardRedirection
from torch import nn
from training import INPUTS, LABELS, QUIET, CpuScaler, Net, Shown, fit, layers

from psc_lightning import Distillation, StraightThroughQuantization

pytestmark = QUIET


class Watched(Net):
    """Plain gradient descent, and a look at what it steps."""

    def __init__(self, found):
        super().__init__()
        self.found = found
        self.net[1] = nn.Identity()

    def configure_optimizers(self):
        return Shown(self.parameters(), self.look)

    def look(self, optimizer):
        self.found.append(
            [p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        )


def teacher():
    torch.manual_seed(7)
    made = layers()
    made[1] = nn.Identity()
    return made


def first_gradients(*callbacks, **options):
    found = []
    model, made = fit(callbacks, Watched(found), max_epochs=1, limit_val_batches=0, **options)
    return found[0], dict(made.callback_metrics), model


def by_hand(teach, batches, weight=0.25, temperature=2.0):
    """The gradients of (1 - weight) · cross entropy + weight · T² · KL, mean over batches."""
    model = Watched([])
    loss = 0.0
    for start in range(0, 8 * batches, 8):
        logits, target = model.net(INPUTS[start : start + 8]), teach(INPUTS[start : start + 8]).detach()
        soft, own = (target / temperature).softmax(1), (logits / temperature).log_softmax(1)
        distance = temperature**2 * (soft * (soft.log() - own)).sum(1).mean()
        loss = loss + (1 - weight) * F.cross_entropy(logits, LABELS[start : start + 8]) + weight * distance
    (loss / batches).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("output", ["", "net"])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"plugins": CpuScaler}])
def test_the_gradient_is_that_of_both_losses(output, options):
    batches = options.get("accumulate_grad_batches", 1)
    options = {key: value() if callable(value) else value for key, value in options.items()}
    whole = nn.Sequential(teacher()) if output == "" else teacher()
    found, metrics, _ = first_gradients(Distillation(whole, weight=0.25, output=output), **options)
    for mine, expected in zip(found, by_hand(teacher(), batches), strict=True):
        assert torch.allclose(mine, expected, rtol=1e-4, atol=1e-6)
    plain = first_gradients(**{**options, "plugins": CpuScaler()} if "plugins" in options else options)
    assert set(metrics) == set(plain[1])


class Redirected(Watched):
    """Calls its training step by its own forward, as strategies of several processes do."""

    def training_step(self, batch, batch_idx):
        return _ForwardRedirection()(self, self, "own_step", batch, batch_idx)

    def own_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)


def test_a_training_step_that_goes_by_the_forward_is_not_taken_for_it():
    found = []
    fit([Distillation(nn.Sequential(teacher()), weight=0.25)], Redirected(found), max_epochs=1, limit_val_batches=0)
    for mine, expected in zip(found[0], by_hand(teacher(), 1), strict=True):
        assert torch.allclose(mine, expected, rtol=1e-4, atol=1e-6)


def test_the_start_teaches_by_default():
    """At the start it pulls nowhere: the network is its own teacher, and weight 0 is no teacher at all."""
    found, *_ = first_gradients(Distillation(weight=0.25))
    plain, *_ = first_gradients()
    for mine, expected in zip(found, plain, strict=True):
        assert torch.allclose(mine, 0.75 * expected, rtol=1e-4, atol=1e-6)


def test_a_compressed_network_is_taught_by_its_dense_start():
    levels = StraightThroughQuantization("binary", schedule={"kind": "constant"})
    seen = []

    class Watch(Distillation):
        def _distance(self, own, target):
            seen.append(target.clone())
            return super()._distance(own, target)

    start = Net()
    fit([levels, Watch()], Net(), max_epochs=1)
    start.net.eval()
    assert torch.allclose(seen[0], start(INPUTS[:8]).detach(), atol=1e-6)
    assert torch.allclose(seen[-1], start(INPUTS[88:]).detach(), atol=1e-6)


def test_a_checkpoint_teaches(tmp_path):
    other = Watched([])
    other.net = teacher()
    torch.save({"state_dict": other.state_dict()}, tmp_path / "teacher.ckpt")
    by_path, *_ = first_gradients(Distillation(tmp_path / "teacher.ckpt", weight=0.5))
    by_module, *_ = first_gradients(Distillation(nn.Sequential(teacher()), weight=0.5))
    assert all(torch.equal(a, b) for a, b in zip(by_path, by_module, strict=True))


def test_features_are_matched_as_one_says():
    def squared(own, target):
        return ((own - target) ** 2).mean()

    made = Distillation(teacher()[:1], weight=0.5, output="net.0", match=squared)
    found, *_ = first_gradients(made)
    plain, *_ = first_gradients()
    assert not torch.allclose(found[0], plain[0])
    assert torch.equal(found[-1], plain[-1])  # behind the features nothing pulls


def test_nothing_is_left_behind():
    model, _ = fit([Distillation()], max_epochs=1)
    assert not model._forward_hooks
    assert set(model.state_dict()) == set(Net().state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, "temperature: expected"),
        ({"weight": 1.0}, "weight: expected"),
        ({"output": "nett"}, "output: no "),
    ],
)
def test_wrong_values_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit([Distillation(**arguments)], max_epochs=1)
