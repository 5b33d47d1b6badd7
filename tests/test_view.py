from __future__ import annotations

import pickle
from copy import copy, deepcopy

import pytest
import torch
from torch import nn

from psc_lightning import MaskLearning, StraightThroughQuantization
from psc_lightning.layout import Layout
from psc_lightning.levels import LEVELS
from psc_lightning.masks import MASKS
from psc_lightning.slots import Slots, Spec
from psc_lightning.tying import TYINGS
from psc_lightning.view import attach_slots, derive, detach, plain_state, raw, slots_of, views


def view(layer: nn.Module, *names: str, hard: bool = True, method: str = "ternary") -> list[Slots]:
    found = []
    for name in names or ("weight",):
        parameter = layer._parameters[name]
        slots = Slots(Layout.of(layer), tuple(parameter.shape))
        slots.fill("levels", Spec(method))
        attach_slots([(layer, name)], slots)
        if hard:
            slots.harden(parameter)
        found.append(slots)
    return found


def baked(layer: nn.Module) -> nn.Module:
    """A plain layer that holds the effective weights."""
    plain = deepcopy(layer)
    state = plain_state(layer)
    detach(plain)
    plain.load_state_dict(state)
    return plain


LAYERS = {
    "Linear": (lambda: nn.Linear(8, 5), ("weight",), (3, 8)),
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3), ("weight",), (2, 3, 6, 6)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), ("weight",), (2, 4, 5, 5)),
    "LSTM": (lambda: nn.LSTM(4, 3, num_layers=2), ("weight_ih_l0", "weight_hh_l1"), (5, 2, 4)),
    "GRU": (lambda: nn.GRU(4, 3), ("weight_ih_l0", "weight_hh_l0"), (5, 2, 4)),
    "RNN": (lambda: nn.RNN(4, 3), ("weight_hh_l0",), (5, 2, 4)),
    "Conv1d": (lambda: nn.Conv1d(3, 4, 3), ("weight",), (2, 3, 7)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), ("weight",), (2, 2, 3, 3, 3)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), ("weight",), (2, 6, 5, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 3, 3), ("weight",), (2, 4, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(3, 2, 2), ("weight",), (1, 3, 3, 3, 3)),
    "GRUCell": (lambda: nn.GRUCell(4, 3), ("weight_ih",), (2, 4)),
}


def output(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = layer(x)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_computes_with_the_effective_weight(kind: str, same_bits):
    make, names, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    before = output(layer, x).detach()
    view(layer, *names)
    plain = baked(layer)
    for training in (True, False):
        out = output(layer.train(training), x)
        assert same_bits(out, output(plain.train(training), x))
        assert not torch.equal(out, before)
        if not isinstance(layer, nn.RNNBase):  # these multiply otherwise without gradients, plain ones too: see below
            with torch.no_grad():
                assert same_bits(output(layer, x), out.detach())
        else:
            with torch.no_grad():
                torch.testing.assert_close(output(layer, x), out.detach(), rtol=1e-6, atol=1e-6)
    out.sum().backward()
    for name in names:
        assert layer._parameters[name].grad.isfinite().all()
        assert layer._parameters[name].grad.any()


def test_an_embedding_gives_out_its_effective_rows(same_bits):
    layer, rows = nn.Embedding(11, 8), torch.tensor([[3, 0], [10, 3]])
    view(layer)
    out = layer(rows)
    assert same_bits(out, baked(layer)(rows))
    with torch.no_grad():
        assert same_bits(layer.eval()(rows), out.detach())
    out.sum().backward()
    assert layer._parameters["weight"].grad.abs().sum(1).nonzero().flatten().tolist() == [0, 3, 10]


@pytest.mark.parametrize("weights", [True, False])
def test_attention_by_itself_in_every_mode(weights: bool, same_bits):
    """With and without the weights of its answer, which take different ways; both projections are seen."""
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)

    def attend(net: nn.Module) -> torch.Tensor:
        return net(x, x, x, need_weights=weights)[0]

    before = attend(layer).detach()
    for name in ("in_proj_weight", "out_proj.weight"):
        MaskLearning("movement", threshold=0.4, targets=name).attach(layer)
        StraightThroughQuantization("codebook", targets=name).attach(layer)
    for _, slots, weight in views(layer):
        slots.harden(weight)
    plain = baked(layer)
    for training in (True, False):
        out = attend(layer.train(training))
        assert same_bits(out, attend(plain.train(training)))
        with torch.no_grad():
            torch.testing.assert_close(attend(layer), out.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(attend(plain), attend(layer), rtol=0, atol=0)
    assert not torch.allclose(out, before, atol=1e-3)
    attend(layer.train()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters() if p.dim() > 1)
    assert len([name for name, _ in layer.named_parameters() if "psc" in name]) == 4


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_the_whole_encoder_with_padding(monkeypatch: pytest.MonkeyPatch):
    """In eval torch packs padded batches into a nested tensor and calls one kernel with all weights."""
    torch.manual_seed(0)
    one = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(one, 2).eval()
    for callback in (MaskLearning(threshold=0.4, min_size=16), StraightThroughQuantization("ternary", min_size=16)):
        callback.attach(encoder)
    for _, slots, weight in views(encoder):
        slots.harden(weight)
    plain, x, pad = baked(encoder), torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    pad[0, 3:] = True
    calls, fast = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or fast(*a))
    with torch.no_grad():
        assert torch.equal(encoder(x, src_key_padding_mask=pad), plain(x, src_key_padding_mask=pad))
    assert len(calls) == 4  # two layers each: neither has lost the fast way
    slow = encoder(x, src_key_padding_mask=pad).detach()
    assert len(calls) == 4
    with torch.no_grad():
        torch.testing.assert_close(encoder(x, src_key_padding_mask=pad)[~pad], slow[~pad], rtol=1e-5, atol=1e-6)
    encoder.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_computes_as_the_plain_layer_does(kind: str, mode: type, same_bits):
    """Torch chooses how to multiply by whether the weight requires a gradient, even where none is recorded."""
    torch.manual_seed(0)
    layer = getattr(nn, kind)(12, 16, batch_first=True, bidirectional=True).eval()
    for slots in view(
        layer, "weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse", hard=False
    ):
        slots.fill("mask", Spec("magnitude", {"threshold": 0.5}))  # gives out a view of a core
    for _, slots, parameter in views(layer):
        slots.harden(parameter)
    plain, x = baked(layer), torch.randn(2, 7, 12)
    for learns in (True, False):
        layer.requires_grad_(learns)
        plain.requires_grad_(learns)
        with mode():
            assert same_bits(output(layer, x), output(plain, x))
            assert layer.weight_hh_l0.requires_grad == learns


@pytest.mark.filterwarnings("ignore:`torch.jit")  # a DeprecationWarning, from torch 2.14 on a FutureWarning
@pytest.mark.filterwarnings("ignore:.*torch.autograd.function.Function.* should not be instantiated")  # dynamo does
def test_it_can_be_compiled_exported_and_traced():
    layer, x = nn.Linear(8, 5), torch.randn(3, 8)
    view(layer)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            for made in (
                torch.compile(layer, backend="aot_eager", fullgraph=True),
                torch.export.export(layer, (x,)).module(),
                torch.jit.trace(layer, x),
            ):
                assert torch.allclose(made(x), layer(x))


@pytest.mark.parametrize("fast", [True, False])
def test_attention_and_the_transformers_fast_path(fast: bool):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    view(layer.self_attn, "in_proj_weight")
    view(layer.self_attn.out_proj)
    view(layer.linear1)
    view(layer.linear2)
    plain, x = baked(layer), torch.randn(2, 3, 8)
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.no_grad():
            assert torch.allclose(layer(x), plain(x), atol=1e-6)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_the_parameter_stays_where_it_was():
    layer = nn.Linear(8, 5)
    parameter, names = layer.weight, [name for name, _ in layer.named_parameters()]
    view(layer)
    assert layer._parameters["weight"] is parameter
    assert [name for name, _ in layer.named_parameters()] == names
    assert dict(layer.named_parameters())["weight"] is parameter
    assert isinstance(layer, nn.Linear)
    assert type(layer).__name__ == "Linear"
    assert type(layer).__module__ == nn.Linear.__module__
    assert "ternary" in repr(layer)


def test_raw_gives_the_parameter_and_ends_with_its_block():
    layer = nn.Linear(8, 5)
    view(layer)
    parameter = layer._parameters["weight"]
    with raw():
        assert layer.weight is parameter
        with raw():
            pass
        assert layer.weight is parameter
    assert layer.weight is not parameter
    with pytest.raises(KeyError), raw():
        raise KeyError
    assert layer.weight is not parameter


def test_a_parameter_may_be_replaced_or_missing():
    layer = nn.Linear(8, 5)
    view(layer, hard=False)
    new = nn.Parameter(torch.randn(5, 8))
    layer.weight = new
    assert layer.weight is new
    layer.weight = None
    assert layer.weight is None


def test_an_error_within_the_view_is_told_and_does_not_give_the_raw_weight(monkeypatch):
    layer = nn.Linear(8, 5)
    view(layer)

    def broken(self: Slots, weight: torch.Tensor) -> torch.Tensor:
        return weight.no_such_thing

    monkeypatch.setattr(Slots, "effective", broken)
    with pytest.raises(RuntimeError, match=r"view of 'weight' failed.*no_such_thing"):
        _ = layer.weight


# -------------------------------------------------------------------------------------------------- tied weights


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 8), "norm": nn.LayerNorm(8), "head": nn.Linear(8, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    slots = Slots(Layout(), (9, 8))
    slots.fill("levels", Spec("codebook", {"k": 4}))
    attach_slots([(model["embed"], "weight"), (model["head"], "weight")], slots)
    slots.harden(model["embed"]._parameters["weight"])
    return model


def test_a_tied_weight_has_one_transform(same_bits):
    model = tied()
    assert model["embed"].psc["weight"] is model["head"].psc["weight"]
    assert same_bits(model["embed"].weight, model["head"].weight)
    assert [name for name, _, _ in views(model)] == ["embed.weight"]
    assert len(list(model.parameters())) == 1 + 2 + 1
    state = plain_state(model)
    assert list(state) == ["embed.weight", "norm.weight", "norm.bias", "head.weight"]
    assert state["embed.weight"] is state["head.weight"]
    (model["embed"](torch.arange(9)) @ model["head"].weight.T).sum().backward()
    assert model["embed"]._parameters["weight"].grad.any()


def test_copies_and_baking_keep_a_tie(same_bits):
    model = tied()
    twin = deepcopy(model)
    assert twin["embed"].psc["weight"] is twin["head"].psc["weight"]
    assert twin["embed"]._parameters["weight"] is twin["head"]._parameters["weight"]
    detach(twin)
    assert twin["embed"].weight is twin["head"].weight
    assert same_bits(twin["head"].weight, model["head"].weight)
    assert type(twin["head"]) is nn.Linear


# ----------------------------------------------------------------------------------------------- states and baking


def test_plain_state_has_the_plain_names_order_and_metadata(same_bits):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(8, 5)))
    names = list(model.state_dict())
    view(model[0])
    view(model[2][0])
    state = plain_state(model)
    assert list(state) == names
    assert same_bits(state["0.weight"], model[0].weight)
    assert not state["0.weight"].requires_grad
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(8, 5)))
    fresh.load_state_dict(state)


def test_plain_state_of_a_layer_that_is_the_model():
    layer = nn.Linear(8, 5)
    view(layer)
    assert list(plain_state(layer)) == ["weight", "bias"]
    assert [name for name, _, _ in views(layer)] == ["weight"]


def test_plain_state_of_a_foreign_state_takes_the_sidecars_from_there(same_bits):
    """An average of weights, as weight averaging hands in: its weights under its own centroids."""
    layer = nn.Linear(8, 5)
    view(layer, method="codebook")
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    state["weight"] = state["weight"] * 2
    state["psc.weight.cores.core.levels.centroids"] *= 2
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    assert torch.equal(plain_state(layer, state)["weight"], 2 * layer.weight)
    assert all(same_bits(value, before[key]) for key, value in layer.state_dict().items())


def test_a_view_that_has_not_begun_gives_the_weight_itself():
    layer = nn.Linear(8, 5)
    view(layer, hard=False)
    assert plain_state(layer)["weight"].data_ptr() == layer._parameters["weight"].data_ptr()


@pytest.mark.parametrize("method", [*LEVELS, *MASKS, *TYINGS])
def test_effective_weights_lie_in_memory_as_the_parameter_does(method):
    """A contiguous weight in a channels_last network is a fifth more time a step; in a state all are contiguous."""
    slot = next(slot for slot, folder in (("tying", TYINGS), ("mask", MASKS), ("levels", LEVELS)) if method in folder)
    for layer in (nn.Conv2d(8, 12, 3), nn.Conv3d(4, 6, (1, 3, 3)), nn.ConvTranspose2d(4, 8, 3)):
        last = torch.channels_last if layer.weight.dim() == 4 else torch.channels_last_3d
        layer.to(memory_format=last)
        slots = Slots(Layout.of(layer), tuple(layer.weight.shape))
        slots.fill(slot, Spec(method))
        attach_slots([(layer, "weight")], slots)
        slots.harden(layer._parameters["weight"])
        assert layer.weight.is_contiguous(memory_format=last)
        assert layer.weight.stride() == layer._parameters["weight"].stride()
        assert plain_state(layer)["weight"].is_contiguous()
        layer.to(memory_format=torch.contiguous_format)
        assert layer.weight.is_contiguous()


def test_effective_weights_in_a_state_are_contiguous():
    layer = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    view(layer)
    assert plain_state(layer)["weight"].is_contiguous()


@pytest.mark.parametrize("kind", LAYERS)
def test_baking_keeps_outputs_and_restores_the_class(kind: str, same_bits):
    make, names, shape = LAYERS[kind]
    layer, x = make().eval(), torch.randn(shape)
    kept = type(layer)
    view(layer, *names)
    before = output(layer, x)
    assert detach(layer) is layer
    assert type(layer) is kept
    assert "psc" not in layer._modules
    assert same_bits(output(layer, x), before)
    assert list(layer.state_dict()) == list(make().state_dict())
    assert detach(layer) is layer  # nothing to do


def test_baking_hardens_what_is_soft(same_bits):
    layer = nn.Linear(8, 5)
    (slots,) = view(layer, hard=False)
    slots.set_strength("levels", 0.5, layer._parameters["weight"])
    hard = deepcopy(layer)
    slots_of(hard, "weight").harden(hard._parameters["weight"])
    detach(layer)
    assert same_bits(layer.weight, hard.weight)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_recurrent_layer_follows_a_replaced_parameter_after_baking(kind: str, same_bits):
    make, names, shape = LAYERS[kind]
    layer, other, x = make(), make(), torch.randn(shape)
    view(layer, *names, hard=False)
    missing, unexpected = layer.load_state_dict(other.state_dict(), assign=True)
    assert not missing
    assert not unexpected
    assert same_bits(output(layer, x), output(other, x))
    for name in names:
        layer.psc[name].harden(layer._parameters[name])
    before = output(layer, x)
    detach(layer)
    assert same_bits(output(layer, x), before)


def test_two_tensors_of_one_layer_one_after_the_other(same_bits):
    layer = nn.LSTM(4, 3)
    view(layer, "weight_hh_l0")
    first = layer.weight_hh_l0.detach()
    view(layer, "weight_ih_l0")
    assert same_bits(layer.weight_hh_l0, first)
    assert len(layer.weight_ih_l0.detach()[0].abs().unique()) <= 2
    assert sorted(layer.psc) == ["weight_hh_l0", "weight_ih_l0"]


# --------------------------------------------------------------------------------------------------- derived classes


def _body(base: type, answer: int) -> dict[str, object]:
    return {"answer": answer}


def test_derived_classes_are_cached_and_pickle_by_their_base():
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    derive(a, _body, 42)
    derive(b, _body, 42)
    assert type(a) is type(b)
    assert a.answer == 42
    again = pickle.loads(pickle.dumps(a))
    assert type(again) is type(a)
    assert type(copy(a)) is type(a)


def test_a_view_does_not_undo_another_derivation_of_its_layer():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

    model = Model()
    derive(model, _body, 42)
    view(model)
    assert model.answer == 42
    assert len(model.weight.detach()[0].abs().unique()) <= 2
    detach(model)
    assert type(model) is Model


def test_a_child_of_that_name_is_not_ours():
    layer = nn.Linear(8, 5)
    layer.psc = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="Linear has a child module of its own named 'psc'"):
        view(layer)
    other = nn.Linear(8, 5)
    other.psc = nn.ModuleDict({"weight": nn.Identity()})
    with pytest.raises(ValueError, match="rename it"):
        view(other)


def test_viewing_is_compiled_away_from_the_class_of_others():
    viewed, plain = nn.Linear(8, 5), nn.Linear(8, 5)
    view(viewed)
    assert plain.weight is plain._parameters["weight"]
    assert "weight" not in vars(nn.Linear)
