"""Lightning's own pruning, which puts other Parameters in the place of those it prunes: apart, or refused at the start."""

from __future__ import annotations

import pytest
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from training import QUIET, Net, fit, slotted

from psc_lightning import StraightThroughQuantization

pytestmark = QUIET


@pytest.mark.parametrize("first", [True, False])
def test_both_on_the_same_tensors_are_refused(first):
    ours, theirs = StraightThroughQuantization("uniform"), ModelPruning("l1_unstructured", amount=0.3)
    with pytest.raises(
        ValueError, match=r"both take net\.0\.weight, net\.3\.weight, net\.7\.weight: leave them to one"
    ):
        fit([ours, theirs] if first else [theirs, ours])


def test_both_on_other_tensors_work():
    model = Net()
    theirs = ModelPruning("l1_unstructured", parameters_to_prune=[(model.net[7], "weight")], amount=0.3)
    fit([theirs, StraightThroughQuantization("uniform", schedule="constant", ignore="net.7")], model)
    assert [name for name, _, _ in slotted(model)] == ["net.0.weight", "net.3.weight"]
    assert int((model.net[7].weight == 0).sum()) >= 0.3 * model.net[7].weight.numel()


def test_a_parameter_that_goes_away_in_mid_training_is_told():
    class Prunes(Net):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 3:
                nn.utils.prune.random_unstructured(self.net[7], "weight", 0.5)

    with pytest.raises(ValueError, match=r"net\.7\.weight is no Parameter of its layer any more"):
        fit([StraightThroughQuantization("uniform", schedule="constant")], Prunes())
