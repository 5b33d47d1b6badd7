"""What cannot be trained or saved is said before the first step, not after the last."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchmetrics import Metric
from training import QUIET, Loader, Net, conductor, fit, slotted, trainer

import psc_lightning
from psc_lightning import GradientClipping, StraightThroughQuantization, detach, load, load_into, plan, save

pytestmark = QUIET


def quantized(**options):
    return StraightThroughQuantization("binary", schedule="constant", **options)


class Untouched(Net):
    def training_step(self, batch, batch_idx):
        raise AssertionError("training began")


def with_buffer(value):
    model = Untouched()
    model.register_buffer("odd", value)
    return model


def with_table(**options):
    model = Untouched()
    model.table = nn.Embedding(16, 8, **options)
    return model


# ------------------------------------------------------------------------------------------- what cannot be saved

UNSAVEABLE = {
    "uint16": lambda: torch.zeros(2, dtype=torch.uint16),
    "float8": lambda: torch.zeros(2, dtype=torch.float8_e4m3fn),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "meta": lambda: torch.zeros(2, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "causal mask": lambda: torch.full((3, 3), -torch.inf).triu(1),
    "nan": lambda: torch.tensor(torch.nan),
    "complex nan": lambda: torch.tensor(complex(0.0, torch.nan)),
}


@pytest.mark.parametrize("name", UNSAVEABLE)
@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_what_save_refuses_fit_refuses(name, tmp_path):
    if name == "meta":  # Lightning moves the model, which torch refuses, before anyone is asked
        with pytest.raises(ValueError, match=r"odd: "):
            plan(with_buffer(UNSAVEABLE[name]()).net.append(with_buffer(UNSAVEABLE[name]())), [quantized()])
        return
    for attempt in (
        lambda model: save(model, tmp_path / "model.psc"),
        lambda model: fit([quantized()], model),
        lambda model: plan(model, [quantized()]),
    ):
        with pytest.raises(ValueError, match=r"^odd: expected .*persistent=False"):
            attempt(with_buffer(UNSAVEABLE[name]()))


def test_what_no_file_would_hold_is_no_hindrance(tmp_path):
    model = Net()
    model.register_buffer("mask", torch.full((3, 3), -torch.inf), persistent=False)
    fit([quantized()], model, max_steps=1)
    save(model, tmp_path / "model.psc")
    with_clipping_only = with_buffer(torch.tensor(torch.inf))
    with pytest.raises(AssertionError, match="training began"):
        fit([GradientClipping(max_norm=1.0)], with_clipping_only)  # nothing is said of files


def test_complex_weights_and_buffers_train_and_are_saved(tmp_path):
    class Spectral(Net):
        def __init__(self):
            super().__init__("sgd")
            self.filter = nn.Parameter(torch.ones(8, 8, dtype=torch.complex64))
            self.register_buffer("phase", torch.tensor([1j]))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + (self.filter * self.phase - 1).abs().square().mean()

    model, _ = fit([quantized()], Spectral(), max_steps=2)
    assert [name for name, _, _ in slotted(model)] == ["net.0.weight", "net.3.weight", "net.7.weight"]
    assert not torch.equal(model.filter.detach(), torch.ones(8, 8, dtype=torch.complex64))
    save(model, tmp_path / "model.psc")
    plain = Spectral()
    plain.load_state_dict(load(tmp_path / "model.psc"))
    assert torch.equal(plain.filter, model.filter)
    assert torch.equal(plain.phase, model.phase)


class Seen(Metric):
    def __init__(self):
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.persistent(True)

    def update(self, value):
        self.values.append(value)

    def compute(self):
        return torch.stack(self.values).mean()


class Keeps(Net):
    """Has a metric that keeps a list, and a state that is no tensor."""

    def __init__(self):
        super().__init__("sgd")
        self.seen, self.note = Seen(), "own"

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen.update(loss.detach())
        return loss

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]


def test_lists_and_extra_state_are_left_out_with_a_word_before_training(tmp_path):
    model = Keeps()
    model.note = "other"
    told = r"leaves out .*_extra_state \(dict\).*seen\.values \(list\)|leaves out .*seen\.values \(list\).*_extra_state"
    with pytest.warns(UserWarning, match=told) as caught:
        fit([quantized()], model, max_steps=2)
    assert sum("leaves out" in str(one.message) for one in caught) == 1
    with pytest.warns(UserWarning, match=told):
        save(model, tmp_path / "model.psc")
    plain = Keeps()
    load_into(plain, tmp_path / "model.psc")
    assert torch.equal(plain.net[3].weight, model.net[3].weight)
    assert plain.note == "own"


def test_an_extra_state_that_is_a_tensor_is_refused(tmp_path):
    """Many modules unpickle theirs, so that a file would be a program: no file holds any. Before training, and in `save`."""

    class Counts(Net):
        count = torch.tensor([[1, 2], [3, 4]])

        def get_extra_state(self):
            return self.count

        def set_extra_state(self, state):
            self.count = state

    model = Counts("sgd")
    with pytest.raises(ValueError, match=r"_extra_state: expected a weight, found a module's extra state.*only="):
        fit([quantized()], model, max_steps=1)
    with pytest.raises(ValueError, match=r"_extra_state: expected a weight"):
        save(model, tmp_path / "model.psc")
    assert not (tmp_path / "model.psc").exists()


# ----------------------------------------------------------------------------------------- what cannot be trained


def test_sparse_gradients_are_refused_by_name():
    with pytest.raises(ValueError, match=r"table\.weight: its gradients are sparse.*sparse=False.*ignore='table'"):
        fit([quantized()], with_table(sparse=True))
    with pytest.raises(ValueError, match=r"table\.weight: its gradients are sparse"):
        plan(with_table(sparse=True), [quantized()])
    psc_lightning.compress(with_table(sparse=True), "binary")  # no gradients: no hindrance
    with pytest.raises(AssertionError, match="training began"):
        fit([quantized(ignore="table")], with_table(sparse=True))


COMPLEX = nn.Parameter(torch.zeros(16, 8, dtype=torch.complex64))


@pytest.mark.parametrize(
    "change", [lambda m: setattr(m.table, "sparse", True), lambda m: setattr(m.table, "weight", COMPLEX)]
)
def test_clipping_refuses_them_too(change):
    model = with_table()
    change(model)
    with pytest.raises(ValueError, match=r"dense real gradients, but that of table\.weight is sparse or complex"):
        fit([GradientClipping(max_norm=1.0)], model)


def test_a_table_with_max_norm_is_refused_by_name():
    match = r"table\.weight cannot be compressed: its layer's max_norm rewrites it in every forward pass: .*ignore="
    for attempt in (lambda m: fit([quantized()], m), lambda m: psc_lightning.compress(m, "binary")):
        with pytest.raises(ValueError, match=match):
            attempt(with_table(max_norm=1.0))
    with pytest.raises(AssertionError, match="training began"):
        fit([quantized(ignore="table")], with_table(max_norm=1.0))


# ------------------------------------------------------------------------------------------ what no optimizer holds


class Follower(Net):
    """A network and its moving average, which no optimizer holds."""

    def __init__(self, freeze: bool = False):
        super().__init__("sgd")
        self.average = Net().net.requires_grad_(not freeze)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.05)

    def on_train_batch_end(self, *args):
        with torch.no_grad():
            for mine, theirs in zip(self.average.parameters(), self.net.parameters()):
                mine.lerp_(theirs, 0.5)


OWN = ["net.0.weight", "net.3.weight", "net.7.weight"]


@pytest.mark.parametrize("freeze", [True, False])
def test_what_no_optimizer_holds_is_left_out_with_a_word(freeze):
    reason = r"\(frozen, while" if freeze else r"\(in no optimizer, while"
    callbacks = [quantized(), psc_lightning.MaskLearning(threshold=0.5, schedule="constant")]
    with pytest.warns(
        UserWarning, match=rf"^not compressed: average\.0\.weight {reason} others are trained\); "
    ) as caught:
        model, _ = fit(callbacks, Follower(freeze), max_epochs=1)
    assert sum("not compressed" in str(one.message) for one in caught) == 1
    assert [name for name, _, _ in slotted(model)] == OWN
    assert model.average[7].weight[0].unique().numel() > 3
    detach(model)  # makes nothing of it hard
    assert model.average[7].weight[0].unique().numel() > 3


def test_named_or_ignored_it_is_not_spoken_of():
    model, _ = fit([quantized(targets=["average.*.weight", "net"])], Follower(), max_epochs=1)
    assert [name for name, _, _ in slotted(model)] == [*OWN, *(name.replace("net", "average") for name in OWN)]
    fit([quantized(ignore="average")], Follower(), max_epochs=1)


def test_one_callback_may_take_what_another_leaves():
    """The mask is asked for the average, too; the levels are not, and are not there when slots are brought to strength."""
    mask = psc_lightning.MaskLearning(threshold=0.5, schedule="constant", targets=["average.*.weight", "net"])
    model, _ = fit([quantized(), mask], Follower(), max_epochs=1)
    assert {name: slots.method for name, slots, _ in slotted(model)} == {
        **dict.fromkeys(OWN, "magnitude+binary"),
        **{name.replace("net", "average"): "magnitude" for name in OWN},
    }


@pytest.mark.filterwarnings("ignore:.*configure_optimizers` returned `None`")
def test_optimizers_that_lightning_does_not_know_leave_nothing_out():
    class ByHand(Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return None

    model = ByHand()
    made = trainer([quantized()], max_epochs=1)
    made.fit(model, Loader(count=1), Loader(count=1))
    assert [place.name for place in conductor(made).cast.everywhere()] == OWN


def test_what_has_begun_goes_on_when_it_is_frozen_later():
    model, _ = fit([quantized()], max_epochs=1)
    model.net[3].requires_grad_(False)
    before = model.net[3].weight.clone()
    fit([quantized()], model, max_epochs=1)
    assert torch.equal(model.net[3].weight, before)
    assert [name for name, _, _ in slotted(model)] == OWN
