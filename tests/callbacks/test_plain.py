"""The hooks that make a LightningModule write plain checkpoints: they change nothing else of it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from training import COMBINATIONS, QUIET, Loader, Net, differences, fit, trainer

from psc_lightning import StraightThroughQuantization
from psc_lightning.callbacks.plain import TRAINING_STATE, builds_late, make_plain
from psc_lightning.view import derive, plain_class

pytestmark = QUIET


class Own(Net):
    """A user's own hooks."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = sorted(checkpoint["state_dict"])[:1]
        checkpoint["state_dict"]["net.0.bias"] = checkpoint["state_dict"]["net.0.bias"] + 1

    def on_load_checkpoint(self, checkpoint):
        self.loaded = (checkpoint["mine"], [key for key in checkpoint["state_dict"] if ".psc." in key])


def test_it_is_idempotent_and_bears_the_users_name():
    model = Own()
    make_plain(model)
    derived = type(model)
    make_plain(model)
    assert type(model) is derived is not Own
    assert isinstance(model, Own)
    assert (derived.__name__, derived.__qualname__, derived.__module__) == ("Own", "Own", Own.__module__)
    assert plain_class(derived) is Own
    other = Own()
    make_plain(other)
    assert type(other) is derived  # one class for all instances, so that nothing piles up


def test_hooks_that_the_user_has_not_are_not_overridden():
    """Lightning does other things where `configure_model` is overridden."""
    model = Net()
    make_plain(model)
    assert not is_overridden("configure_model", model)
    assert not is_overridden("setup", model)
    assert not builds_late(type(model), "setup")

    class Late(Net):
        def setup(self, stage):
            pass

    model = Late()
    make_plain(model)
    assert is_overridden("setup", model)
    assert builds_late(type(model), "setup")


def test_the_users_hooks_run_and_see_what_they_always_saw(tmp_path):
    _, made = fit(COMBINATIONS["float"]("constant"), Own())
    made.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert checkpoint["mine"] == ["net.0.bias"]
    assert list(checkpoint["state_dict"]) == list(Net().state_dict())
    again, _ = fit(COMBINATIONS["float"]("constant"), Own(), ckpt=tmp_path / "model.ckpt")
    assert again.loaded[0] == ["net.0.bias"]
    plain = Own.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert plain.loaded == (["net.0.bias"], [])


def test_the_training_state_is_beside_the_weights_not_among_them(tmp_path):
    model, made = fit(COMBINATIONS["ternary_movement"]("constant"))
    made.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    dense = checkpoint[TRAINING_STATE]["net.3.weight"]
    assert torch.equal(dense, model.net[3]._parameters["weight"])
    assert torch.equal(checkpoint["state_dict"]["net.3.weight"], model.net[3].weight)
    assert {key for key in checkpoint[TRAINING_STATE] if ".psc." not in key} == {f"net.{i}.weight" for i in (0, 3, 7)}
    both = {**checkpoint["state_dict"], **checkpoint[TRAINING_STATE]}
    assert differences({key: both[key] for key in model.state_dict()}, dict(model.state_dict())) == []


def test_a_model_without_slots_saves_what_it_always_saved(tmp_path):
    model, made = fit()
    made.save_checkpoint(tmp_path / "plain.ckpt")
    make_plain(model)
    made.save_checkpoint(tmp_path / "ours.ckpt")
    plain, ours = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("plain", "ours"))
    assert ours.pop(TRAINING_STATE) == {}
    assert differences(plain, ours) == []


def test_copies_and_pickles():
    model, _ = fit(COMBINATIONS["cross_channel"]("constant"), max_epochs=1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert differences(dict(model.state_dict()), dict(twin.state_dict())) == []
        assert torch.equal(twin.net[3].weight, model.net[3].weight)


def test_a_body_that_is_cached_per_class():
    """`derive` gives each class one subclass; another base has its own."""
    a, b = torch.nn.Linear(2, 2), torch.nn.Conv1d(1, 1, 1)
    derive(a, _body, 7)
    derive(b, _body, 7)
    assert type(a) is not type(b)
    assert (a.seven, b.seven) == (7, 7)


def _body(base, number):
    return {"seven": number}


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_other_stages_attach_nothing(stage):
    model = Net()
    getattr(trainer([StraightThroughQuantization("binary")]), stage)(model, Loader(count=1), verbose=False)
    assert type(model) is Net
    assert list(model.state_dict()) == list(Net().state_dict())
