"""Who puts the weights back that he took the place of, gets the latent weights back with them."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from training import COMBINATIONS, QUIET, Net, differences, fit, run_state

pytestmark = QUIET

RAMP = {"kind": "linear", "begin": 4, "end": 20}


class Swapped(Callback):
    """An average in the network's place from a validation to the next epoch: its checkpoint is of the average."""

    def __init__(self):
        self.average = self.kept = None

    def on_train_batch_end(self, made, model, *args):
        now = [parameter.detach().clone() for parameter in model.parameters()]
        self.average = now if self.average is None else [torch.lerp(*pair, 0.1) for pair in zip(self.average, now)]

    def on_validation_start(self, made, model):
        self.kept = [parameter.detach().clone() for parameter in model.parameters()]
        self.put(model, self.average)

    def on_train_epoch_start(self, made, model):
        if self.kept is not None:
            self.put(model, self.kept)

    def put(self, model, values):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), values):
                parameter.copy_(value)


@pytest.mark.parametrize("name", ["float", "ternary_movement", "separable_lsq", "deep"])
def test_weights_that_an_average_took_the_place_of_are_back_with_their_latent_weights(name, tmp_path):
    """The one validation is after the second of three epochs, in the ramp; the run is the one without the average."""

    def run(*more):
        saver = ModelCheckpoint(tmp_path / str(len(more)), save_on_train_epoch_end=False)
        made = fit([*more, *COMBINATIONS[name](RAMP), saver], Net("sgd"), max_epochs=3, check_val_every_n_epoch=2)
        state = run_state(*made)
        del state["metrics"]
        return state, torch.load(saver.best_model_path, weights_only=True)["state_dict"]

    (expected, plain), (found, averaged) = run(), run(Swapped())
    assert differences(expected, found) == []
    assert not torch.equal(plain["net.3.bias"], averaged["net.3.bias"])
    if name == "ternary_movement":  # what the checkpoint has of the average is hard as well
        assert max(len(row.unique()) for row in averaged["net.3.weight"]) == 3
