"""ActivationQuantization in a run: what is rounded from when on, and what stays as it is."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from training import INPUTS, LABELS, QUIET, Loader, Net, differences, fit, slotted, trainer

from psc_lightning import (
    ActivationQuantization,
    MaskLearning,
    StraightThroughQuantization,
    attach,
    compress,
    detach,
    load_into,
    plan,
    preset,
    save,
)
from psc_lightning.activations import Grid, of
from psc_lightning.slots.live import hand_back

pytestmark = QUIET


def rounding(bits: int = 8, **options) -> list[Callback]:
    """Of weights and of inputs."""
    options = {"schedule": "constant", **options}
    return [StraightThroughQuantization("uniform", bits=7, **options), ActivationQuantization(bits, **options)]


def grid_of(model: nn.Module, layer: str) -> Grid | None:
    found = of(model.get_submodule(layer))
    assert found is not None
    return found.grid()


def inputs_of(model: nn.Module, *layers: str) -> dict[str, torch.Tensor]:
    """What layers compute with, in eval."""
    found, hooks = {}, []
    for name in layers:
        layer = model.get_submodule(name)
        hooks.append(layer.register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]})))
    with torch.no_grad():
        model.eval()(INPUTS)
    for hook in hooks:
        hook.remove()
    return found


def test_a_layer_computes_with_rounded_inputs():
    model, _ = fit(rounding(targets=["net.3", "net.7"]))
    found = inputs_of(model, "net.0", "net.3", "net.7")
    assert found["net.0"].unique().numel() > 1000
    for name in ("net.3", "net.7"):
        grid = grid_of(model, name)
        codes = found[name] / grid.scale + grid.zero
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert 16 < codes.round().unique().numel() <= 256
        assert codes.min() >= 0
        assert codes.max() <= 255.001


def test_few_bits_are_few_numbers():
    model, _ = fit(rounding(3))
    for values in inputs_of(model, "net.0", "net.3", "net.7").values():
        assert 4 < values.unique().numel() <= 8


def test_the_range_is_that_of_training_batches_only():
    """Neither validation nor what the user computes between two steps counts."""

    class Look(Callback):
        def on_validation_batch_start(self, made, model, batch, *args):
            batch[0].mul_(1)
            model(1000 * INPUTS)

    model, _ = fit([*rounding(), Look()], val_check_interval=3)
    model.train()(1000 * INPUTS)
    low, high = INPUTS.aminmax()
    grid = grid_of(model, "net.0")
    assert low <= grid.low < 0 < grid.high <= high + grid.scale


def test_inputs_are_rounded_from_where_the_levels_begin():
    counts = []

    class Look(Callback):
        def on_validation_start(self, made, model):
            counts.append((made.global_step, inputs_of(model, "net.3")["net.3"].unique().numel() <= 256))

    fit([*rounding(schedule={"kind": "linear", "begin": 10, "end": 20}), Look()], val_check_interval=4)
    assert counts == [(step, step > 10) for step in (4, 8, 12, 16, 20, 24)]


def test_training_learns_through_the_rounding():
    seen = []

    class Look(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            seen.append(loss.item())
            return loss

    fit(rounding(4), Look(steps=120), max_epochs=10)
    assert sum(seen[-12:]) < 0.6 * sum(seen[:12])


def test_what_a_model_becomes(tmp_path):
    """A copy and a pickle round as it does; the file and the plain class hold the weights, and round nothing."""
    model, _ = fit(rounding())
    model.eval()
    with torch.no_grad():
        logits = model(INPUTS)
        copy = deepcopy(model.net)
        assert torch.equal(copy(INPUTS), logits)
        assert torch.equal(pickle.loads(pickle.dumps(model.net))(INPUTS), logits)
        save(model, tmp_path / "model.psc")
        plain = Net()
        load_into(plain, tmp_path / "model.psc")
        detach(copy)
        assert torch.equal(copy(INPUTS), plain.eval()(INPUTS))
        assert not torch.equal(copy(INPUTS), logits)
    assert not any(layer._forward_pre_hooks or layer._forward_pre_hooks_with_kwargs for layer in copy)
    assert not any(layer._forward_hooks for layer in copy)


def test_an_input_given_by_name_is_rounded_too():
    model, _ = fit(rounding(targets="net.7"))
    layer, x = model.net[7].eval(), torch.randn(3, 128)
    with torch.no_grad():
        assert torch.equal(layer(input=x), layer(x))
        assert not torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.filterwarnings("ignore:.*enable_nested_tensor")
def test_a_transformer_takes_no_way_around_it():
    """Torch's fast path reads the weights of a layer's parts, and never calls them."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    x = torch.randn(4, 5, 16)
    compress(layer, rounding(2), batches=[x], loss=lambda model, batch: model(batch).square().mean())
    slow = layer.train()(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), slow)
    assert grid_of(layer, "linear1") is not None


def test_compress_sees_inputs_in_batches():
    model = Net()
    with pytest.raises(ValueError, match="rounds inputs that it has seen and needs both"):
        compress(model, rounding())
    assert not list(slotted(model))
    compress(model, rounding(), batches=[INPUTS[:48]], loss=lambda net, batch: net(batch).square().mean())
    assert all(values.unique().numel() <= 256 for values in inputs_of(model, "net.0", "net.3", "net.7").values())
    before = grid_of(model, "net.0")
    model(100 * INPUTS)
    assert grid_of(model, "net.0") == before


def test_an_interrupted_step_leaves_nothing_that_observes():
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("no more")
            return super().training_step(batch, batch_idx)

    model = Fails()
    with pytest.raises(RuntimeError, match="no more"):
        fit(rounding(), model)
    before = grid_of(model, "net.0")
    model.train()(100 * INPUTS)
    assert grid_of(model, "net.0") == before


def test_two_fits_and_other_options():
    callbacks = rounding()
    model, _ = fit(callbacks, max_epochs=1)
    trainer(callbacks, max_epochs=1).fit(model, Loader(), Loader(count=2))
    with pytest.raises(ValueError, match=r"net\.0\.weight: .* with bits=8, this callback has bits=7; call .*detach"):
        trainer(rounding(7), max_epochs=1).fit(model, Loader(), Loader(count=2))


@pytest.mark.parametrize("bits", [1, 9, True, 2.5])
def test_wrong_bits(bits: object):
    with pytest.raises(ValueError, match=r"^bits: expected a whole number from 2 to 8, found"):
        ActivationQuantization(bits)


def test_targets_without_such_an_input_are_refused():
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 16))
    with pytest.raises(
        ValueError, match=r"^targets: only inputs of Linear and Conv layers .* the targets are Embedding"
    ):
        ActivationQuantization(targets="Embedding").attach(model)
    with pytest.raises(ValueError, match=r"^targets: 'head' matches no tensor"):
        ActivationQuantization(targets="head").attach(model)
    assert [name for name, _ in ActivationQuantization().attach(model)] == ["1"]


def test_inputs_that_two_callbacks_round_are_refused():
    model = Net()
    both = [ActivationQuantization(4, targets="net.3"), ActivationQuantization(8, targets="net.*")]
    with pytest.raises(ValueError, match=r"net\.3\.weight: its layer's inputs are rounded by .*net\.3.* and .*net\.\*"):
        plan(model, both)
    with pytest.raises(ValueError, match="keep one"):
        trainer(both, max_epochs=1).fit(model, Loader(), Loader(count=2))


def test_it_goes_without_other_callbacks():
    """The weights stay what the optimizer makes of them; only inputs are rounded."""
    model, _ = fit([ActivationQuantization(3, schedule="constant")])
    assert not list(slotted(model))
    for values in inputs_of(model, "net.0", "net.3", "net.7").values():
        assert 4 < values.unique().numel() <= 8


def test_a_run_that_ends_before_it_begins_says_so():
    with pytest.warns(UserWarning, match="ActivationQuantization never began: training ended at step 12"):
        model, _ = fit([ActivationQuantization(3, schedule={"begin": 100, "end": 101})], max_epochs=1)
    assert inputs_of(model, "net.3")["net.3"].unique().numel() > 1000


def test_compress_and_presets_take_bits_of_inputs():
    assert [type(callback).__name__ for callback in preset("float")] == ["MaskLearning", "StraightThroughQuantization"]
    *_, made = preset("float", activations=4, targets="net.7", schedule="constant")
    assert (made.bits, made.targets, made.schedule.kind) == (4, ["net.7"], "constant")
    with pytest.raises(ValueError, match=r"^bits: expected a whole number from 2 to 8, found 1"):
        preset("binary", activations=1)
    assert [type(callback).__name__ for callback in preset("none", activations=8)] == ["ActivationQuantization"]
    model, batches = Net(), [INPUTS[:48]]
    compress(model, "binary", activations=3, batches=batches, loss=lambda net, x: net(x).mean())
    assert all(values.unique().numel() <= 8 for values in inputs_of(model, "net.0", "net.3", "net.7").values())
    with pytest.raises(ValueError, match="compressed already"):
        compress(model, "binary", activations=3, batches=batches, loss=lambda net, x: net(x).mean())


def test_what_fails_leaves_no_rounding_behind():
    model = Net()
    with pytest.raises(ValueError, match="expected a finite number"):
        compress(model, rounding(), batches=[INPUTS[:48]], loss=lambda net, x: net(x).mean() * float("nan"))
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.modules())


def test_processes_that_are_spawned_are_to_have_it_attached():
    """Before they start; here only asked."""
    model, callback = Net(), ActivationQuantization()
    made = trainer([callback], max_epochs=1, strategy="ddp_spawn", devices=1)
    with pytest.raises(ValueError, match=r"ActivationQuantization: the processes of strategy='ddp_spawn'"):
        callback.setup(made, model, "fit")
    attach(model, callback)
    callback.setup(made, model, "fit")


def test_a_state_dict_carries_it_to_another_process():
    model, callbacks = Net(), [ActivationQuantization(schedule="constant")]
    attach(model, callbacks)
    found = of(model.net[0])
    found.see(INPUTS)
    found.begun = True
    hand_back(model)
    other = Net()
    attach(other, callbacks)
    other.load_state_dict(model.state_dict())
    assert grid_of(other, "net.0") == grid_of(model, "net.0")
    assert [of(other.net[i]).begun for i in (0, 3, 7)] == [True, False, False]


def test_a_tensor_in_an_embedding_and_a_linear_layer():
    """One weight, and a range for the layer that multiplies by it."""
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32))
    model[1].weight = model[0].weight
    words = torch.arange(32)
    compress(model, rounding(), batches=[words], loss=lambda net, batch: net(batch).square().mean())
    with torch.no_grad():
        assert torch.equal(model[0](words), model[0].weight)
        assert not torch.equal(model(words), nn.functional.linear(model[0](words), model[1].weight, model[1].bias))


def test_it_goes_with_other_slots_in_any_order():
    first, _ = fit([*rounding(), MaskLearning(threshold=0.3, schedule="constant")])
    second, _ = fit([MaskLearning(threshold=0.3, schedule="constant"), *reversed(rounding())])
    assert differences(first.state_dict(), second.state_dict()) == []
    for (_, one, _), (_, other, _) in zip(slotted(first), slotted(second), strict=True):
        assert differences(dict(one.state_dict()), dict(other.state_dict())) == []
    assert nn.functional.cross_entropy(first(INPUTS), LABELS).isfinite()


def test_a_layer_with_two_inputs_has_a_range_of_both():
    """Called twice in a forward, with inputs a hundred times as wide the second time, or the first."""

    class Shared(Net):
        def __init__(self, wide_first):
            super().__init__("sgd")
            self.wide_first = wide_first
            self.shared = nn.Linear(72, 4)

        def training_step(self, batch, batch_idx):
            x = batch[0].flatten(1)
            first, second = (100 * x, x) if self.wide_first else (x, 100 * x)
            return nn.functional.cross_entropy((self.shared(first) + self.shared(second)) / 100, batch[1])

    found = []
    for wide_first in (True, False):
        model, _ = fit(rounding(targets="shared"), Shared(wide_first), max_steps=6, limit_val_batches=0)
        grid = grid_of(model, "shared")
        seen = torch.stack([100 * INPUTS[i : i + 8] for i in range(0, 48, 8)]).flatten(1)
        low, high = seen.amin(1), seen.amax(1)
        for bound, each in ((grid.low, low), (grid.high, high)):
            average = each[0]
            for one in each[1:]:
                average = average.lerp(one, 0.1)
            assert bound == pytest.approx(float(average), abs=grid.scale)
        found.append(grid)
    assert found[0] == found[1]
