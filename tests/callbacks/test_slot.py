"""What all slot callbacks share: their place in a run, and the stepping of what they train beside the weights."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch import nn
from training import (
    COMBINATIONS,
    INPUTS,
    LABELS,
    QUIET,
    CpuScaler,
    Loader,
    Net,
    Shown,
    conductor,
    differences,
    fit,
    latents,
    layers,
    run_state,
    sidecars,
    slots_at,
    slotted,
    trainer,
)

from psc_lightning import MaskLearning, StraightThroughQuantization, WeightSharing, detach, load, save
from psc_lightning.artifact import to_bytes
from psc_lightning.slots.live import compressed
from psc_lightning.slots.slots import SLOTS

pytestmark = QUIET

Q, M, W = StraightThroughQuantization, MaskLearning, WeightSharing
RAMP = {"kind": "linear", "begin": 4, "end": 12}


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUTS)


def steps_of(made, model):
    """How often what is trained beside each weight was stepped."""
    state = conductor(made).cast.sidecars.optimizer.state
    return {name: {int(state[p]["step"]) for p in slots.parameters()} for name, slots, _ in slotted(model)}


class Watch(Callback):
    """Calls a function after every batch and at every validation batch."""

    def __init__(self, look):
        self.look, self.calls = look, 0

    def on_train_batch_end(self, made, model, *args):
        self.calls += 1
        self.look(made, model)

    def on_validation_batch_end(self, made, model, *args):
        self.calls += 1
        self.look(made, model)


# ------------------------------------------------------------------------------------- what holds after every step


def hard(made, model, means=()):
    """Every slot that has begun is at full strength and holds its invariant; the Parameter has what it makes.

    Of a latent weight's mean, where the model holds an average.
    """
    for name, tensor, weight in compressed(model):
        slots, latent = tensor.slots, tensor.dense(weight)
        if name in means:
            slots, latent = slots.twin(), means[name]
            slots.refresh(latent)
        assert not slots.stale
        assert torch.equal(weight, slots.make(latent))
        effective = slots.layout.matrix(weight.detach())
        cores = slots.reduce(latent) if slots.begun else {}
        assert all(phase in (0, 2) for phase in slots.phase)
        for name, core in cores.items():
            chain, phase = slots.cores[name], slots.phase
            value = chain.levels.hard(core.detach()) if phase[2] else core.detach()
            if phase[1]:
                units = chain.mask.keep.numel() // (core[0].numel() if chain.mask.units.granularity == "channel" else 1)
                if chain.mask.units.granularity == "element" and chain.mask.group == "tensor":
                    zeros = int(chain.mask.threshold * units + 0.5)
                    assert int((~chain.mask.keep).sum()) == min(zeros, units - 1)
                value = chain.mask.hard(value)
                assert not value[~chain.mask.keep].any()
            if phase[2]:
                most = {"binary": 3, "ternary": 3, "codebook": 17, "uniform": 255, "log": 255}
                limit = most.get(slots.specs["levels"].method)
                group = getattr(chain.levels, "group", None)
                rows = value.reshape(value.shape[0], -1) if group == "channel" else value.reshape(1, -1)
                if limit and group in ("channel", "tensor"):
                    assert max(row.unique().numel() for row in rows) <= limit
        if slots.phase[0]:
            ties(slots, effective)


def ties(slots, weight):
    rows = weight.reshape(weight.shape[0], -1)
    method, block = slots.specs["tying"].method, getattr(slots.tying, "block", 0)
    if method == "row":
        for start in range(0, rows.shape[1], block):
            assert bool((rows[:, start : start + block] == rows[:, start : start + 1]).all())
    elif method == "column":
        for start in range(0, rows.shape[0], block):
            assert bool((rows[start : start + block] == rows[start : start + 1]).all())
    elif method == "cross_channel":
        first, *others = weight.chunk(slots.tying.groups, 1)
        assert all(torch.equal(first, other) for other in others)
    elif method == "separable":
        for column in weight.reshape(weight.shape[0], weight.shape[1], -1).unbind(1):
            assert int(torch.linalg.matrix_rank(column.double(), rtol=1e-5)) <= slots.tying.rank
    else:
        assert int(torch.linalg.matrix_rank(rows.double(), rtol=1e-5)) <= slots.tying.rank


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", COMBINATIONS)
def test_zeros_levels_and_ties_hold_after_every_step(name, optimizer):
    """Also in the ramp, at validation, and under weight decay and momentum, which would wear a mask off."""
    watch = Watch(hard)
    model, _ = fit([*COMBINATIONS[name](RAMP), watch], Net(optimizer), val_check_interval=6)
    assert watch.calls == 24 + 4 * 2
    assert all(slots.phase[SLOTS.index(slot)] == 2 for _, slots, _ in slotted(model) for slot in slots.specs)


# ------------------------------------------------------------------------------------------- stepping the sidecars


class Filtered(Net):
    """Decay for matrices, none for vectors."""

    def configure_optimizers(self):
        decay = [p for p in self.parameters() if p.dim() > 1]
        rest = [p for p in self.parameters() if p.dim() <= 1]
        adamw = torch.optim.AdamW([{"params": decay, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}], 1e-2)
        return [adamw], [{"scheduler": torch.optim.lr_scheduler.StepLR(adamw, 1, gamma=0.1), "interval": "epoch"}]


class Named(Net):
    """Only what the user knows by name."""

    def configure_optimizers(self):
        return torch.optim.SGD([p for name, p in self.named_parameters() if name.endswith(("weight", "bias"))], 0.05)


@pytest.mark.parametrize("cls", [Net, Filtered, Named])
def test_the_users_optimizer_keeps_the_plain_layout(cls):
    plain = cls()
    expected = group_names(plain, fit((), plain)[1])
    model = cls()
    _, made = fit(COMBINATIONS["separable_lsq"]("constant"), model)
    assert sidecars(model)
    assert group_names(model, made) == expected


def group_names(model, made):
    """What each group of the user's optimizer holds; a KeyError where it is no Parameter of the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in made.optimizers[0].param_groups]


@pytest.mark.parametrize("cls", [Net, Filtered, Named])
@pytest.mark.parametrize(("accumulate", "steps"), [(1, 24), (2, 12), (5, 6)])
def test_a_sidecar_is_stepped_once_per_optimizer_step(cls, accumulate, steps):
    """By our AdamW, without decay, whatever the user's optimizer filters; 5 does not divide the 12 batches."""
    changes = []

    def look(made, model):
        now = {name: parameter.detach().clone() for name, parameter in sidecars(model).items()}
        changes.append((made.global_step, now))

    callback = M("movement", threshold=0.5, schedule="constant")
    model, made = fit([callback, Watch(look)], cls() if cls is not Net else Net(steps=steps),
                      accumulate_grad_batches=accumulate, limit_val_batches=0)  # fmt: skip
    assert steps_of(made, model) == {f"net.{index}.weight": {steps} for index in (0, 3, 7)}
    assert [group["weight_decay"] for group in conductor(made).cast.sidecars.optimizer.param_groups] == [0.0]
    for (step, before), (now, after) in pairwise(changes):
        assert all(torch.equal(before[name], after[name]) == (step == now) for name in before)


def test_the_step_is_adamws_on_the_accumulated_gradient():
    """Replayed by hand: g·w of two batches' gradients, summed, into an AdamW of the same learning rate."""
    seen, scores = [], []

    class Gradients(Callback):
        def on_before_optimizer_step(self, made, model, optimizer):
            dense = latents(model)
            seen.append([(weight.grad * dense[name]).reshape(len(weight), -1) for name, _, weight in slotted(model)])

        def on_train_batch_end(self, made, model, *args):
            scores.append([p.detach().clone() for p in sidecars(model).values()])

    model = Filtered()
    fit([M("movement", score_lr=0.03, schedule="constant"), Gradients()], model, accumulate_grad_batches=2)
    replay = [nn.Parameter(torch.zeros_like(score)) for score in scores[0]]
    optimizer = torch.optim.AdamW(replay, lr=0.03, weight_decay=0.0)
    for step, gradients in enumerate(seen):
        optimizer.param_groups[0]["lr"] = 0.03 if step < 6 else 0.003  # the user's StepLR, after an epoch of six steps
        for parameter, gradient in zip(replay, gradients):
            parameter.grad = gradient
        optimizer.step()
        torch.testing.assert_close(
            replay, [nn.Parameter(score) for score in scores[2 * step + 1]], rtol=1e-5, atol=1e-7
        )


def test_sidecars_sleep_before_their_begin():
    """What a slot will train does not move before it is in force, and its optimizer has no state of then."""
    seen = {}

    def look(made, model):
        seen[made.global_step] = [p.detach().clone() for p in sidecars(model).values()]

    callbacks = COMBINATIONS["separable_lsq"]({"kind": "constant", "begin": 12})
    model, made = fit([*callbacks, Watch(look)])
    assert differences(seen[1], seen[12]) == []
    assert len(differences(seen[12], seen[13])) == len(seen[1])
    assert steps_of(made, model) == {f"net.{index}.weight": {12} for index in (0, 3, 7)}


class Bad(Named):
    """One batch has no finite gradient; the optimizer that gets it takes nothing of it."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 3 else loss

    def configure_optimizers(self):
        return Shown(self.parameters(), self.clean)

    def clean(self, optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.nan_to_num_(0, 0, 0)


def test_a_gradient_that_is_not_finite_is_skipped():
    """One bad batch: the plugin's step of that batch is left out, later ones are taken."""
    model, made = fit([M("movement", schedule="constant")], Bad(), max_epochs=1)
    assert set.union(*steps_of(made, model).values()) == {11}
    assert all(parameter.isfinite().all() for parameter in [*model.parameters(), *sidecars(model).values()])


def test_a_gradient_that_the_user_cleans_counts_as_what_is_left():
    """Sidecars' gradients come from those of the weights, after the user's hooks."""

    class Cleaned(Bad):
        def on_before_optimizer_step(self, optimizer):
            self.clean(optimizer)

    model, made = fit([M("movement", schedule="constant")], Cleaned(), max_epochs=1)
    assert set.union(*steps_of(made, model).values()) == {12}
    assert all(parameter.isfinite().all() for parameter in [*model.parameters(), *sidecars(model).values()])


class Two(Net):
    """Manual optimization: two optimizers, one for each half, with gradients of one another on the way."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self):
        return (
            torch.optim.AdamW(self.net[:6].parameters(), 1e-2, weight_decay=0.1),
            torch.optim.SGD(self.net[6:].parameters(), 0.05),
        )

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        first.step()
        if batch_idx % 2:
            second.step()
            second.zero_grad()
        first.zero_grad()


def test_manual_optimization_with_two_optimizers():
    """What is trained beside a weight is stepped when the weight is."""
    model, made = fit([M("movement", schedule="constant")], Two())
    assert made.global_step == 24 + 12
    assert steps_of(made, model) == {"net.0.weight": {24}, "net.3.weight": {24}, "net.7.weight": {12}}
    held = [id(p) for optimizer in made.optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    hard(made, model)


@pytest.mark.parametrize(("limits", "total"), [({}, 24 + 24), ({"max_steps": 30}, 30)])
def test_manual_optimization_counts_the_steps_of_all_optimizers(limits, total):
    """`global_step` does; a ramp to half of training ends there, not at a quarter."""

    class Both(Two):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, 1)

    strengths = {}
    callback = M(schedule={"kind": "linear", "begin": 0.0, "end": 0.5})
    made = fit([callback], Both(), **limits)[1]
    assert made.global_step == conductor(made).cast.total == total
    for step in (total // 2 - 2, total // 2):
        strengths[step] = callback.schedule.strength(step, total)
    assert list(strengths.values()) == [pytest.approx(1 - 2 / (total // 2)), 1.0]


def test_scaled_gradients_are_brought_back():
    """A GradScaler leaves the sidecars' gradients scaled; a step from them must be the unscaled run's."""
    runs = []
    for plugins in ([], [CpuScaler()]):
        seen = []
        watch = Watch(
            lambda made, model, seen=seen: seen.append([p.detach().clone() for p in sidecars(model).values()])
        )
        model, _ = fit([M("movement", threshold=0.5, schedule="constant"), watch], Net(), plugins=plugins)
        runs.append((seen, model))
    (plain, model), (scaled, other) = runs
    torch.testing.assert_close(plain, scaled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.net[3].weight, other.net[3].weight, rtol=1e-4, atol=1e-5)


class Late(Net):
    """Builds its layers in a hook, once or at each call."""

    def __init__(self, idempotent=True, **options):
        super().__init__(**options)
        self.idempotent = idempotent
        del self.net

    def build(self):
        if not (self.idempotent and hasattr(self, "net")):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.net = layers()


class InSetup(Late):
    def setup(self, stage):
        self.build()


class InConfigureModel(Late):
    def configure_model(self):
        self.build()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("cls", [Net, InConfigureModel])
@pytest.mark.parametrize("name", ["separable_lsq", "deep", "saliency", "ternary_movement"])
def test_sidecars_stay_float32(precision, cls, name):
    model, _ = fit(COMBINATIONS[name](RAMP), cls(), precision=precision)
    ours = [value for _, slots, _ in slotted(model) for value in slots.state_dict().values()]
    assert torch.float32 in {value.dtype for value in ours} <= {torch.float32, torch.uint8, torch.int32}
    expected = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {weight.dtype for _, _, weight in slotted(model)} == {expected}
    assert {latent.dtype for latent in latents(model).values()} == {expected}
    if precision != "bf16-true":
        hard(None, model)


def test_a_bf16_model_is_what_its_file_holds(tmp_path):
    model, _ = fit(COMBINATIONS["separable_lsq"](RAMP), precision="bf16-true")
    save(model, tmp_path / "model.psc")
    state = load(tmp_path / "model.psc")
    assert all(torch.equal(state[name], weight) for name, _, weight in slotted(model))


# -------------------------------------------------------------------------------------------------- life of a model


@pytest.mark.parametrize("late", [InSetup, InConfigureModel])
@pytest.mark.parametrize("idempotent", [True, False])
def test_layers_built_late_are_compressed_alike(late, idempotent):
    expected, plain = fit(COMBINATIONS["separable_lsq"](RAMP))
    model, made = fit(COMBINATIONS["separable_lsq"](RAMP), late(idempotent))
    assert to_bytes(model)[0] == to_bytes(expected)[0]
    if idempotent:
        assert made.test(model, Loader(count=2), verbose=False) == plain.test(expected, Loader(count=2), verbose=False)


@pytest.mark.parametrize("late", [InSetup, InConfigureModel])
def test_layers_built_late_without_a_target_are_told(late):
    """When they are there, and before training."""
    with pytest.raises(ValueError, match=r"leave no tensor to compress.* 2 Conv2d, .*fewer than 10000 entries"):
        fit([M(min_size=10_000)], late())
    with pytest.raises(ValueError, match=r"targets: 'net\.4\.weight' matches no tensor"):
        fit([M(targets="net.4.weight")], late())


@pytest.mark.parametrize("late", [InSetup, InConfigureModel])
@pytest.mark.parametrize("idempotent", [True, False])
def test_layers_built_late_resume(late, idempotent, tmp_path):
    """They are there before a checkpoint is put into them; which the plain class reads."""

    def run(folder, ckpt=None):
        keep = -1 if ckpt is None else 0  # a resumed run saves nothing
        saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=keep)
        return fit([*COMBINATIONS["separable_lsq"](RAMP), saver], late(idempotent), ckpt=ckpt)

    model, made = run(tmp_path / "whole")
    for step in (3, 9):
        found = run(tmp_path / "resumed", tmp_path / "whole" / f"step={step}.ckpt")
        assert differences(run_state(model, made), run_state(*found)) == []
        assert to_bytes(found[0])[0] == to_bytes(model)[0]
    plain = Net()
    plain.load_state_dict(torch.load(tmp_path / "whole/step=24.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(logits(plain), logits(model))


def test_fit_validate_test_fit():
    """The second fit goes on from the first, under the same callbacks; what is between changes nothing."""
    model, made = fit(COMBINATIONS["float"](RAMP), Net("sgd"))
    before = to_bytes(model)[0]
    (validated,) = made.validate(model, Loader(count=2), verbose=False)
    assert validated["val"] == made.callback_metrics["val"]
    made.test(model, Loader(count=2), verbose=False)
    assert to_bytes(model)[0] == before
    made.fit_loop.max_epochs = 4
    made.fit(model, Loader(), Loader(count=2))
    assert made.global_step == 48
    assert to_bytes(model)[0] != before
    hard(None, model)
    assert all(slots.phase[1:] == [2, 2] for _, slots, _ in slotted(model))


@pytest.mark.parametrize("name", ["row", "separable_lsq", "cross_channel", "deep"])
def test_a_trained_model_goes_through_its_schedule_again(name):
    """A second Trainer begins at step 0, where every slot is off, also those that wait for a tying."""
    callbacks, off = COMBINATIONS[name](RAMP), []

    class Begins(Callback):
        def on_train_batch_end(self, made, model, *args):
            if made.global_step == 1:
                off.append([slots.begun for _, slots, _ in slotted(model)])

    model, _ = fit(callbacks)
    model, made = fit([*callbacks, Begins()], model)
    assert off == [[False] * 3]
    hard(made, model)
    assert all(slots.begun for _, slots, _ in slotted(model))


def test_one_callback_in_two_trainers():
    callbacks = COMBINATIONS["ternary_movement"](RAMP)
    first, made = fit(callbacks)
    expected = run_state(first, made)
    second, made = fit(callbacks)
    assert differences(expected, run_state(second, made)) == []
    assert to_bytes(first)[0] == to_bytes(second)[0]


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"fast_dev_run": 3}, {"barebones": True, "max_epochs": 2}])
@pytest.mark.filterwarnings("ignore:.*barebones.*")
@pytest.mark.filterwarnings("ignore:.*log.* in your module")
def test_dry_and_bare_runs(options):
    model = Net()
    bare = {"accelerator": "cpu", "callbacks": COMBINATIONS["separable_lsq"]("constant"), **options}
    if "fast_dev_run" in options:
        made = trainer(**{**bare, "enable_checkpointing": False})
    else:
        from lightning.pytorch import Trainer

        made = Trainer(**bare)
    made.fit(model, Loader(), Loader(count=2))
    hard(made, model)
    assert all(slots.begun for _, slots, _ in slotted(model))
    to_bytes(model)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_a_hard_model(error, tmp_path):
    class Stopped(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.trainer.global_step == 7:  # in the ramp
                assert any(1 in slots.phase for _, slots, _ in slotted(self))
                raise error("stop")
            return loss

    model = Stopped()
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fit(COMBINATIONS["ternary_movement"](RAMP), model)
    hard(None, model)
    assert all(row.unique().numel() <= 3 for row in model.net[3].weight.reshape(8, -1))
    save(model, tmp_path / "model.psc")  # a warning that it was soft would be an error here
    plain = Net()
    plain.load_state_dict(load(tmp_path / "model.psc"))
    assert torch.equal(logits(plain), logits(model))


def test_two_callbacks_on_different_tensors():
    model, _ = fit(
        [
            M("magnitude", threshold=0.25, targets="net.0", schedule="constant"),
            M("magnitude", threshold=0.75, targets="net.7", schedule="constant"),
            Q("binary", targets=["re:net[.]3[.]weight"], schedule="constant"),
        ]
    )
    assert [int(model.net[i].weight.eq(0).sum()) for i in (0, 3, 7)] == [36, 0, 384]
    assert {name: slots.method for name, slots, _ in slotted(model)} == {
        "net.0.weight": "magnitude",
        "net.3.weight": "binary",
        "net.7.weight": "magnitude",
    }


def test_two_callbacks_told_apart_by_what_they_ignore():
    callbacks = [
        M("magnitude", threshold=0.25, ignore="Linear", schedule="constant"),
        M("magnitude", threshold=0.75, ignore="Conv2d", schedule="constant"),
    ]
    model, _ = fit(callbacks)
    assert [int(model.net[i].weight.eq(0).sum()) for i in (0, 3, 7)] == [36, 144, 384]
    assert len({callback.state_key for callback in callbacks}) == 2
    assert "ignore" not in M().state_key


def test_frozen_weights_stay_while_their_slots_act():
    """Mask and levels apply to a frozen layer, its scores learn, its latent weight keeps every bit."""
    model = Net("sgd")
    model.net[3].weight.requires_grad_(False)
    before = model.net[3].weight.clone()
    fit([M("movement", threshold=0.5, targets=["net.3", "net.7"], schedule="constant"), Q("ternary", schedule="constant")],
        model)  # fmt: skip
    assert torch.equal(latents(model)["net.3.weight"], before)
    assert not model.net[3].weight.requires_grad
    assert model.net[3].weight.grad is None
    assert int(model.net[3].weight.eq(0).sum()) >= 288
    assert all(parameter.detach().ne(0).any() for parameter in sidecars(model).values())


def test_detached_after_a_fit_it_trains_on(tmp_path):
    model, _ = fit(COMBINATIONS["cross_channel"](RAMP))
    expected = logits(model)
    twin = copy.deepcopy(model)
    detach(twin)
    assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)  # the original has its slots still, and is hard
    assert not list(slotted(twin))
    assert len(list(slotted(model))) == 3
    fit((), twin.train(), max_epochs=1)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)


def test_refresh_waits_its_steps():
    """With refresh=4 the mask is chosen anew after every fourth step only."""
    seen = []

    def look(made, model):
        seen.append(slots_at(model, "net.3.weight").cores["core"].mask.keep.clone())
        assert torch.equal(seen[-1].reshape(-1), model.net[3].weight.ne(0).reshape(-1))

    fit([M("magnitude", threshold=0.5, refresh=4, schedule="constant"), Watch(look)], Net("sgd"), limit_val_batches=0)
    changed = [step + 1 for step in range(1, 24) if not torch.equal(seen[step - 1], seen[step])]
    assert changed
    assert all(step % 4 == 0 for step in changed)


# ------------------------------------------------------------------------------------------------------- beside others


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["float", "deep", "column", "low_rank"])
def test_an_average_is_compressed_too(name, first, tmp_path):
    """Before us or after us: it validates, is saved, and is left at the end as an averaged model that is hard."""
    validated = []

    class Look(Callback):
        def on_validation_batch_end(self, made, model, *args):
            (average,) = conductor(made).averages
            hard(made, model, average.latents)
            validated.append(model.net[3].weight.detach().clone())

    saver, average = ModelCheckpoint(dirpath=tmp_path, filename="last"), EMAWeightAveraging(decay=0.6)
    ours = COMBINATIONS[name](RAMP)
    model, made = fit([*([average, *ours] if first else [*ours, average]), Look(), saver])
    assert len(validated) == 4
    hard(made, model)
    assert torch.equal(model.net[3].weight, validated[-1])
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    plain = Net()
    plain.load_state_dict(state)
    assert torch.equal(state["net.3.weight"], validated[-1])
    assert torch.equal(logits(plain), logits(model))
    save(model, tmp_path / "model.psc")
    assert torch.equal(load(tmp_path / "model.psc")["net.3.weight"], state["net.3.weight"])
    single, _ = fit(COMBINATIONS[name](RAMP))
    assert not torch.equal(single.net[3].bias, model.net[3].bias)


@pytest.mark.parametrize("name", ["float", "row", "deep"])
def test_a_running_mean_of_all_steps(name, tmp_path):
    """Lightning's default: a mean of all steps, formed by subtraction, buffers included."""
    model, made = fit([*COMBINATIONS[name](RAMP), WeightAveraging()])
    hard(made, model)
    save(model, tmp_path / "model.psc")
    state = load(tmp_path / "model.psc")
    assert all(torch.equal(state[name], weight) for name, _, weight in slotted(model))
    single, _ = fit(COMBINATIONS[name](RAMP))
    assert not torch.equal(single.net[3].bias, model.net[3].bias)


def test_any_order_of_an_average_and_us():
    files = set()
    for place in range(3):
        callbacks = COMBINATIONS["float"](RAMP)
        callbacks.insert(place, EMAWeightAveraging(decay=0.6))
        files.add(to_bytes(fit(callbacks)[0])[0])
    assert len(files) == 1


def test_the_average_is_of_latent_weights():
    """By hand: the first latent weight, then 0.6 of the mean and 0.4 of each next one; what is hard of it is the end."""
    means = {}

    class Follow(Callback):
        def on_train_batch_end(self, made, model, *args):
            for name, latent in latents(model).items():
                means[name] = 0.6 * means[name] + 0.4 * latent if name in means else latent

    callbacks = [M("magnitude", threshold=0.5, schedule="constant"), Q("ternary", schedule="constant")]
    model, made = fit([*callbacks, Follow(), EMAWeightAveraging(decay=0.6)], Net("sgd"))
    (average,) = conductor(made).averages
    assert list(average.latents) == list(means)
    for name, tensor, weight in compressed(model):
        torch.testing.assert_close(average.latents[name], means[name], rtol=1e-5, atol=1e-7)
        assert torch.equal(tensor.latent, average.latents[name])
        assert weight[0].unique().numel() == 3
    torch.testing.assert_close(model.net[3].bias, dict(average_of(made).named_parameters())["net.3.bias"])


def average_of(made):
    (averaging,) = (callback for callback in made.callbacks if isinstance(callback, WeightAveraging))
    return averaging._average_model.module


@pytest.mark.parametrize(("accumulate", "steps"), [(1, (3, 9, 12, 17)), (2, (2, 5, 6, 9))])
@pytest.mark.parametrize("name", ["float", "deep", "channels"])
def test_a_run_with_an_average_resumes(name, accumulate, steps, tmp_path):
    """Parameters, sidecars, metrics, all optimizers, the file: bit for bit."""

    def run(folder, ckpt=None):
        keep = -1 if ckpt is None else 0  # a resumed run saves nothing
        saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=keep)
        callbacks = [*COMBINATIONS[name]({**RAMP, "begin": 3}), EMAWeightAveraging(decay=0.6), saver]
        return fit(callbacks, Net(steps=24 // accumulate), ckpt=ckpt, accumulate_grad_batches=accumulate)

    model, made = run(tmp_path / "whole")
    expected, file = run_state(model, made), to_bytes(model)[0]
    for step in steps:
        model, made = run(tmp_path / "resumed", tmp_path / "whole" / f"step={step}.ckpt")
        assert differences(expected, run_state(model, made)) == [], step
        assert to_bytes(model)[0] == file, step


class Backbone(Net):
    def __init__(self):
        super().__init__()
        self.backbone = self.net[:4]

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-3, weight_decay=0.1)


@pytest.mark.parametrize("first", [True, False])
def test_what_a_finetuning_callback_unfreezes_stays_ours(first, tmp_path):
    found = []

    def look(made, model):
        found.append({name for group in group_names(model, made) for name in group})

    callback = M("movement", schedule="constant", score_lr=0.01)
    others = [BackboneFinetuning(1, train_bn=False), Watch(look)]
    model, made = fit([callback, *others] if first else [*others, callback], Backbone())
    start, rest = ({f"net.{i}.{part}" for i in which for part in ("weight", "bias")} for which in ((1, 7), (0, 3)))
    assert found == [start] * 14 + [start | rest] * 14  # twelve batches and two of validation, twice
    assert len(made.optimizers[0].param_groups) == 2
    assert all(parameter.detach().ne(0).any() for parameter in sidecars(model).values())


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("stop", [7, 12, 17])
def test_backbone_fine_tuning_resumes(first, stop, tmp_path):
    """From after the unfreezing, too, where Lightning puts noted groups back; but it leaves frozen what was unfrozen."""

    def run(ckpt=None, keep=False):
        ours = COMBINATIONS["ternary_movement"](RAMP)
        others = [BackboneFinetuning(1, train_bn=False)]
        save = Watch(lambda made, model: keep and made.global_step == stop and made.save_checkpoint(tmp_path / "ckpt"))
        made = fit([*ours, *others, save] if first else [*others, *ours, save], Backbone(), ckpt=ckpt)
        return made[0], run_state(*made)

    model, expected = run(keep=True)
    resumed, found = run(ckpt=tmp_path / "ckpt")
    sizes = [[len(group["params"]) for group in state["optimizers"][0]["param_groups"]] for state in (expected, found)]
    assert sizes == [[4, 4], [4, 4]]
    if stop != 17:  # there a plain run does not resume bit-equal either
        assert differences(expected, found) == []
        assert to_bytes(model)[0] == to_bytes(resumed)[0]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_other_stages_attach_nothing(stage):
    model = Net()
    made = trainer([Q("binary")])
    getattr(made, stage)(model, Loader(count=1), verbose=False)
    assert not list(slotted(model))
    assert [type(callback) for callback in made.callbacks] == [Q]
    assert list(model.state_dict()) == list(Net().state_dict())


def test_the_data_are_the_tests():
    """A check of the tests: the labels can be learned, so that losses, gradients and scores are alive."""
    model, _ = fit((), Net("sgd"), max_epochs=3)
    loss = nn.functional.cross_entropy(model.eval()(INPUTS), LABELS)
    assert loss < 1.3 < nn.functional.cross_entropy(Net().eval()(INPUTS), LABELS)


def test_an_average_is_hard_before_its_first_update(tmp_path):
    """One that starts late is judged and saved as the model was at the start, made hard."""
    seen = []

    class Look(Callback):
        def on_validation_batch_end(self, made, model, *args):
            rows = model.net[3].weight.detach().flatten(1)
            seen.append((made.global_step, max(row.unique().numel() for row in rows)))

    late = EMAWeightAveraging(decay=0.6, update_starting_at_step=18)
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    fit([Q("uniform", bits=2, schedule="constant"), late, Look(), saver], val_check_interval=6)
    assert [step for step, _ in seen[::2]] == [6, 12, 18, 24]
    assert max(values for _, values in seen) <= 3
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert max(row.unique().numel() for row in state["net.3.weight"].flatten(1)) <= 3
