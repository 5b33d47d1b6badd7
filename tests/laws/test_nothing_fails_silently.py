"""Law 8: what cannot work is an error before the first step, and says what was expected, found, and to be done."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.utils.prune
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from training import QUIET, Net, fit, slotted

from psc_lightning import (
    GradientClipping,
    MaskLearning,
    Schedule,
    StraightThroughQuantization,
    WeightSharing,
    load,
    save,
)

pytestmark = QUIET

Q, M, W, C = StraightThroughQuantization, MaskLearning, WeightSharing, GradientClipping


class Untouched(Net):
    """A network in which a training step is a failure."""

    def training_step(self, batch, batch_idx):
        raise AssertionError("training began")


def refused(callbacks, match, model=None, kind=ValueError, **options):
    with pytest.raises(kind, match=match) as caught:
        fit(callbacks, model or Untouched(), **options)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize("argument", ["targets", "ignore"])
@pytest.mark.parametrize("pattern", ["net.4.weight", "Conv3d", "re:encoder.*", "encoder.*"])
def test_a_pattern_that_matches_nothing(argument, pattern):
    message = refused([M(**{argument: pattern})], f"{argument}: ")
    assert pattern in message
    assert "Conv2d" in message  # the types there are
    assert "net.3.weight" in message  # and the names


def test_a_near_miss_is_named():
    assert "did you mean" in refused([Q("binary", targets="net.3.weigth")], "net.3.weight")


def test_no_target_left():
    message = refused([M(min_size=10_000)], "leave no tensor to compress")
    assert all(part in message for part in ("2 Conv2d", "1 Linear", "1 BatchNorm2d", "fewer than 10000 entries"))


def test_everything_ignored():
    refused([M(targets="Linear", ignore="net.7")], "net.7.weight: ignored")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda m: torch.nn.utils.parametrizations.weight_norm(m.net[7]), "parametriz"),
        (lambda m: torch.nn.utils.prune.random_unstructured(m.net[7], "weight", 0.5), "pruned"),
        (lambda m: m.net[7].weight.data.fill_(float("nan")), "net.7.weight holds a value that is not a finite number"),
        (lambda m: m.net.__setitem__(7, nn.LazyLinear(4)), "lazy layer"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.filterwarnings("ignore:.*UninitializedParameter")
@pytest.mark.filterwarnings("ignore:A layer with UninitializedParameter")
def test_a_tensor_that_cannot_be_viewed(change, match):
    model = Untouched()
    change(model)
    refused([Q("binary", targets="re:net[.]7[.].*")], match, model)


def test_a_tying_that_cannot_be():
    refused([W("separable", targets="net.7.weight")], "net.7.weight cannot be tied by 'separable'")
    refused([W("cross_channel", groups=3)], "can tie none of the chosen tensors")


# -------------------------------------------------------------------------------------------------------- slots


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [M("magnitude"), M("movement", targets="net.3")],
        lambda: [Q("binary", targets="net.*"), Q("uniform", targets="net.7.weight")],
        lambda: [W("row"), W("column", targets="net.7")],
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_slot_filled_twice_names_both(callbacks, turned):
    made = callbacks()
    message = refused(made[::-1] if turned else made, "slot is filled by")
    assert all(callback.state_key in message for callback in made)
    assert any(name in message for name in ("net.3.weight", "net.7.weight"))


def test_other_options_for_a_slot_that_is_filled():
    model, _ = fit([Q("uniform", bits=4, schedule="constant")], max_steps=1)
    with pytest.raises(ValueError, match=r"call psc_lightning\.detach"):
        fit([Q("uniform", bits=5, schedule="constant")], model)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (lambda: [Q("binary")], "levels (binary)"),
        (lambda: [Q("ternary", targets="net.3.weight")], "no slots"),
        (lambda: [Q("ternary"), M(threshold=0.25)], "mask (magnitude, threshold=0.25"),
    ],
)
def test_a_resume_with_other_slots(now, said, tmp_path):
    made = fit([Q("ternary", schedule="constant")], max_epochs=1)[1]
    made.save_checkpoint(tmp_path / "model.ckpt")
    message = refused(now(), r"^net\.0\.weight: the checkpoint was trained with ", ckpt=tmp_path / "model.ckpt")
    assert f"levels (ternary), this run has {said}" in message
    assert "resume with the same callbacks, or start from its weights: model.load_state_dict(" in message


# --------------------------------------------------------------------------------------------------- optimizers


def test_an_optimizer_that_does_not_say_when_it_steps():
    class Ducks:
        def __init__(self, parameters):
            self.param_groups, self.state, self.defaults = [{"params": list(parameters), "lr": 0.1}], {}, {}

        def step(self, closure=None):
            return closure()

        def zero_grad(self, set_to_none=True):
            pass

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    class Own(Untouched):
        def configure_optimizers(self):
            return Ducks(self.parameters())

    refused([M()], "Ducks is no torch.optim.Optimizer: .*derive it from torch.optim.Optimizer", Own())


# ---------------------------------------------------------------------------------------------------- schedules


def test_an_endless_run_needs_steps():
    refused([Q("binary", schedule=Schedule(begin=0.5, end=0.7))], "give begin/end in steps", max_epochs=-1)
    fit([Q("binary", schedule=Schedule(begin=1, end=2))], max_epochs=-1, max_steps=3)


@pytest.mark.parametrize(
    ("callback", "step"),
    [
        (lambda: M(schedule={"kind": "constant", "begin": 99}), 99),
        (lambda: M("saliency", schedule={"kind": "constant", "begin": 50}), 50),
        (lambda: W("cross_channel", schedule={"kind": "constant", "begin": 50}), 50),
    ],
)
def test_a_slot_that_never_began_is_told(callback, step):
    made = callback()
    with pytest.warns(UserWarning, match=rf"{type(made).__name__}.* never began.* begins at step {step}"):
        fit([made])


def test_a_run_that_ends_in_mid_ramp_is_told():
    stop = EarlyStopping("val", mode="max", patience=1, min_delta=9.0)
    told = r"MaskLearning.* hardened in mid-ramp: .* step 24, at strength 0\.57"
    with pytest.warns(UserWarning, match="EarlyStopping may end"), pytest.warns(UserWarning, match=told):
        fit([M(schedule={"kind": "linear", "begin": 0.0, "end": 0.7}), stop], max_epochs=5, min_epochs=1)
    fit([M(schedule={"kind": "linear", "begin": 0.0, "end": 1.0})])  # a ramp to the very end is none of it


# ------------------------------------------------------------------------------------------------- constructors


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda v: M(v), ("method", "magnitud", None, 3)),
        (lambda v: M(threshold=v), ("threshold", 1.0, 1.5, -0.1, float("nan"), "0.5", True, None)),
        (lambda v: M(granularity=v), ("granularity", "filter", 4, None)),
        (lambda v: M(group=v), ("group", "layer", 0, -1, 1.5, True, None)),
        (lambda v: M(granularity="row", block=v), ("block", 0, 1.0, "4")),
        (lambda v: M(block=v), ("block", 4)),
        (lambda v: M("movement", score_lr=v), ("score_lr", -1.0, float("inf"), "fast")),
        (lambda v: M(score_lr=v), ("score_lr", 0.1)),
        (lambda v: M("saliency", calibration_steps=v), ("calibration_steps", 0, 1.5)),
        (lambda v: M("saliency", label=v), ("label", "first_order", 3)),
        (lambda v: M(label=v), ("label", "fisher")),
        (lambda v: M(refresh=v), ("refresh", 0, 2.0, True)),
        (lambda v: M(targets=v), ("targets", "", 3, [3], "re:(")),
        (lambda v: M(ignore=v), ("ignore", "", 3, [3])),
        (lambda v: M(min_size=v), ("min_size", -1, 1.5, "64")),
        (lambda v: M(schedule=v), ("schedule", "quadratic", 0.5, {"kind": "linear", "start": 0})),
        (lambda v: Q(v), ("levels", "int8", None, 8)),
        (lambda v: Q("uniform", bits=v), ("bits", 0, 9, -3, 4.0, "8", True)),
        (lambda v: Q("log", bits=v), ("bits", 1, 9)),
        (lambda v: Q("binary", bits=v), ("bits", 1)),
        (lambda v: Q("codebook", k=v), ("k", 1, 257, 16.0)),
        (lambda v: Q("uniform", k=v), ("k", 16)),
        (lambda v: Q("uniform", group=v), ("group", "row", 0, False)),
        (lambda v: Q("float16", group=v), ("group", "tensor")),
        (lambda v: Q("uniform", learned_step=v), ("learned_step", 1, "yes")),
        (lambda v: Q("binary", form=v), ("form", "10", 1)),
        (lambda v: Q("log", root=v), ("root", 3, 0, "2")),
        (lambda v: Q(scales=v), ("scales", "float64", 16)),
        (lambda v: Q("codebook", step_lr=v), ("step_lr", -1e-3, float("nan"))),
        (lambda v: W(v), ("method", "rows", None)),
        (lambda v: W("cross_channel", groups=v), ("groups", 1, 0, 2.0)),
        (lambda v: W("row", groups=v), ("groups", 2)),
        (lambda v: W("row", block=v), ("block", 0, 0.5)),
        (lambda v: W("separable", block=v), ("block", 3)),
        (lambda v: W("low_rank", rank=v), ("rank", 0, 1.0, 0.0, -0.5, "1", True)),
        (lambda v: W("cross_channel", labels=v), ("labels", "fisher", 1)),
        (lambda v: W("cross_channel", calibration_steps=v), ("calibration_steps", 0)),
        (lambda v: W("separable", factor_lr=v), ("factor_lr", -1.0)),
    ],
)
def test_a_wrong_value_names_its_argument(make, argument):
    name, *values = argument
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            make(value)


def test_random_constructions_work_or_name_the_argument(tmp_path):
    """Five hundred random configurations: one that is taken trains to a finite file, one that is not is told."""
    chance = random.Random(5)
    junk = [None, 0, -1, 3, 0.25, 1.0, "x", True]

    def pick(*good):
        return chance.choice(good) if chance.random() < 0.93 else chance.choice(junk)

    taken = []
    for _ in range(500):
        kind = chance.randrange(3)
        ramps = ({"kind": "cubic", "begin": 0, "end": 2}, {"kind": "cosine", "end": 0.5})  # three steps are trained
        common = {
            "schedule": pick("constant", "linear", {"kind": "constant", "begin": 0}, *ramps),
            "min_size": pick(0, 64, 100),
            "targets": pick(None, "net.*", ["Linear", "re:net[.]3[.]weight"]),
        }
        if kind == 0:
            options = {
                "method": pick("magnitude", "movement", "saliency"),
                "threshold": pick(0.0, 0.3, 0.99),
                "granularity": pick("element", "row", "column", "channel"),
                "group": pick("tensor", "channel", 5),
            }
            others = {"block": pick(1, 3, 1000), "calibration_steps": pick(1, 2), "label": pick("fisher")}
            options |= {key: others[key] for key in chance.sample(sorted(others), chance.choice([0, 0, 0, 1]))}
            if options["method"] == "saliency":
                options["calibration_steps"] = 1
        elif kind == 1:
            options = {"levels": pick("uniform", "log", "binary", "ternary", "codebook", "ttq", "float16", "bfloat16")}
            others = {"bits": pick(2, 5, 8), "group": pick("tensor", "channel", 7), "k": pick(2, 16, 256)}
            others |= {"form": pick("sign", "01"), "root": pick(1, 2, 8), "learned_step": pick(True, False)}
            options |= {key: others[key] for key in chance.sample(sorted(others), chance.randrange(3))}
        else:
            options = {"method": pick("row", "column", "cross_channel", "separable", "low_rank")}
            others = {
                "block": pick(1, 3, 1000),
                "groups": pick(2, 4),
                "rank": pick(1, 0.5),
                "labels": pick("magnitude"),
            }
            options |= {key: others[key] for key in chance.sample(sorted(others), chance.randrange(3))}
            if options["method"] == "cross_channel":
                options["calibration_steps"] = 1
        rate = ("score_lr", "step_lr", "factor_lr")[kind]
        common |= chance.choice([{}, {}, {}, {}, {rate: pick(0.0, 1e-3, 0.1)}])
        if kind < 2:
            common |= chance.choice([{}, {"refresh": pick(1, 2, 5)}])
        options |= common
        cls = (M, Q, W)[kind]
        try:
            taken.append((cls(**options), options))
        except ValueError as error:
            name = str(error).split(":")[0].split()[0]
            assert name in options, f"{cls.__name__}({options}): {error}"  # noqa: PT017
    assert 150 < len(taken) < 350, len(taken)
    for callback, options in taken:
        try:
            clipping = chance.choice([[], [C(max_norm=0.1, scope="layer")], [C(max_value=0.01)], [C(adaptive=0.05)]])
            model, _ = fit([callback, *clipping], max_steps=3, limit_val_batches=0)
        except ValueError as error:
            named = any(str(error).startswith(name) or f"{name}=" in str(error) for name in options)
            assert named, f"{options}: {error}"  # noqa: PT017
        else:
            assert all(slots.begun for _, slots, _ in slotted(model)), options
            assert all(tensor.isfinite().all() for tensor in model.state_dict().values()), options
            save(model, tmp_path / "model.psc")
            state = load(tmp_path / "model.psc")
            Net().load_state_dict(state)
            assert all(state[name].equal(weight) for name, _, weight in slotted(model)), options


def test_a_weight_without_values_is_refused_by_name():
    with torch.device("meta"):
        layer = nn.Linear(16, 16)
    model = Untouched()
    model.net = nn.Sequential(layer)
    with pytest.raises(ValueError, match=r"net\.0\.weight cannot be compressed: it is on the meta device"):
        M().attach(model)


@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_hide_whole_weights_are_refused(strategy):
    """Before anything is attached; the strategy is told by its name, which needs no device and no package."""
    model, callback = Untouched(), M()
    made = SimpleNamespace(strategy=type(strategy, (), {})(), callbacks=[callback])
    with pytest.raises(ValueError, match=rf"MaskLearning.*{strategy}.*ModelParallelStrategy"):
        callback.setup(made, model, "fit")
    assert not list(slotted(model))


def test_a_model_without_layers():
    model = Untouched()
    model.net = nn.Identity()
    refused([M()], "no layer with a parameter", model)
