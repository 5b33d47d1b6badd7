from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import psc_lightning
from psc_lightning import MaskLearning, StraightThroughQuantization, WeightSharing
from psc_lightning.slots.live import held
from psc_lightning.slots.targets import patterns, select


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.lstm = nn.LSTM(8, 8)
        self.head = nn.Linear(8, 10)
        self.tiny = nn.Linear(3, 3)
        self.register_buffer("table", torch.zeros(16, 16))


ALL = ["encoder.0.weight", "encoder.2.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"]


def chosen(model: nn.Module | None = None, **how: object) -> list[str]:
    return [target.name for target in select(Net() if model is None else model, **how).targets]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, ALL),
        (["*"], ALL),
        (["encoder.*"], ALL[:2]),
        (["encoder"], ALL[:2]),  # a module means its weights
        (["encoder.2"], ALL[1:2]),
        (["enc*.2"], ALL[1:2]),
        (["*.weight"], [ALL[0], ALL[1], ALL[4]]),
        (["re:lstm\\.weight_.*"], ALL[2:4]),
        (["re:.*hh_l[0-9]"], ALL[3:4]),
        (["Conv2d"], ALL[:2]),
        (["_ConvNd", "Linear"], [ALL[0], ALL[1], ALL[4]]),  # subclasses are included
        (["RNNBase"], ALL[2:4]),
        (["tiny"], ["tiny.weight"]),  # named exactly: its size does not matter
        (["tiny.weight"], ["tiny.weight"]),
        (["tiny.bias"], ["tiny.bias"]),  # nor its axes
        (["head", "encoder.0.weight"], [ALL[0], ALL[4]]),  # in the model's order
    ],
)
def test_patterns(targets: list[str] | None, expected: list[str]):
    assert chosen(targets=targets) == expected


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"ignore": ["LSTM"]}, [ALL[0], ALL[1], ALL[4]]),
        ({"ignore": ["encoder.0", "re:lstm.*"]}, [ALL[1], ALL[4]]),
        ({"targets": ["encoder"], "ignore": ["encoder.0.weight"]}, ALL[1:2]),
        ({"min_size": 256}, [ALL[1], ALL[2], ALL[3]]),
        ({"min_size": 0}, [*ALL, "tiny.weight"]),
    ],
)
def test_ignore_and_min_size(how: dict[str, object], expected: list[str]):
    assert chosen(**how) == expected


def test_a_layer_that_is_the_model():
    assert chosen(nn.Linear(8, 16)) == ["weight"]
    assert chosen(nn.Linear(8, 16), targets=["weight"]) == ["weight"]


def test_what_is_left_says_why():
    skipped = select(Net(), targets=["encoder", "tiny*"], ignore=["encoder.2"]).skipped
    assert skipped["encoder.2.weight"] == "ignored"
    assert skipped["encoder.0.bias"] == "not among the targets" or skipped["encoder.0.bias"] == "one axis"
    assert skipped["tiny.weight"] == "fewer than 64 entries"
    assert skipped["head.weight"] == "not among the targets"
    assert "table" not in skipped  # a buffer is no candidate at all


# ------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("argument", ["targets", "ignore"])
def test_a_pattern_that_matches_nothing_is_named_with_what_comes_near(argument: str):
    with pytest.raises(ValueError, match=r"^\w+: 'encoder\.0\.weigth' matches no") as error:
        select(Net(), **{argument: ["encoder", "encoder.0.weigth"]})
    message = str(error.value)
    assert message.startswith(argument)
    assert "did you mean encoder.0.weight" in message
    assert "Conv2d" in message
    with pytest.raises(ValueError, match=r"targets: 'Conv3d' matches no.*did you mean Conv2d"):
        select(Net(), targets=["Conv3d"])
    with pytest.raises(ValueError, match=r"'table' matches no tensor, module or layer type\. The tensors are "):
        select(Net(), targets=["table"])


def test_when_all_is_excluded():
    with pytest.raises(ValueError, match=r"min_size=9999 leave no tensor to compress.*2 Linear.*fewer than 9999"):
        select(Net(), min_size=9999)
    with pytest.raises(ValueError, match=r"ignore=\['\*'\].*leave no tensor.*ignored"):
        select(Net(), targets=["head"], ignore=["*"])
    with pytest.raises(ValueError, match="no layer with a parameter"):
        select(nn.ReLU())


@pytest.mark.parametrize("value", [3, [3], [""], "", ["re:("], "re:*"])
def test_a_wrong_pattern_names_its_argument(value: object):
    for build in (
        lambda: MaskLearning(targets=value),
        lambda: WeightSharing("row", targets=value),
        lambda: StraightThroughQuantization(targets=value),
    ):
        with pytest.raises(ValueError, match=r"^targets: "):
            build()
    with pytest.raises(ValueError, match=r"^ignore: "):
        MaskLearning(ignore=value)


def test_patterns_as_a_user_writes_them():
    assert patterns("targets", nn.Conv2d) == ["Conv2d"]
    assert patterns("targets", (nn.Conv2d, "head")) == ["Conv2d", "head"]
    assert patterns("targets", "head") == ["head"]
    assert patterns("targets", None) is None


# -------------------------------------------------------------------------------------------------------- refusals


def test_not_finite_is_refused_by_name():
    model = Net()
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"head\.weight holds a value that is not a finite number"):
        select(model)
    assert chosen(model, ignore=["head"]) == ALL[:4]


def weight_normed() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(8, 16))


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(8, 16))


def pruned() -> nn.Module:
    from torch.nn.utils import prune

    layer = nn.Linear(8, 16)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def lazy() -> nn.Module:
    return nn.LazyLinear(16)


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (weight_normed, "layer.parametrizations.weight.original1", "remove the parametrization first"),
        (old_weight_norm, "layer.weight_v", "remove that first"),
        (pruned, "layer.weight_orig", "remove that first"),
        (lazy, "layer.weight", "run one batch through the model first"),
    ],
)
def test_layers_that_cannot_be_compressed(make: object, name: str, message: str):
    model = nn.ModuleDict({"layer": make(), "other": nn.Linear(8, 16)})
    for targets in (None, [name]):
        with pytest.raises(ValueError, match=rf"^{name} cannot be compressed: .*{message}, .*ignore='{name}'"):
            select(model, targets=targets)
    selection = select(model, ignore=["layer.*"])
    assert [target.name for target in selection.targets] == ["other.weight"]
    assert selection.skipped[name] == "ignored"


def test_other_kinds_of_tensor_are_refused():
    class Special(torch.Tensor):
        pass

    model = nn.Linear(8, 16)
    model.weight = nn.Parameter(torch.randn(16, 8).as_subclass(Special))
    with pytest.raises(ValueError, match="weight cannot be compressed: it is a Special, not a plain tensor"):
        select(model, targets=["weight"])
    model.weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"it holds torch\.int8, not floating-point numbers"):
        select(model, targets=["weight"])
    model.weight = nn.Parameter(torch.zeros(16, 0))
    with pytest.raises(ValueError, match="leave no tensor to compress"):
        select(model, targets=["weight"])


def test_our_own_sidecars_are_never_targets():
    model = Net()
    MaskLearning("movement").attach(model)
    StraightThroughQuantization("codebook").attach(model)
    assert chosen(model, min_size=0) == [*ALL, "tiny.weight"]
    assert select(model).skipped == select(Net()).skipped
    with pytest.raises(ValueError, match="matches no"):
        select(model, targets=["re:.*scores"])


# ----------------------------------------------------------------------------------------------------- tied weights


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 8), "body": nn.Linear(8, 8), "head": nn.Linear(8, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def test_a_tied_parameter_is_one_target_with_two_holders():
    model = tied()
    first, _ = select(model).targets
    assert (first.name, [layer for layer, _ in first.holders]) == ("embed.weight", [model["embed"], model["head"]])
    callback = StraightThroughQuantization("ternary")
    places = callback.attach(model)
    assert held(model["embed"], "weight") is held(model["head"], "weight") is places[0].tensor
    assert [place.name for place in places] == ["embed.weight", "body.weight"]


@pytest.mark.parametrize("pattern", ["head", "head.weight", "he*", "re:head.*", "Linear"])
def test_a_tied_parameter_answers_to_each_of_its_names(pattern: str):
    model = tied()
    assert chosen(model, targets=[pattern])[0] == "embed.weight"
    if pattern == "Linear":  # the body, too
        with pytest.raises(ValueError, match=r"embed\.weight: ignored; body\.weight: ignored"):
            chosen(model, ignore=[pattern], min_size=0)
    else:
        assert chosen(model, ignore=[pattern], min_size=0) == ["body.weight"]
    if pattern in ("head", "head.weight"):
        assert select(model, targets=[pattern], min_size=999).targets[0].exact


def test_a_layer_with_two_names_answers_to_both():
    layer = nn.Linear(8, 16)
    model = nn.ModuleDict({"a": layer, "b": layer})
    for name in ("a", "b", "b.weight"):
        (target,) = select(model, targets=[name]).targets
        assert target.name == "a.weight"
        assert len(target.holders) == 1


# ---------------------------------------------------------------------------------------- where a tying does not apply


def test_a_tying_is_skipped_where_it_does_not_apply_and_an_exact_name_is_an_error():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 16))
    selection = WeightSharing("separable").choose(model)
    assert [target.name for target in selection.targets] == ["0.weight"]
    assert selection.skipped["2.weight"] == (
        "separable does not apply: it has no kernel of two or more entries to separate"
    )
    with pytest.raises(ValueError, match=r"targets: 2\.weight cannot be tied by 'separable': it has no kernel"):
        WeightSharing("separable", targets=["0", "2.weight"]).choose(model)
    with pytest.raises(ValueError, match=r"method='separable' can tie none of the chosen tensors\. 2\.weight: "):
        WeightSharing("separable", targets="Linear").choose(model)
    with pytest.raises(ValueError, match="3 input channels are not divisible by groups=2"):
        WeightSharing("cross_channel", groups=2, targets="Conv2d").choose(nn.Sequential(nn.Conv2d(3, 8, 3)))


# -------------------------------------------------------------------------------------------- what defaults leave out


class Pupil(nn.Module):
    """A network with a frozen teacher, and the Parameters that are nobody's weight of a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        self.teacher = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).requires_grad_(False)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 64))
        self.pos_embed = nn.Parameter(torch.randn(1, 9, 64))
        self.relative_position_bias_table = nn.Parameter(torch.randn(49, 4))
        self.layer_scale = nn.Parameter(torch.randn(96, 1, 1))
        self.norm = nn.LayerNorm((8, 8))
        self.spectrum = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))


OWN = ["net.0.weight", "net.2.weight"]
ALIEN = "no layer's weight: Pupil is no known layer type, nor is it called weight"
NO_MATRIX = "no matrix: at most one axis is longer than 1"
LEFT = {
    "teacher.0.weight": "frozen, while others are trained",
    "teacher.2.weight": "frozen, while others are trained",
    "cls_token": NO_MATRIX,
    "pos_embed": ALIEN,
    "relative_position_bias_table": ALIEN,
    "layer_scale": NO_MATRIX,
    "norm.weight": "the scale of a LayerNorm",
    "norm.bias": "the scale of a LayerNorm",
    "spectrum": "complex numbers",
}


def test_what_is_not_trained_or_no_layers_weight_is_left_out_with_the_reason():
    selection = select(Pupil())
    assert [target.name for target in selection.targets] == OWN
    assert {name: reason for name, reason in selection.skipped.items() if reason != "one axis"} == LEFT
    plan = psc_lightning.plan(Pupil(), [StraightThroughQuantization("binary")])
    assert list(plan.taken) == OWN
    for name, reason in LEFT.items():
        assert f"  {name}: {reason}\n" in f"{plan}\n"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["teacher.*"], ["teacher.0.weight", "teacher.2.weight"]),
        (["teacher"], ["teacher.0.weight", "teacher.2.weight"]),
        (["teacher.2"], ["teacher.2.weight"]),
        (["pos_embed"], ["pos_embed"]),
        (["*_table", "re:cls.*"], ["cls_token", "relative_position_bias_table"]),
        (["layer_scale"], ["layer_scale"]),
        (["norm"], ["norm.weight", "norm.bias"]),
        (["Linear"], OWN),  # a type names no tensor: the teacher's stay
        (["Pupil"], ["pos_embed", "relative_position_bias_table"]),  # the type that owns them is known, then
    ],
)
def test_what_is_named_is_taken(targets: list[str], expected: list[str]):
    assert chosen(Pupil(), targets=targets) == expected


def test_complex_weights_are_refused_where_they_are_named():
    with pytest.raises(ValueError, match=r"spectrum cannot be compressed: it holds torch\.complex64"):
        select(Pupil(), targets=["spectrum"])


def test_a_frozen_model_is_compressed_whole():
    """Where nothing is trained, or only what is no weight (biases), frozen is no reason."""
    model = Pupil().requires_grad_(False)
    assert chosen(model) == [*OWN, "teacher.0.weight", "teacher.2.weight"]
    model.net[0].bias.requires_grad_(True)
    assert chosen(model) == [*OWN, "teacher.0.weight", "teacher.2.weight"]
    model.net[0].weight.requires_grad_(True)
    assert chosen(model) == OWN[:1]


def test_compress_says_what_large_weights_it_leaves():
    model = Pupil()
    with pytest.warns(
        UserWarning, match=r"^not compressed: pos_embed \(no layer's weight.*; teacher\.0\.weight \(frozen"
    ):
        psc_lightning.compress(model, "binary")
    assert model.teacher[0].weight.unique().numel() == 512
    assert model.net[0].weight[0].unique().numel() == 2


class Own(nn.Module):
    """A layer of one's own; it calls its weight so, or not."""

    def __init__(self, name: str, shape: tuple[int, ...] = (16, 16)) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))


@pytest.mark.parametrize("name", ["weight", "weight_mu", "qkv_weight"])
def test_a_layer_of_ones_own_is_known_by_what_it_calls_its_weight(name: str):
    assert chosen(Own(name)) == [name]
    with pytest.raises(ValueError, match="no matrix"):
        chosen(Own(name, (64, 1, 1)))
    assert chosen(nn.Linear(64, 1)) == ["weight"]  # one output's


@pytest.mark.parametrize("name", ["weights", "kernel", "unweighted"])
def test_and_not_by_other_names(name: str):
    with pytest.raises(ValueError, match=r"no layer's weight: Own is no known layer type"):
        chosen(Own(name))
    assert chosen(Own(name), targets=[name]) == [name]
    assert chosen(Own(name), targets=["Own"]) == [name]


# ------------------------------------------------------------------------------------------ outputs that would be equal


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(32, 16), nn.Linear(16, 16)
        self.head, self.tail = nn.Linear(16, 8), nn.Linear(16, 8)
        self.teacher = nn.Linear(16, 8).requires_grad_(False)


def test_outputs_and_entries_of_a_table_are_not_tied_to_each_other():
    """The last layer that is trained, and one that is called head; neighbours in a column would be equal classes."""
    selection = WeightSharing("column").choose(Tagger())
    assert [target.name for target in selection.targets] == ["body.weight"]
    equal = "column does not apply: the model's outputs would become equal"
    assert selection.skipped["head.weight"] == selection.skipped["tail.weight"] == equal
    assert selection.skipped["embed.weight"] == "column does not apply: entries of a table would become equal"
    assert selection.skipped["teacher.weight"] == "frozen, while others are trained"
    named = WeightSharing("column", targets=["head", "em*", "tail.weight"]).choose(Tagger())
    assert [target.name for target in named.targets] == ["embed.weight", "head.weight", "tail.weight"]
    for method in ("row", "cross_channel", "low_rank"):  # their outputs differ
        taken = WeightSharing(method).choose(Tagger()).targets
        assert [t.name for t in taken] == ["embed.weight", "body.weight", "head.weight", "tail.weight"]


def test_a_small_last_layer_is_the_last_all_the_same():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    assert [target.name for target in WeightSharing("column").choose(model).targets] == ["0.weight"]
    with pytest.raises(ValueError, match=r"can tie none of the chosen tensors.*outputs would become equal"):
        WeightSharing("column").choose(nn.Linear(64, 8))
