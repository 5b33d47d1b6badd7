"""What lies in a checkpoint, and what a user's own hooks see of it: plain weights, and one key of ours beside them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from training import (
    COMBINATIONS,
    QUIET,
    RUNS,
    Net,
    conductor,
    differences,
    fit,
    latents,
    run_state,
    sidecars,
    slots_at,
    slotted,
)

from psc_lightning import GradientClipping, MaskLearning, StraightThroughQuantization, detach
from psc_lightning.artifact import to_bytes
from psc_lightning.training.entry import KEY, VERSION

pytestmark = QUIET

Q, M = StraightThroughQuantization, MaskLearning
NAMES = ["net.0.weight", "net.3.weight", "net.7.weight"]
ENTRIES = [144, 576, 512]


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def saved(made: Any, path: Path, weights_only: bool = False) -> dict[str, Any]:
    made.save_checkpoint(path, weights_only=weights_only)
    return read(path)


def tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(tensor_bytes(part) for part in parts)


# ------------------------------------------------------------------------------------------------------- what is there


def test_the_weights_are_hard_and_what_training_needs_is_beside_them(tmp_path):
    model, made = fit(COMBINATIONS["ternary_movement"]("constant"))
    checkpoint = saved(made, tmp_path / "model.ckpt")
    assert list(checkpoint["state_dict"]) == list(Net().state_dict())
    assert differences(dict(checkpoint["state_dict"]), dict(model.state_dict())) == []
    ours, dense = checkpoint[KEY], latents(model)
    assert ours["version"] == VERSION
    assert ours["total_steps"] == 24
    assert ours["base_rate"] == 1e-2  # OneCycleLR's largest
    assert ours["averages"] == []
    assert list(ours["tensors"]) == NAMES
    for name, entry in ours["tensors"].items():
        assert {slot: (spec["method"], spec["options"]) for slot, spec in entry["slots"].items()} == {
            "mask": ("movement", {"threshold": 0.6, "granularity": "element", "group": "tensor"}),
            "levels": ("ternary", {}),
        }
        assert entry["threshold"] == 0.6
        state = entry["state"]
        assert torch.equal(state["latent"], dense[name])
        assert not torch.equal(state["latent"], model.get_parameter(name))
        assert state["strength"].tolist() == [0, 1, 1]
        assert torch.equal(state["cores.core.mask.scores"], sidecars(model)[f"{name}:cores.core.mask.scores"])
    assert differences(ours["optimizer"], conductor(made).cast.sidecars.optimizer.state_dict()) == []
    assert {int(state["step"]) for state in ours["optimizer"]["state"].values()} == {24}


def test_what_follows_from_the_latent_weight_is_not_stored(tmp_path):
    """Of magnitude and levels by magnitude nothing but strengths: masks and scales are computed again."""
    _, made = fit([M("magnitude", threshold=0.5, schedule="constant"), Q("ternary", schedule="constant")])
    for entry in saved(made, tmp_path / "model.ckpt")[KEY]["tensors"].values():
        assert sorted(entry["state"]) == ["latent", "strength"]


@pytest.mark.filterwarnings("ignore:.*never began")
def test_before_a_slot_begins_the_parameter_is_the_latent_weight(tmp_path):
    """No second copy is kept of it, in memory or in a checkpoint."""
    model, made = fit([M("magnitude", schedule={"kind": "constant", "begin": 20})], max_steps=10)
    for entry in saved(made, tmp_path / "model.ckpt")[KEY]["tensors"].values():
        assert sorted(entry["state"]) == ["strength"]
        assert entry["state"]["strength"].tolist() == [0, 0, 0]
    assert all(torch.equal(latent, model.get_parameter(name)) for name, latent in latents(model).items())


@pytest.mark.parametrize("name", RUNS)
def test_a_weights_only_checkpoint_has_the_plain_size(name, tmp_path):
    """To the byte: no sidecar, no dense weight is in it."""
    fit()[1].save_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    _, made = fit(RUNS[name]("constant" if name != "saliency" else {"kind": "constant", "begin": 5}))
    assert KEY not in saved(made, tmp_path / "ours.ckpt", weights_only=True)
    assert (tmp_path / "ours.ckpt").stat().st_size == (tmp_path / "plain.ckpt").stat().st_size


def test_the_size_of_a_whole_checkpoint(tmp_path):
    """By hand: a latent weight is 4 bytes an entry, movement's scores and AdamW's two means of them 12 more."""
    plain = tensor_bytes(saved(fit((), Net("sgd"))[1], tmp_path / "plain.ckpt"))
    strengths = 3 * len(NAMES) * 4
    magnitude = [M("magnitude", schedule="constant"), Q("ternary", schedule="constant")]
    found = tensor_bytes(saved(fit(magnitude, Net("sgd"))[1], tmp_path / "magnitude.ckpt"))
    assert found == plain + 4 * sum(ENTRIES) + strengths
    movement = [M("movement", schedule="constant"), Q("ternary", schedule="constant")]
    found = tensor_bytes(saved(fit(movement, Net("sgd"))[1], tmp_path / "movement.ckpt"))
    steps = 4 * len(NAMES)
    assert found == plain + (4 + 12) * sum(ENTRIES) + strengths + steps


# ------------------------------------------------------------------------------------------------- the user's own hooks


class Own(Net):
    """A user's own hooks."""

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = sorted(checkpoint["state_dict"])[:1]
        checkpoint["state_dict"]["net.0.bias"] = checkpoint["state_dict"]["net.0.bias"] + 1

    def on_load_checkpoint(self, checkpoint):
        self.loaded = (checkpoint["mine"], list(checkpoint["state_dict"]))


def test_the_users_hooks_run_and_see_what_they_always_saw(tmp_path):
    names = list(Net().state_dict())
    model, made = fit(COMBINATIONS["float"]("constant"), Own())
    checkpoint = saved(made, tmp_path / "model.ckpt")
    assert checkpoint["mine"] == ["net.0.bias"]
    assert list(checkpoint["state_dict"]) == names
    assert torch.equal(checkpoint["state_dict"]["net.0.bias"], model.net[0].bias + 1)
    again, _ = fit(COMBINATIONS["float"]("constant"), Own(), ckpt=tmp_path / "model.ckpt")
    assert again.loaded == (["net.0.bias"], names)
    assert torch.equal(again.net[0].bias, model.net[0].bias + 1)
    plain = Own.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert plain.loaded == (["net.0.bias"], names)


def test_what_the_users_hook_loads_is_what_is_trained(tmp_path):
    """A weight that the hook replaces is the one that training goes on from, not the latent one beside it."""

    class Replaced(Net):
        def on_load_checkpoint(self, checkpoint):
            checkpoint["state_dict"]["net.3.weight"] = torch.full((8, 8, 3, 3), 0.5)

    model, made = fit([M("magnitude", threshold=0.5, targets=["net.3", "net.7"], schedule="constant")], max_epochs=1)
    made.save_checkpoint(tmp_path / "model.ckpt")
    callback = M("magnitude", threshold=0.5, targets=["net.3", "net.7"], schedule="constant")
    resumed, _ = fit([callback], Replaced(), ckpt=tmp_path / "model.ckpt", max_epochs=1)
    assert torch.equal(latents(resumed)["net.3.weight"], torch.full((8, 8, 3, 3), 0.5))
    assert resumed.net[3].weight.eq(0.5).sum() == resumed.net[3].weight.eq(0).sum() == 288
    assert torch.equal(latents(resumed)["net.7.weight"], latents(model)["net.7.weight"])


def test_no_hook_is_overridden_and_no_class_derived():
    """Lightning does other things where `configure_model` is overridden."""
    model, _ = fit(COMBINATIONS["float"]("constant"), max_steps=1)
    assert type(model) is Net
    assert not is_overridden("configure_model", model)
    assert not is_overridden("setup", model)
    assert not {"on_save_checkpoint", "on_load_checkpoint", "setup", "configure_model"} & set(vars(model))


def test_a_run_without_slots_saves_what_it_always_saved(tmp_path):
    """Clipping alone adds its two counts; a model that was detached adds nothing."""
    _, made = fit()
    plain = saved(made, tmp_path / "plain.ckpt")
    _, made = fit([GradientClipping(max_norm=float("inf"), log=False)])
    ours = saved(made, tmp_path / "ours.ckpt")
    assert ours.pop("callbacks") == {"GradientClipping": {"steps": 24, "clipped_steps": 0}}
    assert plain.pop("callbacks") == {}
    assert differences(plain, ours) == []
    detached = detach(fit(COMBINATIONS["float"]("constant"))[0])
    detached.load_state_dict(plain["state_dict"])
    _, made = fit((), detached.train(), max_epochs=1)
    assert KEY not in saved(made, tmp_path / "detached.ckpt")


# ------------------------------------------------------------------------------------------------------------ going on


class Untouched(Net):
    """A network in which a training step is a failure."""

    def training_step(self, batch, batch_idx):
        raise AssertionError("training began")


OLD = {"net.3.weight": torch.zeros(8, 8, 3, 3), "net.3.psc.weight.strength": torch.zeros(3)}


@pytest.mark.parametrize("entry", [OLD, {"version": 1}, {"version": VERSION + 1}, {}, [1, 2], "old"])
def test_a_checkpoint_of_another_layout_is_refused(entry, tmp_path):
    """Before training, with the way to its weights, which works."""
    model, made = fit(COMBINATIONS["float"]("constant"), max_epochs=1)
    checkpoint = saved(made, tmp_path / "model.ckpt")
    torch.save({**checkpoint, KEY: entry}, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=r"entry 'psc_lightning' is of another version of psc_lightning.*"
                                         r"model\.load_state_dict\(torch\.load\(path\)\['state_dict'\]\)"):  # fmt: skip
        fit(COMBINATIONS["float"]("constant"), Untouched(), ckpt=tmp_path / "old.ckpt")
    again = Net()
    again.load_state_dict(torch.load(tmp_path / "old.ckpt")["state_dict"])
    fit(COMBINATIONS["float"]("constant"), again, max_epochs=1)
    assert not torch.equal(again.net[3].bias, model.net[3].bias)


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        (lambda: [M(threshold=0.5)], lambda: [M(threshold=0.6)], ("threshold=0.5", "threshold=0.6")),
        (lambda: [M("movement")], lambda: [M("magnitude")], ("mask (movement, ", "mask (magnitude, ")),
        (lambda: [Q("uniform", bits=4)], lambda: [Q("uniform", bits=5)], ("uniform, bits=4", "uniform, bits=5")),
        (lambda: [Q("binary")], lambda: [Q("binary", targets="net.7")], ("levels (binary)", "no slots")),
        (lambda: [Q("binary", targets="net.7")], lambda: [Q("binary")], ("no slots", "levels (binary)")),
    ],
)
@pytest.mark.filterwarnings("ignore:.*mid-ramp")
@pytest.mark.filterwarnings("ignore:.*never began")
def test_a_resume_with_another_method_is_refused_in_our_words(then, now, said, tmp_path):
    """Not by a missing key or a wrong shape somewhere below."""
    _, made = fit(then(), max_epochs=1)
    made.save_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"^net\.0\.weight: the checkpoint was trained with ") as caught:
        fit(now(), Untouched(), ckpt=tmp_path / "model.ckpt")
    message = str(caught.value)
    had, has = message.split(", this run has ")
    assert said[0] in had
    assert said[1] in has
    assert "resume with the same callbacks, or start from its weights" in has


def test_the_order_of_callbacks_is_another_in_the_resumed_run(tmp_path):
    def run(turned, folder, ckpt=None):
        saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = COMBINATIONS["separable_lsq"]({"kind": "linear", "begin": 4, "end": 12})
        return fit([*(callbacks[::-1] if turned else callbacks), saver], ckpt=ckpt)

    model, made = run(False, tmp_path / "whole")
    resumed = run(True, tmp_path / "resumed", tmp_path / "whole/step=7.ckpt")
    assert differences(run_state(model, made), run_state(*resumed)) == []
    assert to_bytes(resumed[0])[0] == to_bytes(model)[0]


@pytest.mark.parametrize("name", RUNS)
def test_its_weights_loaded_into_the_live_model_change_nothing(name, tmp_path):
    model, made = fit(RUNS[name]({"kind": "linear", "begin": 4, "end": 12}))
    state, file = copy.deepcopy(model.state_dict()), to_bytes(model)[0]
    model.load_state_dict(saved(made, tmp_path / "model.ckpt")["state_dict"])
    assert differences(dict(state), dict(model.state_dict())) == []
    assert to_bytes(model)[0] == file


# --------------------------------------------------------------------------------------------------- copies and pickles


@pytest.mark.parametrize("name", RUNS)
def test_copies_and_pickles(name):
    """They take latent weights and sidecars along, and share nothing with the model."""
    model, _ = fit(RUNS[name]({"kind": "linear", "begin": 4, "end": 12}))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert differences(dict(model.state_dict()), dict(twin.state_dict())) == []
        assert differences(latents(model), latents(twin)) == []
        assert list(sidecars(model)) == list(sidecars(twin))
        for tensor, slots, _ in slotted(model):
            other = slots_at(twin, tensor)
            assert differences(dict(slots.state_dict()), dict(other.state_dict())) == []
            assert not {id(value) for value in slots.buffers()} & {id(value) for value in other.buffers()}
        before = latents(model)
        fit((), detach(twin).train(), max_epochs=1)
        assert differences(before, latents(model)) == []
