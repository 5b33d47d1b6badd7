"""A checkpoint of a compressed run becomes a live model again: its file is the one that training would have written."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from training import (
    COMBINATIONS,
    INPUTS,
    QUIET,
    RUNS,
    A,
    M,
    Net,
    Q,
    W,
    differences,
    fit,
    latents,
    layers,
    run_state,
    sidecars,
    slotted,
)

from psc_lightning import detach, load, load_checkpoint, measure, save
from psc_lightning.activations import activations
from psc_lightning.artifact import to_bytes
from psc_lightning.slots.ladder import set_threshold
from psc_lightning.slots.live import compressed
from psc_lightning.training.entry import KEY

pytestmark = QUIET

RAMP = {"kind": "linear", "begin": 4, "end": 12}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Name of a combination → the model after a fit, and its checkpoint; each trained once."""
    found = {}

    def get(name):
        if name not in found:
            model, made = fit(RUNS[name](RAMP), max_epochs=1)
            path = tmp_path_factory.mktemp("run") / f"{name}.ckpt"
            made.save_checkpoint(path)
            found[name] = model, path
        return found[name]

    return get


@pytest.mark.parametrize("name", RUNS)
def test_a_fresh_model_is_the_trained_one_again(name, trained):
    model, path = trained(name)
    fresh = Net("sgd")
    load_checkpoint(fresh, path)
    assert differences(dict(fresh.state_dict()), dict(model.state_dict())) == []
    assert differences(latents(fresh), latents(model)) == []
    assert differences(sidecars(fresh), sidecars(model)) == []
    assert to_bytes(fresh)[0] == to_bytes(model)[0]


def test_inputs_are_rounded_as_they_were(trained):
    model, path = trained("integers")
    fresh, net = Net("sgd"), layers()
    load_checkpoint(fresh, path)
    load_checkpoint(net, path, [M("magnitude", threshold=0.2), Q("uniform", bits=7), A()])
    had = {name: one.ranges() for name, _, one in activations(model.net)}
    for one in (fresh.net, net):
        assert {name: found.ranges().inputs for name, _, found in activations(one)} == {
            n: r.inputs for n, r in had.items()
        }
    assert torch.equal(net.eval()(INPUTS), model.eval()(INPUTS))
    for callbacks, has in (([A(7)], "bits=7"), ([], "inputs that are not rounded")):
        with pytest.raises(ValueError, match=rf"bits=8\), the model with these callbacks has .*{has}"):
            load_checkpoint(Net(), path, [M("magnitude", threshold=0.2), Q("uniform", bits=7), *callbacks])
    fit([A()], fresh, max_epochs=1)


def test_the_network_in_it_takes_the_prefix_off(trained, tmp_path):
    model, path = trained("separable_lsq")
    net = layers()
    load_checkpoint(net, path)
    assert differences(dict(net.state_dict()), dict(model.net.state_dict())) == []
    assert to_bytes(net)[0] == to_bytes(model.net)[0]


def test_a_live_model_takes_the_best_one_as_it_was(trained):
    """Also factors, which its weights alone do not tell."""
    model, path = trained("separable_lsq")
    other, _ = fit(RUNS["separable_lsq"](RAMP), Net("sgd"), max_epochs=1)
    assert to_bytes(other)[0] != to_bytes(model)[0]
    load_checkpoint(other, path)
    assert to_bytes(other)[0] == to_bytes(model)[0]


def test_a_checkpoint_from_within_a_ramp(tmp_path):
    """Its weights are those of its state dict: hard, as between all steps."""
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=9, save_top_k=-1)
    fit([*RUNS["column"]({"kind": "linear", "begin": 4, "end": 12}), saver], max_epochs=1)
    state = torch.load(tmp_path / "step=9.ckpt", weights_only=True)["state_dict"]
    fresh = Net()
    load_checkpoint(fresh, tmp_path / "step=9.ckpt")
    save(fresh, tmp_path / "model.psc")
    assert differences(load(tmp_path / "model.psc"), dict(state)) == []


def test_a_fit_goes_on_from_it(trained):
    """With the same callbacks, as from the model that was trained."""
    model, path = trained("deep")
    fresh = Net()
    load_checkpoint(fresh, path, RUNS["deep"](RAMP))
    ran = [run_state(*fit(RUNS["deep"](RAMP), one, max_epochs=1)) for one in (copy.deepcopy(model), fresh)]
    assert differences(ran[0]["model"], ran[1]["model"]) == []


def test_callbacks_are_checked_against_it(trained):
    _, path = trained("separable_lsq")
    right, fresh = RUNS["separable_lsq"](RAMP), Net()
    load_checkpoint(fresh, path, right)
    for callbacks, had, has in (
        (right[:2], "+ levels (uniform, bits=4, learned_step=True)", "tying (separable, rank=2) + mask (magnitude"),
        ([*right[1:], W("separable", rank=1)], "tying (separable, rank=2)", "tying (separable, rank=1)"),
        ([*right[:2], Q("uniform", bits=5, learned_step=True)], "bits=4", "bits=5"),
    ):
        fresh = Net()
        before = copy.deepcopy(fresh.state_dict())
        with pytest.raises(ValueError, match=r"net\.0\.weight: the checkpoint was trained with ") as caught:
            load_checkpoint(fresh, path, callbacks)
        said = str(caught.value).split("the model with these callbacks has")
        assert had in said[0]
        assert has in said[1]
        assert differences(before, fresh.state_dict()) == []
        assert not list(compressed(fresh))


def test_a_model_under_other_slots_is_refused(trained):
    _, path = trained("deep")
    other, _ = fit([Q("binary", schedule="constant")], max_epochs=1)
    before = to_bytes(other)[0]
    with pytest.raises(ValueError, match=r"has levels \(binary\).*: call psc_lightning\.detach\(model\) first"):
        load_checkpoint(other, path)
    assert to_bytes(other)[0] == before
    load_checkpoint(detach(other), path)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: nn.Sequential(layers(), nn.Linear(4, 2)), r"0\.0\.weight is missing"),
        (lambda: nn.Sequential(*layers()[:4]), r"net\.7\.weight is not in the model"),
        (
            lambda: nn.Sequential(*layers()[:-1], nn.Linear(128, 5)),
            r"net\.7\.weight is \[4, 128\], in the model \[5, 128\]",
        ),
    ],
)
def test_another_model_is_told_by_names(model, said, trained):
    _, path = trained("deep")
    with pytest.raises(ValueError, match=r"expected the tensors of the model, found \d+ differences: .*" + said):
        load_checkpoint(model(), path)


def test_what_is_no_such_checkpoint(trained, tmp_path):
    _, path = trained("deep")
    (tmp_path / "damaged.ckpt").write_bytes(path.read_bytes()[:5000])
    torch.save(Net(), tmp_path / "object.ckpt")
    content = torch.load(path, weights_only=True)
    torch.save({**content, KEY: {**content[KEY], "version": 3}}, tmp_path / "old.ckpt")
    for name, said in {
        "no.ckpt": "no such file",
        "damaged.ckpt": "damaged",
        "object.ckpt": "weights_only=True",
        "old.ckpt": "another version of psc_lightning",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}: .*{said}"):
            load_checkpoint(Net(), tmp_path / name)


def test_weights_only_say_so_and_are_recognised(tmp_path):
    model, made = fit(COMBINATIONS["float"]("constant"), max_epochs=1)
    made.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for callbacks in (None, COMBINATIONS["float"]("constant")):
        fresh = Net()
        with pytest.warns(UserWarning, match=r"weights\.ckpt holds weights only"):
            load_checkpoint(fresh, tmp_path / "weights.ckpt", callbacks)
        report = save(fresh, tmp_path / "model.psc")
        assert differences(load(tmp_path / "model.psc"), dict(model.state_dict())) == []
        assert report.file_bytes < 1.1 * len(to_bytes(model)[0])


def test_without_a_warning_where_all_is_known(trained):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(Net(), trained("low_rank")[1])


def test_what_was_not_begun_is_there_still(tmp_path):
    """A checkpoint from before a slot began: dense weights, and slots that wait."""
    callbacks = [M("magnitude", threshold=0.5, schedule={"begin": 40, "end": 50})]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it never begins
        model, made = fit(callbacks, max_epochs=1)
    made.save_checkpoint(tmp_path / "model.ckpt")
    fresh = Net()
    load_checkpoint(fresh, tmp_path / "model.ckpt")
    assert [name for name, _, _ in compressed(fresh)] == [name for name, _, _ in compressed(model)]
    assert to_bytes(fresh)[0] == to_bytes(model)[0]


def test_a_share_of_zeros_that_was_steered_is_kept(tmp_path):
    """A budget makes it another than was asked for."""
    model, made = fit([M("magnitude", threshold=0.5, schedule="constant")], max_epochs=1)
    for _, slots, _ in slotted(model):
        set_threshold(slots, 0.8)
    made.save_checkpoint(tmp_path / "model.ckpt")
    fresh = Net()
    load_checkpoint(fresh, tmp_path / "model.ckpt")
    assert [row.sparsity for row in measure(fresh).tensors if row.name == "net.7.weight"] == [410 / 512]
    assert to_bytes(fresh)[0] == to_bytes(model)[0]
