from __future__ import annotations

import math
import pickle
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import COMBINATIONS, QUIET, Net, fit, slotted

import psc_lightning
from psc_lightning import (
    GradientClipping,
    MaskLearning,
    StraightThroughQuantization,
    WeightSharing,
    compress,
    config_dir,
    plan,
)
from psc_lightning.artifact import to_bytes
from psc_lightning.slots.live import compressed

PRESETS = sorted(path.stem for path in (config_dir() / "compression").glob("*.yaml"))
DRIVEN = ("mask", "deep")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)
    )


def batches(number: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 2, 8, 8, generator=generator), torch.randint(4, (8,), generator=generator))
        for _ in range(number)
    ]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def labels(preset: str) -> dict[str, object]:
    return {"batches": batches(), "loss": loss} if preset in DRIVEN else {}


def fingerprint(model: nn.Module) -> dict[str, object]:
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "classes": [type(layer) for layer in model.modules()],
        "modes": [layer.training for layer in model.modules()],
        "ours": [
            (sorted(vars(layer)), len(layer._forward_pre_hooks), len(layer._forward_hooks)) for layer in model.modules()
        ],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    }


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    after = fingerprint(model)
    assert list(after["state"]) == list(before["state"])
    assert all(torch.equal(after["state"][key], value) for key, value in before["state"].items())
    assert after["classes"] == before["classes"]
    assert after["modes"] == before["modes"]
    assert after["ours"] == before["ours"]
    for new, old in zip(after["gradients"], before["gradients"], strict=True):
        assert (new is None and old is None) or torch.equal(new, old)


# -------------------------------------------------------------------------------------------------------- presets


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_writes_what_it_computes(preset: str, tmp_path, same_bits):
    model, x = net(), batches(1)[0][0]
    dense = deepcopy(model)
    report = compress(model, preset, **labels(preset))
    model.eval()
    saved = psc_lightning.save(model, tmp_path / "model.psc")
    assert saved == report
    assert report.file_bytes == (tmp_path / "model.psc").stat().st_size
    fresh = net().eval()
    fresh.load_state_dict(psc_lightning.load(tmp_path / "model.psc"))
    assert same_bits(fresh(x), model(x))
    assert sum(row.dense_bytes for row in report.tensors) == report.dense_bytes
    assert report.dense_bytes == sum(v.numel() * v.element_size() for v in dense.state_dict().values())
    if preset == "none":
        assert {row.method for row in report.tensors} == {"plain"}
        assert all(same_bits(a, b) for a, b in zip(fresh.parameters(), dense.parameters(), strict=True))
    else:
        assert report.compression_ratio > 1.2
        assert [row.name for row in report.tensors if row.method != "plain"] == ["0.weight", "3.weight", "5.weight"]


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "none"])
def test_the_threshold_is_the_share_of_the_core_that_is_zero(preset: str):
    model = net()
    report = compress(model, preset, threshold=0.3, **labels(preset))
    assert compress(net(), preset, **labels(preset)).tensors != report.tensors
    for _, tensor, weight in compressed(model):
        cores = tensor.slots.reduce(tensor.dense(weight))
        for name, core in cores.items():
            zeros = int((~tensor.slots.chain(name).mask.keep).sum())
            assert zeros == math.floor(0.3 * core.numel() + 0.5)


@pytest.mark.parametrize("preset", ["cross_channel", "row", "column", "separable", "low_rank"])
def test_what_a_sharing_preset_stores_has_8_bits(preset: str):
    """Rows of a thousand numbers: more levels than 7 bits have, and no more than 8 have."""
    torch.manual_seed(0)
    report = compress(nn.Sequential(nn.Conv2d(1024, 8, 2)), preset, threshold=0.0, targets="0")
    row = report.tensors[0]
    assert row.method == f"{preset}+magnitude+uniform"
    assert row.levels is not None
    assert 2**7 - 1 < row.levels <= 2**8 - 1


def test_what_each_preset_means_in_the_decoded_weights():
    def state(preset: str, **options: object) -> dict[str, Tensor]:
        model = net()
        compress(model, preset, **labels(preset), **options)
        return dict(model.state_dict())

    w = state("float")["3.weight"]
    assert int((w == 0).sum()) >= 288
    assert max(len(channel.unique()) for channel in w) <= 255
    w = state("binary")["3.weight"]
    assert all(len(channel.unique()) == 2 and channel.max() == -channel.min() for channel in w)
    w = state("binary", form="01", threshold=0.25)["3.weight"]
    assert all(len(channel[channel != 0].unique()) == 2 for channel in w)
    assert int((w == 0).sum()) == 144
    w = state("ternary")["3.weight"]
    assert all(len(channel.abs().unique()) <= 2 for channel in w)
    w = state("mask")["3.weight"]
    assert int((w == 0).sum()) >= math.floor(0.8 * 576 + 0.5)
    w = state("cross_channel", groups=4)["3.weight"]
    assert all(torch.equal(w[:, :2], w[:, 2 * g : 2 * g + 2]) for g in range(4))
    w = state("row")["3.weight"]
    assert (w == w[..., :1]).all()
    w = state("column")["3.weight"]
    assert (w[:4] == w[:1]).all()
    assert (w[4:] == w[4:5]).all()
    w = state("separable")["3.weight"]
    assert [int(torch.linalg.matrix_rank(w[:, i].flatten(1), rtol=1e-5)) for i in range(8)] == [1] * 8
    w = state("low_rank", rank=2)["3.weight"]
    assert int(torch.linalg.matrix_rank(w.flatten(1), rtol=1e-5)) == 2
    w = state("log")["3.weight"]
    mantissas, _ = torch.frexp(w[w != 0].abs())
    assert (mantissas == 0.5).all()
    w = state("codebook", k=5)["3.weight"]
    assert len(w.unique()) <= 5
    w = state("deep")["3.weight"]
    assert len(w[w != 0].unique()) <= 16
    assert int((w == 0).sum()) >= 518


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "none"])
def test_a_compressed_model_is_still_the_plain_one(preset: str, same_bits):
    model, dense = net(), net()
    parameters, layers = list(model.parameters()), list(model.modules())
    compress(model, preset, **labels(preset))
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in dense.modules()]
    assert all(a is b for a, b in zip(model.modules(), layers, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(dense.state_dict())
    dense_weights = dense.state_dict()
    for name, tensor, parameter in compressed(model):
        assert not same_bits(parameter, dense_weights[name])
        assert same_bits(parameter, tensor.slots.make(tensor.latent))
        if tensor.slots.tying is None:  # a tying overwrites it
            assert same_bits(tensor.latent, dense_weights[name])


# ---------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("preset", DRIVEN)
@pytest.mark.parametrize("given", [{}, {"batches": batches()}, {"loss": loss}], ids=["neither", "batches", "loss"])
def test_label_driven_presets_need_batches_and_a_loss(preset: str, given: dict[str, object]):
    model = net()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=rf"batches, loss: compression='{preset}' is driven by labels and needs both"):
        compress(model, preset, **given)
    assert_untouched(model, before)


def test_one_of_the_two_is_never_enough():
    with pytest.raises(ValueError, match="batches, loss: compression='float' takes both or neither"):
        compress(net(), "float", batches=batches())


def test_no_batches_at_all_are_no_labels():
    model = net()
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"batches: .*none"):
        compress(model, "mask", batches=[], loss=loss)
    assert_untouched(model, before)


def planted() -> tuple[nn.Module, list[Tensor], set[int]]:
    """16 inputs; the answer hangs on four of them, whose weights are small; the largest weights see what is always 0."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(16, 8, bias=False)
    matter = {1, 4, 9, 14}
    with torch.no_grad():
        layer.weight.copy_(3 + torch.rand(8, 16, generator=generator))
        layer.weight[:, sorted(matter)] = 0.1 * (1 + torch.rand(8, 4, generator=generator))
    inputs = torch.zeros(64, 16)
    inputs[:, sorted(matter)] = torch.randn(64, 4, generator=generator)
    return nn.Sequential(layer), list(inputs.split(16)), matter


def kept_inputs(model: nn.Module) -> set[int]:
    return set(model[0].weight.detach().abs().sum(0).nonzero().flatten().tolist())


def moving_away(model: nn.Module, x: Tensor) -> Tensor:
    """A loss that is lower the larger the right outputs are: descent moves weights of live inputs away from zero."""
    return -(model(x) * model(x).detach().sign()).mean()


def test_only_labels_find_the_planted_inputs():
    how = {"threshold": 0.75, "granularity": "element", "min_size": 1}
    for method in ("movement", "saliency"):
        model, inputs, matter = planted()
        compress(model, "mask", batches=inputs, loss=moving_away, mask=method, **how)
        assert kept_inputs(model) == matter, method
    model, inputs, matter = planted()
    compress(model, "mask", batches=inputs, loss=moving_away, mask="magnitude", **how)
    assert not kept_inputs(model) & matter
    model, inputs, matter = planted()
    compress(model, "float", threshold=0.75)
    assert not kept_inputs(model) & matter


def test_labels_pick_the_member_in_cross_channel():
    model, inputs, _ = planted()
    dense = model[0].weight.detach().clone()
    compress(model, "cross_channel", groups=2, batches=inputs, loss=moving_away)
    # inputs 1, 4 live in the first half, 9, 14 in the second: positions 1, 4 and 9 - 8, 14 - 8
    bank = model[0].weight.detach()[:, :8]
    assert torch.allclose(bank[:, 4], dense[:, 4], rtol=0.2)
    assert torch.allclose(bank[:, 6], dense[:, 14], rtol=0.2)
    model, inputs, _ = planted()
    compress(model, "cross_channel", groups=2)
    bank = model[0].weight.detach()[:, :8]
    assert (bank[:, 4] > 3).all()


def test_labels_that_nobody_needs_do_no_harm():
    model, inputs, _ = planted()
    with_labels = compress(model, "cross_channel", labels="magnitude", batches=inputs, loss=moving_away)
    model, _, _ = planted()
    assert compress(model, "cross_channel", labels="magnitude").file_bytes == with_labels.file_bytes


def test_labels_that_nobody_needs_cost_nothing():
    compress(planted()[0], "binary", batches=batches(), loss=lambda model, batch: pytest.fail("not asked for"))


def test_calibration_leaves_modes_and_gradients_alone():
    model = net().train()
    model[1].eval()  # a frozen BatchNorm
    model[5].weight.grad = torch.ones_like(model[5].weight)
    modes = {name: layer.training for name, layer in model.named_modules()}
    running = model[1].running_mean.clone()
    seen = []

    def spying(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(model.training)
        return loss(model, batch)

    compress(model, "mask", batches=batches(), loss=spying)
    assert seen == [False, False]
    assert {name: layer.training for name, layer in model.named_modules()} == modes
    assert torch.equal(model[5].weight.grad, torch.ones(4, 128))
    assert model[0].weight.grad is None
    assert torch.equal(model[1].running_mean, running)


def test_a_frozen_weight_has_labels_too():
    model, inputs, matter = planted()
    model.requires_grad_(False)
    compress(model, "mask", threshold=0.75, mask="saliency", batches=inputs, loss=moving_away)
    assert kept_inputs(model) == matter
    assert not model[0].weight.requires_grad


def test_labels_are_computed_within_no_grad_too():
    with torch.no_grad():
        report = compress(net(), "mask", batches=batches(), loss=loss)
    assert report == compress(net(), "mask", batches=batches(), loss=loss)


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"compression": "bianry"}, "compression: expected one of binary, codebook"),
        ({"compression": "float", "k": 4}, "k: compression='float' has no such option; it has activations, bits"),
        ({"compression": "float", "bitts": 4}, "bitts: compression='float' has no such option"),
        ({"compression": "float", "threshold": 1.5}, "threshold: expected a share"),
        ({"compression": "float", "threshold": -0.1}, "threshold: expected a finite number"),
        ({"compression": "float", "bits": -8}, "bits: expected a whole number from 1 to 8, found -8"),
        ({"compression": "float", "group": "row"}, "group: expected tensor, channel or a whole number"),
        ({"compression": "float", "targets": "nowhere"}, "targets: 'nowhere' matches no"),
        ({"compression": "codebook", "k": 1}, "k: expected a whole number from 2 to 256, found 1"),
        ({"compression": "cross_channel", "groups": 1}, "groups: expected a whole number from 2 up"),
        ({"compression": "separable", "targets": "Linear"}, "method='separable' can tie none"),
        ({"compression": "none", "bits": 8}, "bits: compression='none' has no such option"),
    ],
)
def test_wrong_values_are_named_and_leave_the_model_alone(call: dict[str, object], message: str):
    model = net()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(")):
        compress(model, **call)
    assert_untouched(model, before)


def test_a_second_time_is_an_error_until_the_first_is_baked():
    model = net()
    compress(model, "float")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"0\.weight is compressed already; call psc_lightning\.detach\(model\) first"):
        compress(model, "binary")
    assert_untouched(model, before)
    psc_lightning.detach(model)
    compress(model, "binary")


def test_two_presets_for_two_parts():
    model = net()
    compress(model, "binary", targets="Conv2d")
    report = compress(model, "float", targets="Linear")
    assert {row.name: row.method for row in report.tensors if row.method != "plain"} == {
        "0.weight": "magnitude+binary",
        "3.weight": "magnitude+binary",
        "5.weight": "magnitude+uniform",
    }
    lstm = nn.LSTM(8, 8)
    compress(lstm, "binary", targets="weight_ih_l0")
    compress(lstm, "float", targets="weight_hh_l0")


class Failed(Exception):
    pass


def broken_loss(model: nn.Module, batch: object) -> Tensor:
    raise Failed


def exploding_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return loss(model, batch) * math.inf


@pytest.mark.parametrize(
    ("fails", "error"), [(broken_loss, Failed), (exploding_loss, ValueError)], ids=["raises", "is not finite"]
)
@pytest.mark.parametrize("preset", ["mask", "cross_channel"])
def test_a_loss_that_fails_leaves_the_model_alone(preset: str, fails: object, error: type[Exception]):
    model = net()
    before = fingerprint(model)
    with pytest.raises(error):
        compress(model, preset, batches=batches(), loss=fails, targets=["3", "5"])
    assert_untouched(model, before)
    compress(model, preset, batches=batches(), loss=loss, targets=["3", "5"])


@pytest.mark.parametrize("preset", ["binary", "row", "low_rank"])
def test_a_tensor_that_cannot_be_stored_leaves_the_model_alone(preset: str):
    model = net()
    with torch.no_grad():
        model[0].bias[0] = math.nan
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"0\.bias: expected finite numbers"):
        compress(model, preset)
    after = fingerprint(model)
    assert list(after["state"]) == list(before["state"])
    assert after["classes"] == before["classes"]
    assert after["ours"] == before["ours"]
    assert all(torch.equal(value, before["state"][key]) for key, value in after["state"].items() if key != "0.bias")


def test_options_reach_their_methods():
    model = net()
    compress(
        model, "float", threshold=0.25, bits=4, group=16, targets=("Conv2d",), ignore="0", min_size=1, granularity="row"
    )
    ((name, slots, _),) = slotted(model)
    chain = slots.chain("core")
    assert name == "3.weight"
    assert (chain.levels.bits, chain.levels.group) == (4, 16)
    assert (chain.mask.threshold, chain.mask.units.granularity, chain.mask.units.block) == (0.25, "row", 3)
    compress(deepcopy(net()), "log", base=2) if "base" in _options("log") else compress(net(), "log", root=2)
    compress(net(), "float", targets=nn.Conv2d)
    compress(net(), "float", targets=[nn.Conv2d, "5"])


def _options(preset: str) -> str:
    return (config_dir() / "compression" / f"{preset}.yaml").read_text()


def test_none_accepts_a_threshold():
    model = net()
    before = fingerprint(model)
    report = compress(model, "none", threshold=0.5)
    assert {row.method for row in report.tensors} == {"plain"}
    assert_untouched(model, before)


# --------------------------------------------------------------------------------------------------------- plan


def test_the_plan_says_what_is_taken_what_is_left_and_why_and_touches_nothing():
    model = net()
    before = fingerprint(model)
    callbacks = [
        StraightThroughQuantization("uniform", ignore="0"),
        GradientClipping(max_norm=1.0),
        WeightSharing("separable", targets=["3", "Linear"]),
    ]
    told = [pickle.dumps(callback) for callback in callbacks]
    made = plan(model, callbacks)
    assert_untouched(model, before)
    assert [pickle.dumps(callback) for callback in callbacks] == told
    assert made.taken == {"3.weight": "separable+uniform", "5.weight": "uniform"}
    assert made.left["0.weight"] in ("ignored; not among the targets", "not among the targets; ignored")
    assert "one axis" in made.left["0.bias"]
    assert made.notes["5.weight"] == "separable does not apply: it has no kernel of two or more entries to separate"
    text = str(made)
    for part in ("separable+uniform", "slots left empty:", "not compressed:", "0.weight: "):
        assert part in text
    assert made.report.file_bytes < made.report.dense_bytes


def test_the_plan_refuses_what_training_would():
    with pytest.raises(
        ValueError, match=r"0\.weight: its mask slot is filled by MaskLearning.* and again by MaskLearning"
    ):
        plan(net(), [MaskLearning("magnitude"), MaskLearning("movement")])
    with pytest.raises(ValueError, match="matches no"):
        plan(net(), MaskLearning(targets="nowhere"))


@pytest.mark.filterwarnings(*(mark.args[0] for mark in QUIET))
@pytest.mark.parametrize("name", ["float", "binary", "row"])
def test_the_plan_foresees_the_bytes(name):
    """Of what it compresses; BatchNorm has still to learn its numbers."""

    def compressed_bytes(report):
        return sum(tensor.stored_bytes for tensor in report.tensors if tensor.method != "plain")

    expected = compressed_bytes(plan(Net(), COMBINATIONS[name]("constant")).report)
    model, _ = fit(COMBINATIONS[name]("constant"), max_epochs=1)
    assert compressed_bytes(to_bytes(model)[1]) == pytest.approx(expected, rel=0.1)


def test_plan_takes_one_callback_too():
    assert plan(net(), MaskLearning()).taken == {f"{i}.weight": "magnitude" for i in (0, 3, 5)}


def test_attach_by_hand_leaves_the_slots_off():
    model, x = net().eval(), batches(1)[0][0]
    before = model(x)
    psc_lightning.attach(model, [MaskLearning(), GradientClipping(max_norm=1.0)])
    assert torch.equal(model(x), before)
    assert [slots.begun for _, slots, _ in slotted(model)] == [False] * 3
    assert [tensor.latent for _, tensor, _ in compressed(model)] == [None] * 3  # the Parameter is all there is
