"""A second fine-tune: of a sparse file, whose zeros stay; of a live model, under other callbacks."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from training import QUIET, Net, conductor, differences, fit, run_state, slots_at

import psc_lightning
from psc_lightning import MaskLearning, StraightThroughQuantization, WeightSharing
from psc_lightning.callbacks.slot import SlotCallback

pytestmark = QUIET

M, Q, W = MaskLearning, StraightThroughQuantization, WeightSharing
NOW = {"kind": "constant", "begin": 0}


class Watched(Net):
    """Remembers which entries are zero in each training step."""

    def __init__(self):
        super().__init__("sgd")
        self.zeros = []

    def training_step(self, batch, batch_idx):
        self.zeros.append(self.net[3].weight.detach() == 0)
        return super().training_step(batch, batch_idx)

    @property
    def numbers(self):
        return [int(zeros.sum()) for zeros in self.zeros]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Three quarters of each tensor are zero: 432 of 576."""
    path = tmp_path_factory.mktemp("file") / "model.psc"
    psc_lightning.save(fit([M(threshold=0.75, schedule=NOW), Q("uniform", schedule=NOW)], Net("sgd"))[0], path)
    return path


@pytest.fixture
def sparse(file):
    model = Watched()
    psc_lightning.load_into(model, file)
    assert int((model.net[3].weight == 0).sum()) == 432
    return model


# -------------------------------------------------------------------------------------------------- of a sparse file


@pytest.mark.parametrize("method", ["magnitude", "movement", "saliency"])
@pytest.mark.parametrize("threshold", [0.75, 0.9])
def test_zeros_stay_and_a_ramp_starts_from_them(method, threshold, sparse):
    """By hand: to 0.9 of 576, linearly over 17 of 24 steps, from 432."""
    pruned = sparse.net[3].weight == 0
    fit([M(method, threshold=threshold), Q("uniform")], sparse, limit_val_batches=0)
    assert min(sparse.numbers) >= 432
    assert torch.equal(sparse.zeros[0], pruned)
    if method != "magnitude":  # by which what was dropped may return, for others
        assert all(bool(zeros[pruned].all()) for zeros in sparse.zeros)
    if threshold == 0.9 and method == "magnitude":
        kept = [int(0.75 * 576 + 0.15 * 576 * min(step / 17, 1) + 0.5) for step in range(24)]
        assert sparse.numbers == pytest.approx(kept, abs=1)


def test_units_are_counted_not_entries(sparse):
    """Half of the channels are zero, and of the others nothing is: a mask of channels starts from four of eight."""
    with torch.no_grad():
        sparse.net[3].weight.copy_(torch.randn(8, 8, 3, 3, generator=torch.Generator().manual_seed(0)))
        sparse.net[3].weight[::2] = 0
    fit([M(threshold=0.75, granularity="channel", targets="net.3")], sparse, limit_val_batches=0)
    assert sparse.numbers[0] == 4 * 72
    assert sparse.numbers[-1] == 6 * 72
    assert all(bool(zeros[::2].all()) for zeros in sparse.zeros[:1])


def test_a_resumed_second_fine_tune_is_the_uninterrupted_one(sparse, file, tmp_path):
    again = Watched()
    psc_lightning.load_into(again, file)

    class Save(psc_lightning.GradientClipping):
        def on_train_batch_end(self, made, *args):
            if made.global_step == 5:
                made.save_checkpoint(tmp_path / "5.ckpt")

    def callbacks():
        return [M("movement", threshold=0.9), Save(max_norm=1e9, log=False)]

    expected = run_state(*fit(callbacks(), sparse))
    assert 0.75 < slots_at(sparse, "net.3.weight").cores["core"].mask.keep.logical_not().float().mean() < 0.91
    found = run_state(*fit(callbacks(), again, ckpt=tmp_path / "5.ckpt"))
    assert differences(expected, found) == []


def test_a_weight_that_is_all_zero_is_new_not_pruned():
    """As LoRA's second factor is at first: its ramp starts at 0."""
    model = Watched()
    with torch.no_grad():
        model.net[7].weight.zero_()
    shares = []

    class Look(Callback):
        def on_train_batch_start(self, *args):
            shares.append(slots_at(model, "net.7.weight").strengths.mask)

    fit([M("movement", threshold=0.5, targets="net.7"), Look()], model, limit_val_batches=0)
    assert shares == pytest.approx([min(step / 17, 1) for step in range(24)])
    assert int((model.net[7].weight == 0).sum()) == 256


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        (
            [M(threshold=0.5, schedule=NOW)],
            r"75% of it is zero already, and magnitude keeps only 50% so from the start",
        ),
        (
            [Q("binary")],
            r"75% of it is zero already, and binary keeps only 0% .*MaskLearning\(threshold=0\.75\) keeps them",
        ),
        ([Q("uniform")], r"uniform keeps only 0%"),
        ([W("row")], r"row keeps only 0%"),
        ([Q("ternary"), M(threshold=0.75, schedule={"begin": 0.5, "end": 0.7})], r"keeps only 0%.*begins at 0\.0"),
    ],
    ids=["lower", "binary", "uniform", "tying", "late"],
)
def test_zeros_that_will_not_stay_are_told(callbacks, said, sparse):
    """Once, for all tensors of the kind."""
    with pytest.warns(UserWarning, match=rf"^net\.0\.weight \(and the like in 2 more\): .*{said}"):
        fit(callbacks, sparse, limit_val_batches=0)
    if callbacks[0].method == "binary":
        assert sparse.numbers[-1] == 0


def test_a_mask_keeps_the_zeros_of_levels_that_have_none(sparse):
    """Without a warning, which would be an error here."""
    fit([Q("binary"), M(threshold=0.75)], sparse, limit_val_batches=0)
    assert set(sparse.numbers) == {432}


# ---------------------------------------------------------------------------------------------------- of a live model


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (M("movement", threshold=0.75), r"its mask slot is filled by .*'magnitude'.* and again by .*'movement'"),
        (
            M(threshold=0.5, schedule=NOW),
            r"its mask slot holds MaskLearning.*'threshold': 0\.75.*this callback has .*'threshold': 0\.5",
        ),
        (M(threshold=0.75, targets="net.*"), r"its mask slot is filled by MaskLearning"),
        (W("row"), r"WeightSharing.* comes after another slot has begun"),
    ],
    ids=["method", "option", "targets", "tying"],
)
def test_other_callbacks_are_refused_with_the_way_out_which_works(now: SlotCallback, said: str):
    model, _ = fit([M(threshold=0.75, schedule=NOW)], Watched())
    hard = model.net[3].weight.detach().clone()
    with pytest.raises(ValueError, match=rf"^net\.0\.weight: {said}.*psc_lightning\.detach\(model\) before"):
        fit([now], model)
    psc_lightning.detach(model)
    assert torch.equal(model.net[3].weight, hard)
    now.schedule = psc_lightning.Schedule("constant")
    if now.method == "row" or now.threshold < 0.75:
        with pytest.warns(UserWarning, match="is zero already"):
            fit([now], model, max_epochs=1)
    else:
        fit([now], model, max_epochs=1)
    assert slots_at(model, "net.3.weight").method == now.method


def test_what_a_refused_fit_has_filled_acts_on_nothing():
    """The first of its callbacks finds empty slots, the second a taken one: what `detach` gives back is the first fit's."""
    model, _ = fit([Q("binary", targets="net.7", schedule=NOW)], Net("sgd"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^net\.7\.weight: its levels slot"):
        fit([M(threshold=0.6), Q("ternary")], model)
    assert differences(before, dict(psc_lightning.detach(model).state_dict())) == []


def test_a_slot_that_an_earlier_fit_has_left_is_told():
    """It stays in force: pruning first, levels afterwards, without `detach` in between."""
    model, _ = fit([M(threshold=0.75, schedule=NOW)], Watched())
    model.zeros.clear()
    told = r"^net\.0\.weight \(and the like in 2 more\): its mask slot \(magnitude\) is in force since an earlier fit.*detach"
    with pytest.warns(UserWarning, match=told):
        _, made = fit([Q("uniform")], model)
    assert set(model.numbers) == {432}
    assert slots_at(model, "net.3.weight").phase == [0, 2, 2]
    assert [filler.slot for filler in conductor(made).cast.fillers] == ["levels"]
