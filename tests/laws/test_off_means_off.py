"""Law 4: a callback that has not begun leaves a run bit for bit as it is without."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, TensorDataset
from training import INPUTS, LABELS, QUIET, RUNS, Net, differences, random_state, run_state, trainer

from psc_lightning import ByteBudget, RatePenalty, StraightThroughQuantization
from psc_lightning.oneshot import preset

pytestmark = QUIET


class Diary(Callback):
    """The order of the data, and what a user's random numbers are along the way."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, made, model, outputs, batch, batch_idx):
        self.seen.append((batch[1].tolist(), outputs["loss"].item(), random.random(), np.random.rand()))


def run(callbacks, optimizer):
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    model, diary = Net(optimizer, dropout=0.3), Diary()
    loader = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=8, shuffle=True)
    made = trainer([*callbacks, diary], num_sanity_val_steps=2)
    made.fit(model, loader, DataLoader(TensorDataset(INPUTS[:16], LABELS[:16]), batch_size=8))
    state = {key: value for key, value in run_state(model, made).items() if key != "ours"}
    return {"run": state, "data": diary.seen, "random": random_state()}


@pytest.fixture(scope="module", params=["adamw", "sgd"])
def plain(request):
    return request.param, run([], request.param)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore:.*never began")
def test_before_its_begin_a_run_is_the_plain_one(name, plain):
    optimizer, expected = plain
    found = run(RUNS[name]({"kind": "cubic", "begin": 1000, "end": 2000}), optimizer)
    assert differences(expected, found) == []


@pytest.mark.parametrize("penalty", [lambda: RatePenalty(10.0), lambda: ByteBudget("1 MB")], ids=["rate", "budget"])
@pytest.mark.filterwarnings("ignore:.*never began")
def test_a_price_waits_for_its_levels(penalty, plain):
    optimizer, expected = plain
    late = StraightThroughQuantization("ternary", schedule={"kind": "constant", "begin": 1000})
    assert differences(expected, run([late, penalty()], optimizer)) == []


def test_the_preset_none_adds_nothing():
    assert preset("none") == []


def test_the_comparison_sees_one_bit(plain):
    """A check of the test: the last bit of one weight, one lost random number, one swapped batch."""
    _, expected = plain
    other = copy.deepcopy(expected)
    key = "net.3.weight"
    other["run"]["model"][key].view(torch.int32)[0, 0, 0, 0] ^= 1
    other["data"][2], other["data"][3] = other["data"][3], other["data"][2]
    other["random"]["torch"][100] ^= 1
    found = differences(expected, other)
    assert f".run.model.{key}" in found
    assert ".random.torch" in found
    assert any(path.startswith(".data.2") for path in found)


def test_once_begun_a_run_differs(plain):
    optimizer, expected = plain
    found = run(RUNS["float"]({"kind": "constant", "begin": 23}), optimizer)
    assert differences(expected["data"][:23], found["data"][:23]) == []
    assert differences(expected["data"][23:], found["data"][23:])
