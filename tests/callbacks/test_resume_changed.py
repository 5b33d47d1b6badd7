"""Resuming with changes: what differs from the checkpoint's run is said in our words, refused or gone on with."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from training import QUIET, Loader, Net, conductor, differences, fit, run_state, slots_at

from psc_lightning import GradientClipping, MaskLearning, StraightThroughQuantization, WeightSharing
from psc_lightning.artifact import to_bytes

pytestmark = QUIET

M, Q, W, C = MaskLearning, StraightThroughQuantization, WeightSharing, GradientClipping
NOW = {"kind": "constant", "begin": 0}


class Untouched(Net):
    """A network in which a training step is a failure."""

    def training_step(self, batch, batch_idx):
        raise AssertionError("training began")


class Began(Net):
    """A network whose training is over when it begins."""

    def training_step(self, batch, batch_idx):
        self.trainer.should_stop = True
        return super().training_step(batch, batch_idx)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of an epoch each: dense, with two slots, with a clipping, with an average."""
    folder = tmp_path_factory.mktemp("checkpoints")
    runs = {
        "dense": [],
        "slots": [M(threshold=0.5, schedule=NOW), Q("codebook", k=8, schedule=NOW)],
        "clipped": [M(threshold=0.5, schedule=NOW), C(max_norm=1.0)],
        "averaged": [EMAWeightAveraging(), M(threshold=0.5, schedule=NOW)],
    }
    for name, callbacks in runs.items():
        fit(callbacks, max_epochs=1, limit_val_batches=0)[1].save_checkpoint(folder / f"{name}.ckpt")
    return folder


@pytest.mark.parametrize(
    ("now", "had", "has"),
    [
        (lambda m, q: [m, Q("codebook", k=4, schedule=NOW)], "levels (codebook, k=8)", "levels (codebook, k=4)"),
        (lambda m, q: [m, Q("ternary", schedule=NOW)], "levels (codebook, k=8)", "levels (ternary)"),
        (lambda m, q: [M(threshold=0.5, group="channel"), q], "group=tensor", "group=channel"),
        (lambda m, q: [m], "levels (codebook, k=8)", "mask (magnitude, threshold=0.5"),
        (lambda m, q: [m, q, W("row")], "mask (magnitude, threshold=0.5", "tying (row)"),
        (lambda m, q: [C(max_norm=1.0)], "levels (codebook, k=8)", "no slots"),
        (lambda m, q: [m, Q("codebook", k=8, ignore="net.0")], "levels (codebook, k=8)", "mask (magnitude"),
    ],
    ids=["k", "method", "option", "one less", "one more", "clipping only", "targets"],
)
def test_other_slots_are_refused(now, had, has, checkpoints):
    """Before training; what is the same in both is left out where one thing differs."""
    callbacks = now(M(threshold=0.5, schedule=NOW), Q("codebook", k=8, schedule=NOW))
    with pytest.raises(ValueError, match=r"^net\.0\.weight: the checkpoint was trained with ") as caught:
        fit(callbacks, Untouched(), ckpt=checkpoints / "slots.ckpt")
    before, after = str(caught.value).split(", this run has ")
    assert had in before
    assert has in after
    assert "resume with the same callbacks, or start from its weights" in after


def test_all_tensors_that_differ_are_counted(checkpoints):
    with pytest.raises(ValueError, match=r"k=4\) \(and so on in 2 more\): resume"):
        fit([M(threshold=0.5), Q("codebook", k=4)], Untouched(), ckpt=checkpoints / "slots.ckpt")


@pytest.mark.parametrize(
    ("checkpoint", "now", "said"),
    [
        (
            "slots",
            [M(threshold=0.5, schedule="cubic", refresh=3), Q("codebook", k=8, schedule=NOW, step_lr=0.1)],
            r"net\.0\.weight: the checkpoint was trained with mask\.schedule='constant from 0 to 0\.7', mask\.refresh=1, "
            r"levels\.step_lr=0\.0001, this run has mask\.schedule='cubic from 0\.0 to 0\.7', "
            r"mask\.refresh=3, levels\.step_lr=0\.1",
        ),
        (
            "slots",
            [M(threshold=0.5, schedule=NOW), Q("codebook", k=8, schedule=NOW), C(max_norm=1.0)],
            r"trained without GradientClipping\(max_norm=1\.0, scope='global'\), this run is with GradientClipping",
        ),
        (
            "clipped",
            [M(threshold=0.5, schedule=NOW), C(max_norm=2.0, scope="layer")],
            r"with GradientClipping\(max_norm=1\.0, scope='global'\), this run is with .*max_norm=2\.0, scope='layer'",
        ),
        (
            "clipped",
            [M(threshold=0.5, schedule=NOW)],
            r"trained with GradientClipping\(max_norm=1\.0, scope='global'\), this run is without Grad",
        ),
        ("averaged", [M(threshold=0.5, schedule=NOW)], "trained with EMAWeightAveraging, this run is without EMA"),
        (
            "clipped",
            [EMAWeightAveraging(), M(threshold=0.5, schedule=NOW), C(max_norm=1.0)],
            "this run is with EMAWeig",
        ),
    ],
    ids=["settings", "clipping more", "clipping otherwise", "clipping less", "average less", "average more"],
)
@pytest.mark.filterwarnings("ignore:The checkpoint was not created with WeightAveraging")
def test_what_is_set_otherwise_is_told_and_gone_on_with(checkpoint, now, said, checkpoints):
    with pytest.warns(UserWarning, match=said + ".*training goes on as this run says"):
        model, made = fit(now, Began(), ckpt=checkpoints / f"{checkpoint}.ckpt", limit_val_batches=0)
    assert made.global_step == 13
    assert slots_at(model, "net.0.weight").phase[1] == 2


def test_the_same_callbacks_in_other_words_are_the_same(checkpoints):
    """Without a word: targets that choose the same tensors."""
    now = [M(threshold=0.5, schedule=NOW, targets="net.*"), Q("codebook", k=8, schedule=NOW)]
    fit(now, Began(), ckpt=checkpoints / "slots.ckpt", limit_val_batches=0)


def test_a_dense_checkpoint_starts_its_ramp_where_it_is(checkpoints, caplog):
    """By hand: 12 of 24 steps are over, half of those left are 6; it is said once, and what goes on from there agrees."""
    half = {"kind": "linear", "begin": 0.0, "end": 0.5}
    seen = []

    class Look(Net):
        def training_step(self, batch, batch_idx):
            seen.append(slots_at(self, "net.3.weight").strengths)
            return super().training_step(batch, batch_idx)

    def run(ckpt):
        saver = ModelCheckpoint(checkpoints, "ours-{step}", every_n_train_steps=2, save_top_k=-1)
        callbacks = [M("saliency", threshold=0.5, schedule=half), Q("binary", schedule=half), saver]
        return fit(callbacks, Look(), ckpt=ckpt, limit_val_batches=0)

    with caplog.at_level("INFO"):
        model, made = run(checkpoints / "dense.ckpt")
    assert [strengths.levels for strengths in seen] == pytest.approx([min(step / 6, 1) for step in range(12)])
    assert [strengths.mask for strengths in seen] == pytest.approx([0] * 4 + [4 / 6, 5 / 6] + [1] * 6)
    told = [record.getMessage() for record in caplog.records if "without psc_lightning" in record.getMessage()]
    assert told == [
        "the checkpoint was trained without psc_lightning until step 12 of 24: MaskLearning('saliency') ramps from step 16 "
        "to step 18, StraightThroughQuantization('binary') ramps from step 12 to step 18 (shares of training are shares of "
        "what is left)"
    ]
    again = run(checkpoints / "ours-step=14.ckpt")
    assert differences(run_state(model, made), run_state(*again)) == []
    assert to_bytes(again[0])[0] == to_bytes(model)[0]
    assert conductor(again[1]).cast.length.since == 12


def test_steps_that_a_dense_checkpoint_has_passed_act_at_once(checkpoints, caplog):
    with caplog.at_level("INFO"):
        model, _ = fit([Q("binary", schedule={"begin": 2, "end": 9})], Began(), ckpt=checkpoints / "dense.ckpt")
    assert "StraightThroughQuantization('binary') acts in full from step 12 on" in caplog.text
    assert model.net[3].weight[0].unique().numel() == 2


def test_a_second_fit_of_the_same_trainer_is_no_start_from_a_checkpoint(checkpoints):
    """Its steps go on, and so do its schedules."""
    model, made = fit([M(threshold=0.5)], max_epochs=2, limit_val_batches=0)
    made.fit_loop.max_epochs = 4
    made.fit(model, Loader(), Loader(count=2))
    assert made.global_step == 48
    assert (conductor(made).cast.length.since, conductor(made).cast.total) == (0, 48)
    assert torch.equal(
        model.net[3].weight == 0, ~slots_at(model, "net.3.weight").cores["core"].mask.keep.reshape(8, 8, 3, 3)
    )
