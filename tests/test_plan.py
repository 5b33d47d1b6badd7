"""What the plan promises is what the file has (case 40), and a mask that makes it larger is said (case 39)."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning import Trainer
from torch import nn
from training import QUIET

from psc_lightning import MaskLearning, StraightThroughQuantization, compress, plan, preset
from psc_lightning.app.data import ImageData
from psc_lightning.app.models import DigitsCNN
from psc_lightning.app.sources import digits
from psc_lightning.app.task import Classifier
from psc_lightning.artifact import to_bytes

pytestmark = QUIET


@pytest.fixture(scope="module")
def data() -> ImageData:
    made = ImageData(digits, [0.5], [0.5], batch_size=128)
    made.setup("fit")
    return made


def fit(model: nn.Module, data: ImageData, epochs: int, rate: float, *callbacks) -> Classifier:
    module = Classifier(model, lambda parameters: torch.optim.AdamW(parameters, rate))
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        max_epochs=epochs, callbacks=list(callbacks), enable_checkpointing=False, limit_val_batches=0, **settings
    )
    trainer.fit(module, datamodule=data)
    return module


@pytest.fixture(scope="module")
def trained(data: ImageData) -> nn.Module:
    torch.manual_seed(0)
    return fit(DigitsCNN(), data, 4, 0.01).net


@pytest.mark.parametrize("name", ["binary", "mask"])
def test_the_plan_of_a_trained_network_is_within_5_percent_of_its_file(name: str, trained: nn.Module, data: ImageData):
    promised = plan(trained, preset(name)).report.file_bytes
    module = fit(copy.deepcopy(trained), data, 2, 0.003, *preset(name))
    found = to_bytes(module.net)[1].file_bytes
    assert promised == pytest.approx(found, rel=0.05)


def test_what_training_will_move_is_priced_as_if_it_had_moved():
    """Biases and BatchNorm of a fresh network are zeros and ones, which cost nothing; trained ones cost their bits."""
    fresh = DigitsCNN()
    promised = plan(fresh, preset("binary")).report
    left = sum(tensor.stored_bytes for tensor in promised.tensors if tensor.method == "plain")
    assert left > 0.7 * sum(tensor.dense_bytes for tensor in promised.tensors if tensor.method == "plain")
    assert bool((fresh.bn1.weight == 1).all())  # of the copy only


def test_a_budget_is_said_not_foreseen():
    made = plan(DigitsCNN(), preset("ternary", budget="2kB"))
    assert made.report.notes == ["ByteBudget steers the file to 2,000 bytes in training; the bytes here are without it"]


def costs(report) -> list[str]:
    return [note for note in report.notes if "the mask costs more than it saves" in note]


def test_a_mask_that_makes_the_file_larger_is_said():
    torch.manual_seed(0)
    model = DigitsCNN()
    made = plan(model, preset("binary", threshold=0.6))
    (said,) = costs(made.report)
    assert f"{made.report.file_bytes:,} bytes with it, " in said
    without = plan(model, preset("binary", threshold=0.0)).report.file_bytes
    assert f"{without:,} without; levels=binary have no zero" in said
    assert said in str(made)
    assert without < made.report.file_bytes
    for callbacks in (
        preset("binary"),  # no zeros
        preset("ternary", threshold=0.6),  # which has a zero of its own
        [MaskLearning(threshold=0.6), StraightThroughQuantization("uniform", bits=4)],
        [MaskLearning(threshold=0.97, granularity="channel"), StraightThroughQuantization("binary")],  # this one saves
    ):
        assert costs(plan(model, callbacks).report) == []
    report = compress(copy.deepcopy(model), "binary", threshold=0.6)
    assert len(costs(report)) == 1
