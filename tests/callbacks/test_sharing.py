"""WeightSharing in a run: what is tied, when, by which label."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from training import QUIET, Net, Shown, differences, fit, latents, slotted

from psc_lightning import MaskLearning, WeightSharing
from psc_lightning.slots.live import compressed

pytestmark = QUIET

TYINGS = ("cross_channel", "row", "column", "separable", "low_rank")


def sharing(method, begin=0, **options):
    options = {"labels": "magnitude", **options} if method == "cross_channel" else options
    return WeightSharing(method, schedule={"kind": "constant", "begin": begin}, targets="net.3", **options)


def test_cross_channel_keeps_what_its_labels_choose():
    """At each position the member with the largest Σ|g·w| of the first steps is the bank's, whatever its size."""
    labels, weights = [], []

    class Look(Callback):
        def on_before_optimizer_step(self, made, model, optimizer):
            weight = model.net[3].weight
            labels.append((weight.grad * weight).abs().detach())

    class Record(Net):
        def training_step(self, batch, batch_idx):
            weights.append(self.net[3].weight.detach().clone().reshape(8, 2, 4, 3, 3))
            return super().training_step(batch, batch_idx)

    callback = WeightSharing("cross_channel", groups=2, calibration_steps=5, schedule="constant", targets="net.3")
    fit([Look(), callback], Record("sgd"), max_steps=6)
    dense, _ = fit((), Net("sgd"), max_steps=5)
    before = dense.net[3].weight.detach().reshape(8, 2, 4, 3, 3)
    chosen = before.gather(1, sum(labels[:5]).reshape(8, 2, 4, 3, 3).argmax(1, keepdim=True))
    assert torch.equal(weights[5], chosen.expand(-1, 2, -1, -1, -1))
    magnitude = before.gather(1, before.abs().argmax(1, keepdim=True))
    assert 0.1 < (chosen != magnitude).float().mean() < 0.9  # labels and sizes choose differently


@pytest.mark.parametrize("method", TYINGS)
def test_it_begins_at_its_begin_and_overwrites_the_weight(method):
    """Dense and plain before, tied from the first forward at `begin`, which the latent weight is too."""
    plain, tied = [], []

    class Record(Net):
        def training_step(self, batch, batch_idx):
            recorded = plain if not any(slots.begun for _, slots, _ in slotted(self)) else tied
            recorded.append(self.net[3].weight.detach().clone())
            if len(tied) == 1:
                torch.testing.assert_close(latents(self)["net.3.weight"], tied[0], rtol=1e-5, atol=1e-6)
            return super().training_step(batch, batch_idx)

    model, _ = fit([sharing(method, begin=6)], Record("sgd"))
    assert (len(plain), len(tied)) == (6, 18)
    before, _ = fit((), Net("sgd"), max_steps=5)
    assert differences(before.net[3].weight, plain[5]) == []
    ((_, slots, weight),) = slotted(model)
    with torch.no_grad():
        for value in tied:
            matrix = slots.layout.matrix(value)
            if method in ("separable", "low_rank"):
                flat = matrix.transpose(0, 1).reshape(8, 8, 9) if method == "separable" else matrix.reshape(1, 8, 72)
                assert all(int(torch.linalg.matrix_rank(part.double(), rtol=1e-5)) <= slots.tying.rank for part in flat)
            else:
                torch.testing.assert_close(slots.tying.expand(slots.tying.reduce(matrix)), matrix, rtol=1e-6, atol=1e-8)
    assert sum(torch.Size(shape).numel() for shape in slots.core_shapes().values()) < weight.numel()


@pytest.mark.parametrize("method", ["row", "column", "cross_channel"])
def test_a_step_is_the_projected_step_of_the_dense_run(method):
    """Every member gets the mean of the members' gradients: one SGD step is the projection of the dense one."""
    grads = []

    class Look(Net):
        def configure_optimizers(self):
            return Shown(self.parameters(), lambda _: grads.append(self.net[3].weight.grad.clone()))

    class Dense(Look):
        """The same network with the tied weight written into it."""

        def on_train_start(self):
            self.net[3].weight.data.copy_(start)

    twin = Net()
    callback = sharing(method)
    callback.attach(twin)
    ((_, tensor, weight),) = compressed(twin)
    tensor.harden(weight)
    slots, start = tensor.slots, weight.detach().clone()
    fit([callback.__class__(method, schedule="constant", targets="net.3", **callback.options)], Look(), max_steps=1)
    fit([], Dense(), max_steps=1)
    tied, dense = grads
    with torch.no_grad():
        projected = slots.tying.expand(slots.tying.reduce(dense))
    torch.testing.assert_close(tied, projected, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(dense, projected, rtol=1e-2)


@pytest.mark.parametrize("method", ["separable", "low_rank"])
def test_factors_are_trained_and_the_weight_is_not(method):
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, made, model, *args):
            ((name, slots, _),) = slotted(model)
            seen.append((latents(model)[name], [p.detach().clone() for p in slots.sidecars("tying")]))

    callback = sharing(method, begin=4)
    model, _ = fit([callback, Look()], Net("sgd"))
    weights, factors = zip(*seen)
    assert all(not factor.any() for factor in factors[3])  # not yet filled
    assert all(torch.equal(weights[4], weight) for weight in weights[4:])
    assert all(not torch.equal(a, b) for a, b in zip(factors[4], factors[23]))
    assert all(p.requires_grad for p in model.parameters())


def test_the_best_approximation_is_the_start():
    """The first tied forward is the singular value decomposition's, the nearest of its rank."""
    first = []

    class Record(Net):
        def training_step(self, batch, batch_idx):
            first.append(self.net[3].weight.detach().clone())
            return super().training_step(batch, batch_idx)

    weight = Net("sgd").net[3].weight.detach()
    fit([sharing("low_rank", rank=2)], Record("sgd"), max_steps=1)
    u, s, v = torch.linalg.svd(weight.reshape(8, 72).double(), full_matrices=False)
    best = (u[:, :2] * s[:2]) @ v[:2]
    torch.testing.assert_close(first[0].reshape(8, 72).double(), best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "taken"), [("separable", ["net.0", "net.3"]), ("cross_channel", ["net.0", "net.3", "net.7"])]
)
@pytest.mark.filterwarnings("ignore:.*never began")
def test_where_it_does_not_apply_it_is_left_out_and_other_slots_are_not(method, taken):
    callbacks = [WeightSharing(method, schedule="constant"), MaskLearning(threshold=0.5, schedule="constant")]
    model, _ = fit(callbacks, max_steps=1)
    tied = [name for name, slots, _ in slotted(model) if "tying" in slots.specs]
    assert tied == [f"{name}.weight" for name in taken]
    assert [name for name, slots, _ in slotted(model) if "mask" in slots.specs] == [
        f"net.{i}.weight" for i in (0, 3, 7)
    ]
    left = callbacks[0].choose(Net()).skipped
    assert ("net.7.weight" in left) == (method == "separable")


def test_a_tying_after_another_slot_has_begun_is_refused():
    model, _ = fit([MaskLearning(threshold=0.5, schedule="constant")], max_steps=2)
    with pytest.raises(ValueError, match=r"net\.0\.weight: WeightSharing.* tie first, or detach"):
        fit([WeightSharing("row", schedule="constant")], model)


def test_no_soft_phase():
    """A tying is there or it is not, whatever the schedule's kind."""
    phases = []

    class Record(Net):
        def training_step(self, batch, batch_idx):
            phases.append(next(slotted(self))[1].phase[0])
            return super().training_step(batch, batch_idx)

    callback = WeightSharing("row", schedule={"kind": "cubic", "begin": 3, "end": 20})
    fit([callback], Record())
    assert set(phases) == {0, 2}
    assert phases.index(2) in (3, 4)
