"""What hangs on a module and cannot be copied is no hindrance where a copy is made of it."""

from __future__ import annotations

import threading

from torch import nn
from training import COMBINATIONS, QUIET, Loader, Net, differences, fit, run_state

from psc_lightning import (
    Distillation,
    StraightThroughQuantization,
    coarsest,
    fold_batchnorm,
    plan,
    sensitivity,
)

pytestmark = QUIET

Q, NOW = StraightThroughQuantization, "constant"


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Hung(Net):
    """Has what cannot be copied: a lock, a generator, the last loss with its graph."""

    def __init__(self):
        super().__init__("sgd")
        self.lock, self.later = threading.Lock(), (number for number in range(3))

    def training_step(self, batch, batch_idx):
        self.last = super().training_step(batch, batch_idx)
        return self.last


def test_what_cannot_be_copied_may_hang_on_a_module():
    runs = [fit([*COMBINATIONS["float"](NOW), Distillation()], net) for net in (Net("sgd"), Hung())]
    assert differences(*(run_state(*run) for run in runs)) == []
    (usual, _), (hung, _) = (fit([Q("uniform", bits=4, schedule=NOW)], net) for net in (Net("sgd"), Hung()))
    assert differences(dict(fold_batchnorm(usual).state_dict()), dict(fold_batchnorm(hung).state_dict())) == []
    batches = list(Loader(count=2))
    assert coarsest(usual, batches, loss_of).writing == coarsest(hung, batches, loss_of).writing
    assert str(plan(Hung(), [Q("ternary")])) == str(plan(Net("sgd"), [Q("ternary")]))
    assert str(sensitivity(usual, batches, loss_of)) == str(sensitivity(hung, batches, loss_of))
