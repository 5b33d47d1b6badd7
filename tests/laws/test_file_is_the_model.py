"""Laws 1 and 2 at the end of a run: the file holds what the model computes, and what was measured is the file's."""

from __future__ import annotations

import pytest
import torch
from training import COMBINATIONS, INPUTS, QUIET, Loader, Net, fit, trainer

import psc_lightning
from psc_lightning.slots.live import compressed

pytestmark = QUIET

RAMP = {"kind": "cubic", "begin": 0.25, "end": 0.75}


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUTS)


@pytest.fixture(scope="module", params=COMBINATIONS)
def trained(request):
    return fit(COMBINATIONS[request.param](RAMP))


def test_the_file_is_the_trained_model(trained, tmp_path):
    model, _ = trained
    psc_lightning.save(model, tmp_path / "model.psc")
    state = psc_lightning.load(tmp_path / "model.psc")
    plain = Net()
    plain.load_state_dict(state)
    assert torch.equal(logits(plain), logits(model))
    found = {name: (tensor, weight.detach().contiguous()) for name, tensor, weight in compressed(model)}
    assert list(found) == ["net.0.weight", "net.3.weight", "net.7.weight"]
    for name, (tensor, weight) in found.items():
        assert state[name].view(torch.int32).equal(weight.view(torch.int32)), name
        assert not weight.equal(tensor.latent), "nothing was compressed"


def test_the_measured_loss_is_the_files(trained, tmp_path):
    model, made = trained
    psc_lightning.save(model, tmp_path / "model.psc")
    plain = Net()
    psc_lightning.load_into(plain, tmp_path / "model.psc")
    (from_file,) = trainer().validate(plain, Loader(count=2), verbose=False)
    assert from_file["val"] == made.callback_metrics["val"].item()
    (again,) = made.validate(model, Loader(count=2), verbose=False)
    assert again == from_file


def test_saving_in_mid_ramp_hardens_first_and_says_so(tmp_path):
    """Between steps a model that has begun is hard already; what has not begun is stored as it is."""
    ramp = {"kind": "linear", "begin": 0, "end": 1000}
    with pytest.warns(UserWarning, match="hardened in mid-ramp"):
        model, _ = fit(COMBINATIONS["float"](ramp), max_steps=4)
    psc_lightning.save(model, tmp_path / "model.psc")  # no warning, which would be an error here
    assert psc_lightning.load(tmp_path / "model.psc")["net.3.weight"].eq(0).sum() == 288
