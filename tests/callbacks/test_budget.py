"""A budget in bytes is kept by the file, whatever has a price or a share to steer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from training import QUIET, Net, fit

from psc_lightning import (
    ByteBudget,
    MaskLearning,
    RatePenalty,
    StraightThroughQuantization,
    WeightSharing,
    load_into,
    measure,
    save,
)

pytestmark = QUIET

AT_ONCE = {"kind": "constant"}


def levels(name, **options):
    return StraightThroughQuantization(name, schedule=AT_ONCE, **options)


class Wide(Net):
    """6,784 weights, without BatchNorm; trained at a constant rate."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = [nn.Linear(72, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)]
            self.net = nn.Sequential(nn.Flatten(), *sizes)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


STEERED = {
    "ternary": lambda: [levels("ternary", group="tensor")],
    "learned_step": lambda: [levels("uniform", bits=3, group="tensor", learned_step=True)],
    "wide_grid": lambda: [levels("uniform", bits=8)],
    "codebook": lambda: [levels("codebook", k=8)],
    "log": lambda: [levels("log", bits=4)],
    "masked": lambda: [MaskLearning("magnitude", 0.5, schedule=AT_ONCE), levels("ternary")],
    "row": lambda: [WeightSharing("row", schedule=AT_ONCE), levels("uniform", bits=4)],
    "low_rank": lambda: [WeightSharing("low_rank", factor_lr=0.01, schedule=AT_ONCE), levels("uniform", bits=4)],
    "binary": lambda: [MaskLearning("magnitude", 0.0, schedule=AT_ONCE), levels("binary")],
    "mask_alone": lambda: [MaskLearning("magnitude", 0.0, schedule=AT_ONCE)],
}
WRITING = {"leftovers": "log8", "names": False}


@pytest.mark.parametrize("name", STEERED)
def test_the_file_is_under_its_budget_and_near_it(name, tmp_path):
    make = STEERED[name]
    bare, _ = fit(make(), Wide(), max_epochs=1)
    budget = int(0.7 * measure(bare, **WRITING).file_bytes)
    steer = ByteBudget(budget, **WRITING)
    model, _ = fit([*make(), steer], Wide(), max_epochs=15)
    report = save(model, tmp_path / "model.psc", **WRITING)
    assert 0.9 * budget < report.file_bytes <= budget
    assert (tmp_path / "model.psc").stat().st_size == report.file_bytes
    assert steer.report is not None
    assert steer.report.file_bytes == report.file_bytes
    plain = Wide()
    load_into(plain, tmp_path / "model.psc")
    wanted = zip(plain.named_parameters(), model.named_parameters())
    assert all(torch.equal(a, b) for (key, a), (_, b) in wanted if key.endswith("weight"))


def test_a_budget_that_cannot_be_kept_is_told():
    with pytest.warns(UserWarning, match=r"200 were allowed\. .* bytes are names, biases"):
        fit([levels("ternary"), ByteBudget(200)], max_epochs=2)


def test_what_fits_already_is_left_alone():
    """The price sinks until nothing is drawn on: the run is nearly that without a budget."""
    steer = ByteBudget("1 MB")
    fit([levels("ternary"), steer], Wide(), max_epochs=6)
    bare, _ = fit([levels("ternary")], Wide(), max_epochs=6)
    assert steer.weight is not None
    assert steer.report is not None
    assert steer.report.file_bytes > 0.9 * measure(bare, **steer.writing).file_bytes


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (lambda: [levels("binary"), ByteBudget(500)], "nothing to steer: found binary"),
        (lambda: [ByteBudget(500)], "nothing is compressed"),
        (lambda: [levels("ternary"), ByteBudget(500), RatePenalty(0.1)], "leave out RatePenalty"),
    ],
)
def test_what_cannot_be_steered_is_refused_before_training(callbacks, message):
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit(callbacks(), model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_run_without_an_end_is_refused():
    endless = StraightThroughQuantization("ternary", schedule={"kind": "constant", "begin": 0})
    with pytest.raises(ValueError, match="no known length"):
        fit([endless, ByteBudget(500)], max_epochs=-1, max_steps=-1)


@pytest.mark.parametrize("wrong", ["lots", "-3kB", 0, "0.2", "3 lb", None, True, "0%"])
def test_bytes_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="budget: expected bytes"):
        ByteBudget(wrong)


def test_the_price_follows_the_size():
    """The size stays near what is wanted on the way, and near the budget behind it."""
    seen = []

    class Watch(ByteBudget):
        def control(self, cast, step):
            super().control(cast, step)
            seen.append((self.size(), self.wanted(step / cast.total)))

    fit([levels("ternary", group="tensor"), Watch(900, **WRITING)], Wide(), max_epochs=15)
    assert seen[0][1] > 1.4 * 900
    assert seen[-1][1] == pytest.approx(0.985 * 900)
    assert all(0.85 < size / wanted < 1.15 for size, wanted in seen)


def test_levels_that_begin_late_are_steered_from_there():
    late = StraightThroughQuantization("ternary", schedule={"kind": "linear", "begin": 0.3, "end": 0.5})
    model, _ = fit([late, ByteBudget(1200, **WRITING)], Wide(), max_epochs=15)
    assert measure(model, **WRITING).file_bytes <= 1200


def test_a_share_is_of_the_dense_size():
    steer = ByteBudget("4.5%", **WRITING)
    model, _ = fit([levels("ternary", group="tensor"), steer], Wide(), max_epochs=15)
    dense = sum(value.numel() * 4 for value in model.state_dict().values())
    assert steer.budget == int(0.045 * dense)
    assert measure(model, **WRITING).file_bytes <= steer.budget


def test_a_second_fit_steers_from_where_it_starts():
    steer = ByteBudget(1100, **WRITING)
    levels_of = levels("ternary", group="tensor")
    model, _ = fit([levels_of, steer], Wide(), max_epochs=12)
    steer.budget = steer.given = 900
    model, _ = fit([levels_of, steer], model, max_epochs=12)
    assert 0.85 * 900 < measure(model, **WRITING).file_bytes <= 900
