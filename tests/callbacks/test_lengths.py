"""How long a run is: ramps follow what is known of it, tell what is not, and a short run is compressed all the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from torch import nn
from training import QUIET, Loader, Net, conductor, differences, fit, run_state, slots_at, slotted, trainer

from psc_lightning import MaskLearning, StraightThroughQuantization, WeightSharing, preset
from psc_lightning.artifact import to_bytes
from psc_lightning.levels import LEVELS
from psc_lightning.masks import MASKS
from psc_lightning.slots.slots import SLOTS
from psc_lightning.tying import TYINGS

pytestmark = QUIET

M, Q, W = MaskLearning, StraightThroughQuantization, WeightSharing
HALF = {"kind": "linear", "begin": 0.0, "end": 0.5}


class Strengths(Callback):
    """A mask's strength in each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, made, model, *args):
        self.seen.append(slots_at(model, "net.3.weight").strengths.mask)


class Keep(Callback):
    """A checkpoint after each of these batches."""

    def __init__(self, folder, batches):
        self.folder, self.batches, self.seen = folder, batches, 0

    def on_train_batch_end(self, made, *args):
        self.seen += 1
        if self.seen in self.batches:
            made.save_checkpoint(self.folder / f"{self.seen}.ckpt")


class Stream:
    """A loader without a length; remembers where it was."""

    def __init__(self):
        self.loader = Loader()

    def __iter__(self):
        return iter(self.loader)

    def state_dict(self):
        return self.loader.state_dict()

    def load_state_dict(self, state):
        self.loader.load_state_dict(state)


class Clock(Timer):
    """Half of the batches take two seconds each, those after them one."""

    def __init__(self, seconds):
        super().__init__({"seconds": seconds})
        self.now = 0

    def on_train_batch_start(self, *args):
        self.now += 2 if self.now < 10 else 1

    def time_elapsed(self, stage="train"):
        return float(self.now)

    def state_dict(self):
        return {"now": self.now}

    def load_state_dict(self, state):
        self.now = state["now"]


class ByHand(Net):
    """Manual optimization: a step every n batches, and a critic of its own that takes several a batch."""

    def __init__(self, every=1, critic=0):
        super().__init__("sgd")
        self.automatic_optimization = False
        self.every, self.critic, self.other = every, critic, nn.Linear(2, 2)

    def configure_optimizers(self):
        own = torch.optim.SGD(self.net.parameters(), 0.01)
        return [own, torch.optim.SGD(self.other.parameters(), 0.01)] if self.critic else own

    def training_step(self, batch, batch_idx):
        found = self.optimizers()
        own, *critics = found if isinstance(found, list) else [found]
        for _ in range(self.critic):
            critics[0].zero_grad()
            self.manual_backward(self.other.weight.square().sum())
            critics[0].step()
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        if (batch_idx + 1) % self.every == 0:
            own.step()
            own.zero_grad()


def ramp(callbacks, model=None, loader=None, ckpt=None, **options):
    """The strengths of a run, the model and its Trainer."""
    seen = Strengths()
    model, made = model or Net("sgd"), trainer([*callbacks, seen], **options)
    resume = {"ckpt_path": ckpt, "weights_only": True} if ckpt else {}
    made.fit(model, Loader() if loader is None else loader, Loader(count=2), **resume)
    return seen.seen, model, made


# ------------------------------------------------------------------------------------------- steps by hand


def test_a_critic_that_steps_five_times_a_batch():
    """By hand: 36 batches of 6 steps; a ramp to half of training is over after 18 batches, and no batch is a jump."""
    found, _, made = ramp([M(schedule=HALF)], ByHand(critic=5), max_epochs=3)
    assert made.global_step == conductor(made).cast.total == 36 * 6
    assert found == pytest.approx([min(batch / 18, 1) for batch in range(36)])


def test_a_step_every_four_batches_by_hand():
    """36 batches have 9 steps, not 36: the ramp is over after half of them."""
    found, _, made = ramp([M(schedule=HALF)], ByHand(every=4), max_epochs=3)
    assert made.global_step == conductor(made).cast.total == 9
    assert found[:4] == [0.0] * 4
    assert all(before <= after for before, after in pairwise(found))
    assert 16 <= found.index(1.0) <= 19


@pytest.mark.parametrize(("limits", "total"), [({"max_epochs": 3}, 36), ({"max_steps": 20}, 20),
                                               ({"max_epochs": 1, "max_steps": 20}, 12),
                                               ({"limit_train_batches": 5}, 10),
                                               ({"limit_train_batches": 0.5}, 12)])  # fmt: skip
def test_what_limits_a_run_first_is_its_length(limits, total):
    options = {"max_epochs": -1 if "max_steps" in limits else 2, "limit_val_batches": 0, **limits}
    found, _, made = ramp([M(schedule=HALF)], **options)
    assert made.global_step == conductor(made).cast.total == total
    assert found == pytest.approx([min(step / (total // 2), 1) for step in range(total)])


# ----------------------------------------------------------------------------------------- data without a length


@pytest.mark.filterwarnings("ignore:Your `IterableDataset`")
def test_data_without_a_length_has_one_after_an_epoch(tmp_path):
    """The ramp waits for the first epoch's end, is told to, and goes from there; resumed runs are the same."""

    def run(ckpt=None):
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        with pytest.warns(UserWarning, match=r"no length.*first epoch is over: MaskLearning\('magnitude'\) wait"):
            return ramp([M(schedule=HALF), saver], loader=Stream(), ckpt=ckpt, max_epochs=3)

    found, model, made = run()
    assert found == pytest.approx([0] * 12 + [step / 12 for step in range(12)] + [1] * 12)
    assert conductor(made).cast.total == made.global_step == 36
    later, again, other = run(tmp_path / "epoch=0.ckpt")
    assert later == found[12:]
    assert differences(run_state(model, made), run_state(again, other)) == []
    later, again, other = ramp([M(schedule=HALF)], loader=Stream(), ckpt=tmp_path / "epoch=1.ckpt", max_epochs=3)
    assert later == found[24:]  # known by now: nothing is told
    assert to_bytes(again)[0] == to_bytes(model)[0]


def test_one_epoch_without_a_length_is_refused_or_limited():
    """Before training, with what helps; and each of it does."""
    message = (
        r"^MaskLearning\('magnitude'\): 0\.5 is a share.*give begin/end in steps .*max_steps=.*limit_train_batches="
    )
    with pytest.raises(ValueError, match=message):
        ramp([M(schedule=HALF)], loader=Stream(), max_epochs=1)
    for schedule, limits in (
        ({"begin": 0, "end": 6}, {}),
        (HALF, {"max_steps": 12}),
        (HALF, {"limit_train_batches": 12}),
    ):
        found, *_ = ramp([M(schedule=schedule)], loader=Stream(), **{"max_epochs": 1, **limits})
        assert found == pytest.approx([min(step / 6, 1) for step in range(12)])


def test_data_that_ends_sooner_than_it_was_said(caplog):
    """Twenty batches an epoch, of which there are twelve: after the first epoch the ramp follows, and it is told."""
    with caplog.at_level("INFO"):
        found, _, made = ramp([M(schedule=HALF)], loader=Stream(), max_epochs=3, limit_train_batches=20)
    assert found[:12] == pytest.approx([step / 30 for step in range(12)])
    assert found[12:18] == pytest.approx([step / 18 for step in range(12, 18)])
    assert found[18:] == [1.0] * 18
    assert conductor(made).cast.total == 36
    assert "taken to have 36 optimizer steps, not 60" in caplog.text


# ----------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize("epochs", [-1, 50])
def test_a_ramp_follows_the_time_that_a_run_has(epochs, tmp_path, caplog):
    """20 seconds, of which the first five batches take ten; a resumed run that has the same times is the same."""

    def run(batches=(), ckpt=None):
        return ramp([M(schedule=HALF), Clock(20), Keep(tmp_path, batches)], ckpt=ckpt, max_epochs=epochs)

    with caplog.at_level("INFO"):
        found, model, made = run((4, 9))
    assert len(found) == 15
    assert found[0] == 0.0
    later = 1 if epochs == -1 else 0  # an endless run has no length before its first step
    assert found[1 : 6 + later] == pytest.approx([0.0] * later + [0.2, 0.4, 0.6, 0.8, 1.0])
    assert found[6:] == [1.0] * 9
    assert "a time limits this run" in caplog.text
    for batch in (4, 9):
        later, again, other = run(ckpt=tmp_path / f"{batch}.ckpt")
        assert later == found[batch:]
        assert differences(run_state(model, made)["ours"], run_state(again, other)["ours"]) == []
        assert to_bytes(again)[0] == to_bytes(model)[0]


def test_time_does_not_count_where_epochs_end_sooner():
    found, *_ = ramp([M(schedule=HALF), Clock(10_000)], max_epochs=1)
    assert found == pytest.approx([min(step / 6, 1) for step in range(12)])


# ------------------------------------------------------------------------------------------------- early stopping


def stopping():
    return EarlyStopping("val", patience=0, min_delta=1e9, check_on_train_epoch_end=False)


def test_early_stopping_is_told_at_the_start_where_the_ramp_ends():
    """And that a run which must not stop before does not."""

    class Told(Net):
        def training_step(self, batch, batch_idx):
            raise KeyError("training began")

    said = r"EarlyStopping may end .*MaskLearning\('magnitude'\) acts in full from step 36 of 72 on.*Trainer\(min_steps=36\)"
    with pytest.warns(UserWarning, match=said), pytest.raises(KeyError):
        ramp([M(schedule=HALF), stopping()], Told(), max_epochs=6)
    found, _, made = ramp([M(schedule=HALF), stopping()], max_epochs=6, min_steps=36)
    assert made.global_step == 36
    assert found[-1] == pytest.approx(35 / 36)
    ramp([M(schedule="constant"), stopping()], max_epochs=3)  # no ramp, nothing to tell
    ramp(
        [M(schedule={"begin": 0, "end": 24}), stopping()], max_epochs=3
    )  # the second look at its metric is the first to stop


# ------------------------------------------------------------------------------------------------------ short runs


def hard(model):
    return all(slots.phase[SLOTS.index(slot)] == 2 for _, slots, _ in slotted(model) for slot in slots.specs)


ROWS = [
    (sorted(TYINGS)[i % len(TYINGS)], sorted(MASKS)[i % len(MASKS)], level) for i, level in enumerate(sorted(LEVELS))
]


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("tying", "mask", "level"), ROWS)
def test_a_run_of_a_few_steps_ends_compressed(tying, mask, level, steps):
    """Every method, alone and with a tying; nothing waits for labels that the run is too short for."""
    callbacks = [W(tying, targets="net.3"), M(mask, targets=["net.3", "net.0"]), Q(level, targets=["net.3", "net.7"])]
    model, made = fit(callbacks, max_steps=steps, limit_val_batches=0)
    assert made.global_step == steps
    assert hard(model)
    assert model.net[0].weight.eq(0).sum() == 72
    assert {name: slots.method for name, slots, _ in slotted(model)}["net.3.weight"] == f"{tying}+{mask}+{level}"


@pytest.mark.parametrize("name", ["float", "binary", "ternary", "mask", "cross_channel", "row", "column", "separable",
                                  "low_rank", "log", "codebook", "deep"])  # fmt: skip
def test_a_run_of_one_step_ends_compressed_under_every_preset(name):
    model, _ = fit(preset(name), max_steps=1, limit_val_batches=0)
    assert hard(model)


def test_what_a_last_checkpoint_and_validation_see_of_a_one_step_run(tmp_path):
    """They come after the last step: what begins in the very end is there."""

    class Seen(Net):
        def validation_step(self, batch, batch_idx):
            self.zeros = int(self.net[3].weight.eq(0).sum())

    model, _ = fit([M(threshold=0.5), Keep(tmp_path, (1,))], Seen(), max_epochs=1, limit_train_batches=1)
    assert model.zeros == model.net[3].weight.eq(0).sum() == 288
    state = torch.load(tmp_path / "1.ckpt", weights_only=True)["state_dict"]
    assert state["net.3.weight"].eq(0).sum() == 288


@pytest.mark.parametrize(("make", "begins"), [(lambda: [M("saliency", schedule="constant")], {"mask": 8}),
                                             (lambda: [W("cross_channel", schedule="constant")], {"tying": 8}),
                                             (lambda: [W("cross_channel"), M("saliency", schedule="constant")],
                                              {"tying": 8, "mask": 8 + 5}),
                                             (lambda: [M("saliency", calibration_steps=16, schedule="constant")],
                                              {"mask": 16})])  # fmt: skip
def test_labels_are_waited_for_a_third_of_what_is_left_at_most(make, begins):
    """24 steps: 8 instead of 50, and of the 16 after those 5; what is asked for holds where it fits."""
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, made, model, *args):
            seen.append(list(slots_at(model, "net.3.weight").phase))

    fit([*make(), Look()], limit_val_batches=0)
    for slot, begin in begins.items():
        assert [phase[SLOTS.index(slot)] > 0 for phase in seen] == [step >= begin for step in range(24)]


def test_labels_that_were_asked_for_and_do_not_fit_are_told():
    with pytest.warns(
        UserWarning, match=r"calibration_steps=24 do not fit into a run of 24 steps; it begins at step 8"
    ):
        model, _ = fit([M("saliency", calibration_steps=24)], limit_val_batches=0)
    assert hard(model)
