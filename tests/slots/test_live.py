"""A live model, some of whose tensors are compressed, is the plain model: the same layers, Parameters, state, ways."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from psc_lightning import ActivationQuantization, MaskLearning, StraightThroughQuantization, compress
from psc_lightning.artifact import to_bytes
from psc_lightning.levels import LEVELS
from psc_lightning.masks import MASKS
from psc_lightning.slots.latent import Compressed
from psc_lightning.slots.layout import Layout
from psc_lightning.slots.live import PLACE, compressed, detach, held, hold, let_go, under_names
from psc_lightning.slots.slots import Slots, Spec
from psc_lightning.tying import TYINGS


def fill(layer: nn.Module, *names: str, hard: bool = True, method: str = "ternary") -> list[Compressed]:
    """Compress tensors of a layer, its weight by default."""
    found = []
    for name in names or ("weight",):
        parameter = layer._parameters[name]
        slots = Slots(Layout.of(layer), tuple(parameter.shape))
        slots.fill("levels", Spec(method))
        tensor = Compressed(slots)
        hold([(layer, name)], tensor)
        if hard:
            tensor.harden(parameter)
        found.append(tensor)
    return found


def rounding() -> list[Callback]:
    """Of weights and of inputs."""
    levels = StraightThroughQuantization("uniform", bits=7, min_size=1)
    return [levels, ActivationQuantization(min_size=1)]


def harden(model: nn.Module) -> None:
    for _, tensor, parameter in compressed(model):
        tensor.harden(parameter)


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


def plain_of(make: Callable[[], nn.Module], layer: nn.Module) -> nn.Module:
    """One that was never compressed, with the same weights."""
    plain = make()
    plain.load_state_dict(layer.state_dict())
    return plain


# ---------------------------------------------------------------------------------------------- what it computes with


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_computes_with_the_hard_weight(kind: str, same_bits):
    make, names, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    before = output(layer, x).detach()
    tensors = fill(layer, *names)
    plain = plain_of(make, layer)
    for training in (True, False):
        out = output(layer.train(training), x)
        assert same_bits(out, output(plain.train(training), x))
        assert not torch.equal(out, before)
        with torch.no_grad():
            assert same_bits(output(layer, x), output(plain, x))
    for name, tensor in zip(names, tensors):
        assert same_bits(layer._parameters[name], tensor.slots.make(tensor.latent))
        assert not same_bits(layer._parameters[name], tensor.latent)
    out.sum().backward()
    for name in names:
        assert layer._parameters[name].grad.isfinite().all()
        assert layer._parameters[name].grad.any()


def test_an_embedding_gives_out_its_hard_rows(same_bits):
    layer, rows = nn.Embedding(11, 8), torch.tensor([[3, 0], [10, 3]])
    fill(layer)
    plain = plain_of(lambda: nn.Embedding(11, 8), layer)
    out = layer(rows)
    assert same_bits(out, plain(rows))
    with torch.no_grad():
        assert same_bits(layer.eval()(rows), out.detach())
    out.sum().backward()
    assert layer.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [0, 3, 10]


@pytest.mark.parametrize("weights", [True, False])
def test_attention_by_itself_in_every_mode(weights: bool, same_bits):
    """With and without the weights of its answer, which take different ways; both projections are compressed."""
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8)

    def attend(net: nn.Module) -> torch.Tensor:
        return net(x, x, x, need_weights=weights)[0]

    before = attend(layer).detach()
    for name in ("in_proj_weight", "out_proj.weight"):
        MaskLearning("movement", threshold=0.4, targets=name).attach(layer)
        StraightThroughQuantization("codebook", targets=name).attach(layer)
    harden(layer)
    plain = plain_of(lambda: nn.MultiheadAttention(8, 2, batch_first=True), layer)
    for training in (True, False):
        out = attend(layer.train(training))
        assert same_bits(out, attend(plain.train(training)))
        with torch.no_grad():
            torch.testing.assert_close(attend(layer), out.detach(), rtol=1e-5, atol=1e-6)
            assert same_bits(attend(plain), attend(layer))
    assert not torch.allclose(out, before, atol=1e-3)
    attend(layer.train()).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in layer.parameters() if p.dim() > 1)
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in plain.named_parameters()]
    for _, tensor, parameter in compressed(layer):
        tensor.pull(parameter)
        sidecars = dict(tensor.slots.named_parameters())
        assert sorted(sidecars) == ["cores.core.levels.centroids", "cores.core.mask.scores"]
        assert all(sidecar.grad is not None and sidecar.grad.any() for sidecar in sidecars.values())


def encoder() -> nn.TransformerEncoder:
    one = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(one, 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_the_whole_encoder_with_padding(monkeypatch: pytest.MonkeyPatch):
    """In eval torch packs padded batches into a nested tensor and calls one kernel with all weights."""
    torch.manual_seed(0)
    model = encoder().eval()
    for callback in (MaskLearning(threshold=0.4, min_size=16), StraightThroughQuantization("ternary", min_size=16)):
        callback.attach(model)
    harden(model)
    plain, x, pad = plain_of(encoder, model).eval(), torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    pad[0, 3:] = True
    calls, fast = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or fast(*a))
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=pad), plain(x, src_key_padding_mask=pad))
    assert len(calls) == 4  # two layers each: neither has lost the fast way
    slow = model(x, src_key_padding_mask=pad).detach()
    assert len(calls) == 4
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=pad)[~pad], slow[~pad], rtol=1e-5, atol=1e-6)
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("fast", [True, False])
def test_attention_and_the_transformers_fast_path(fast: bool, same_bits):
    make = lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)  # noqa: E731
    layer = make().eval()
    fill(layer.self_attn, "in_proj_weight")
    fill(layer.self_attn.out_proj)
    fill(layer.linear1)
    fill(layer.linear2)
    plain, x = plain_of(make, layer).eval(), torch.randn(2, 3, 8)
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with torch.no_grad():
            assert same_bits(layer(x), plain(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_computes_as_the_plain_layer_does(kind: str, mode: type, same_bits):
    """Torch chooses how to multiply by whether the weight requires a gradient, even where none is recorded."""
    torch.manual_seed(0)
    make = lambda: getattr(nn, kind)(12, 16, batch_first=True, bidirectional=True)  # noqa: E731
    layer = make().eval()
    names = ("weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse")
    for tensor in fill(layer, *names, hard=False):
        tensor.slots.fill("mask", Spec("magnitude", {"threshold": 0.5}))
    harden(layer)
    plain, x = plain_of(make, layer).eval(), torch.randn(2, 7, 12)
    for learns in (True, False):
        layer.requires_grad_(learns)
        plain.requires_grad_(learns)
        with mode():
            assert same_bits(output(layer, x), output(plain, x))
            assert layer.weight_hh_l0.requires_grad == learns


@pytest.mark.filterwarnings("ignore:`torch.jit")  # a DeprecationWarning, from torch 2.14 on a FutureWarning
@pytest.mark.filterwarnings("ignore:.*torch.autograd.function.Function.* should not be instantiated")  # dynamo does
@pytest.mark.parametrize("inputs", [False, True], ids=["weights", "inputs rounded too"])
def test_it_can_be_compiled_exported_scripted_and_traced(inputs: bool):
    torch.compiler.reset()  # it does not look at hooks when it takes a graph of another layer of this shape
    layer, x = nn.Linear(8, 5), torch.randn(3, 8)
    if inputs:
        compress(layer, rounding(), batches=[x], loss=lambda net, batch: net(batch).square().mean())
        assert not torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
    else:
        fill(layer)
    for mode in (torch.no_grad, torch.enable_grad):
        with mode():
            makers = {
                "compile": lambda: torch.compile(layer, backend="aot_eager", fullgraph=True),
                "export": lambda: torch.export.export(layer, (x,)).module(),
                "trace": lambda: torch.jit.trace(layer, x),
                "script": lambda: torch.jit.script(layer),
            }
            if inputs:
                del makers["script"]  # a hook of ours is no TorchScript
            for name, make in makers.items():
                assert torch.allclose(make()(x), layer(x)), name


@pytest.mark.filterwarnings("ignore:.*torch.autograd.function.Function.* should not be instantiated")  # dynamo does
@pytest.mark.parametrize("same", [True, False], ids=["itself, before", "another of its shape"])
def test_a_graph_of_a_plain_layer_is_not_taken_for_one_whose_inputs_are_rounded(same: bool):
    torch.compiler.reset()
    layer, x = nn.Linear(8, 5), torch.randn(3, 8)
    made = torch.compile(layer if same else nn.Linear(8, 5), backend="eager", fullgraph=True)
    made(x)
    compress(layer, rounding(), batches=[x], loss=lambda net, batch: net(batch).square().mean())
    if not same:
        made = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(made(x), layer(x))


def test_a_compiled_layer_follows_the_weight_and_is_compiled_once():
    layer, x, compiled = nn.Linear(8, 5), torch.randn(3, 8), []
    (tensor,) = fill(layer)

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    made = torch.compile(layer, backend=backend, fullgraph=True)
    for _ in range(3):
        made(x).sum().backward()
        tensor.pull(layer.weight)
        tensor.lend(layer.weight)
        with torch.no_grad():
            layer.weight.sub_(layer.weight.grad)
        layer.weight.grad = None
        tensor.show(layer.weight)
        assert torch.equal(made(x), nn.functional.linear(x, layer.weight, layer.bias))
        assert len(layer.weight.detach()[0].abs().unique()) <= 2
    assert len(compiled) == 1


# ------------------------------------------------------------------------------------------------------ what it is


def test_the_parameter_stays_where_it_was():
    layer = nn.Linear(8, 5)
    parameter, names = layer.weight, [name for name, _ in layer.named_parameters()]
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    fill(layer)
    assert layer.weight is parameter is layer._parameters["weight"]
    assert optimizer.param_groups[0]["params"][0] is parameter
    assert [name for name, _ in layer.named_parameters()] == names
    assert parameter.requires_grad
    assert parameter.is_leaf


def test_the_class_the_modules_and_the_text_are_the_plain_ones():
    layer, plain = nn.Linear(8, 5), nn.Linear(8, 5)
    fill(layer)
    assert type(layer) is nn.Linear
    assert list(layer.modules()) == [layer]
    assert list(layer.buffers()) == []
    assert repr(layer) == repr(plain)
    assert vars(layer).keys() - vars(plain).keys() == {PLACE}
    assert "weight" not in vars(nn.Linear)


def test_a_parameter_may_be_replaced_or_missing():
    layer = nn.Linear(8, 5)
    (tensor,) = fill(layer)
    new = nn.Parameter(torch.randn(5, 8))
    layer.weight = new
    assert layer.weight is new
    assert [(name, found is tensor, parameter is new) for name, found, parameter in compressed(layer)] == [
        ("weight", True, True)
    ]
    layer.weight = None
    assert layer.weight is None
    assert list(compressed(layer)) == []
    assert detach(layer) is layer
    assert PLACE not in vars(layer)


def test_two_tensors_of_one_layer_one_after_the_other(same_bits):
    layer = nn.LSTM(4, 3)
    fill(layer, "weight_hh_l0")
    first = layer.weight_hh_l0.detach().clone()
    fill(layer, "weight_ih_l0")
    assert same_bits(layer.weight_hh_l0, first)
    assert len(layer.weight_ih_l0.detach()[0].abs().unique()) <= 2
    assert sorted(under_names(layer)) == ["weight_hh_l0", "weight_ih_l0"]
    assert [name for name, _, _ in compressed(layer)] == ["weight_hh_l0", "weight_ih_l0"]
    kept = held(layer, "weight_ih_l0")
    let_go(layer, "weight_hh_l0")
    assert under_names(layer) == {"weight_ih_l0": kept}
    assert held(layer, "weight_hh_l0") is None


def test_a_layer_that_is_the_model():
    layer = nn.Linear(8, 5)
    fill(layer)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert [name for name, _, _ in compressed(layer)] == ["weight"]


def test_a_model_that_holds_weights_itself():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

    model = Model()
    fill(model)
    assert type(model) is Model
    assert len(model.weight.detach()[0].abs().unique()) <= 2
    detach(model)
    assert vars(model).keys() == vars(Model()).keys()


def test_a_child_may_have_any_name():
    layer = nn.Linear(8, 5)
    layer.psc = nn.Linear(1, 1)
    fill(layer)
    assert list(layer.state_dict()) == ["weight", "bias", "psc.weight", "psc.bias"]


# ------------------------------------------------------------------------------------------------------- the state


def test_the_state_has_the_plain_names_in_their_order_and_the_hard_weights(same_bits):
    make = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(8, 5)))  # noqa: E731
    model = make()
    names, metadata = list(model.state_dict()), model.state_dict()._metadata
    fill(model[0])
    fill(model[2][0])
    state = model.state_dict()
    assert list(state) == names
    assert state._metadata == metadata
    assert same_bits(state["0.weight"], model[0].weight)
    assert not state["0.weight"].requires_grad
    assert len(state["0.weight"][0].abs().unique()) <= 2
    make().load_state_dict(state)


def test_what_has_not_begun_leaves_the_parameter_its_memory():
    layer = nn.Linear(8, 5)
    pointer = layer.weight.data_ptr()
    (tensor,) = fill(layer, hard=False)
    assert layer.state_dict()["weight"].data_ptr() == pointer
    assert tensor.latent is None


@pytest.mark.parametrize("method", [*LEVELS, *MASKS, *TYINGS])
def test_hard_weights_lie_in_memory_as_the_latent_ones_do(method: str, same_bits):
    """A contiguous weight in a channels_last network is a fifth more time a step."""
    slot = next(slot for slot, folder in (("tying", TYINGS), ("mask", MASKS), ("levels", LEVELS)) if method in folder)
    for layer in (nn.Conv2d(8, 12, 3), nn.Conv3d(4, 6, (1, 3, 3)), nn.ConvTranspose2d(4, 8, 3)):
        last = torch.channels_last if layer.weight.dim() == 4 else torch.channels_last_3d
        layer.to(memory_format=last)
        slots = Slots(Layout.of(layer), tuple(layer.weight.shape))
        slots.fill(slot, Spec(method))
        tensor = Compressed(slots)
        hold([(layer, "weight")], tensor)
        tensor.harden(layer.weight)
        assert layer.weight.is_contiguous(memory_format=last)
        assert tensor.latent.is_contiguous(memory_format=last)
        hard, latent, data = layer.weight.detach().clone(), tensor.latent.clone(), to_bytes(layer)[0]
        layer.to(memory_format=torch.contiguous_format)
        tensor.show(layer.weight)
        for found, expected in ((layer.weight, hard), (tensor.latent, latent)):
            assert same_bits(found, expected)
            assert found.is_contiguous()
        assert to_bytes(layer)[0] == data
        layer.to(memory_format=last)
        tensor.lend(layer.weight)
        assert layer.weight.is_contiguous(memory_format=last)
        tensor.show(layer.weight)
        assert layer.weight.is_contiguous(memory_format=last)
        assert same_bits(layer.weight, hard)


# ---------------------------------------------------------------------------------------------------- tied weights


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 8), "norm": nn.LayerNorm(8), "head": nn.Linear(8, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    slots = Slots(Layout(), (9, 8))
    slots.fill("levels", Spec("codebook", {"k": 4}))
    tensor = Compressed(slots)
    hold([(model["embed"], "weight"), (model["head"], "weight")], tensor)
    tensor.harden(model["embed"].weight)
    return model


def test_a_tied_weight_is_one_compressed_tensor():
    model = tied()
    tensor = held(model["embed"], "weight")
    assert tensor is held(model["head"], "weight")
    assert model["embed"].weight is model["head"].weight
    assert [name for name, _, _ in compressed(model)] == ["embed.weight"]
    assert under_names(model) == {"embed.weight": tensor, "head.weight": tensor}
    assert len(list(model.parameters())) == 1 + 2
    assert list(model.state_dict()) == ["embed.weight", "norm.weight", "norm.bias", "head.weight"]
    assert len(model["head"].weight.unique()) <= 4
    (model["embed"](torch.arange(9)) @ model["head"].weight.T).sum().backward()
    tensor.pull(model["embed"].weight)
    assert model["head"].weight.grad.any()
    assert tensor.slots.cores["core"].levels.centroids.grad.any()


def test_a_layer_with_two_names_has_one_tensor():
    layer = nn.Linear(8, 5)
    model = nn.ModuleDict({"a": layer, "b": layer})
    (tensor,) = fill(layer)
    assert [name for name, _, _ in compressed(model)] == ["a.weight"]
    assert under_names(model) == {"a.weight": tensor, "b.weight": tensor}
    detach(model)
    assert under_names(model) == {}


@pytest.mark.parametrize(
    "copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_and_detaching_keep_a_tie(copy: Callable[[nn.Module], nn.Module], same_bits):
    model = tied()
    twin = copy(model)
    assert held(twin["embed"], "weight") is held(twin["head"], "weight")
    assert held(twin["embed"], "weight") is not held(model["head"], "weight")
    assert twin["embed"].weight is twin["head"].weight
    detach(twin)
    assert twin["embed"].weight is twin["head"].weight
    assert same_bits(twin["head"].weight, model["head"].weight)
    assert held(twin["head"], "weight") is None
    assert held(model["head"], "weight") is not None


# --------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize(
    "copy", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_copy_has_a_latent_weight_of_its_own(kind: str, copy: Callable[[nn.Module], nn.Module], same_bits):
    make, names, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    fill(layer, *names)
    twin = copy(layer)
    assert type(twin) is type(layer)
    assert same_bits(output(twin, x), output(layer, x))
    for name in names:
        mine, its = held(layer, name), held(twin, name)
        assert same_bits(its.latent, mine.latent)
        its.lend(twin._parameters[name])
        with torch.no_grad():
            twin._parameters[name].neg_()
        its.show(twin._parameters[name])
        assert same_bits(its.latent, -mine.latent)
        assert not torch.equal(twin._parameters[name], layer._parameters[name])
        assert same_bits(layer._parameters[name], mine.slots.make(mine.latent))
    assert not torch.equal(output(twin, x), output(layer, x))


def test_a_pickle_names_nothing_but_plain_classes_and_ours():
    layer = nn.Linear(8, 5)
    fill(layer)
    again = pickle.loads(pickle.dumps(layer))
    assert type(again) is nn.Linear
    assert to_bytes(again)[0] == to_bytes(layer)[0]
    assert to_bytes(deepcopy(layer))[0] == to_bytes(layer)[0]


# ------------------------------------------------------------------------------------------------------- detaching


@pytest.mark.parametrize("kind", LAYERS)
def test_detaching_keeps_outputs_and_leaves_nothing(kind: str, same_bits):
    make, names, shape = LAYERS[kind]
    layer, x = make().eval(), torch.randn(shape)
    fill(layer, *names)
    before, parameters = output(layer, x), dict(layer.named_parameters())
    assert detach(layer) is layer
    assert vars(layer).keys() == vars(make()).keys()
    assert not layer._load_state_dict_pre_hooks
    assert not layer._forward_pre_hooks
    assert all(parameter is parameters[name] for name, parameter in layer.named_parameters())
    assert same_bits(output(layer, x), before)
    assert list(layer.state_dict()) == list(make().state_dict())
    assert detach(layer) is layer  # nothing to do


def test_detaching_hardens_what_is_soft(same_bits):
    layer = nn.Linear(8, 5)
    (tensor,) = fill(layer, hard=False)
    tensor.set_strength("levels", 0.5, layer.weight)
    tensor.show(layer.weight)
    assert len(layer.weight.detach()[0].abs().unique()) > 2
    hard = deepcopy(layer)
    held(hard, "weight").harden(hard.weight)
    detach(layer)
    assert same_bits(layer.weight, hard.weight)
    assert len(layer.weight.detach()[0].abs().unique()) <= 2


def test_detaching_in_the_middle_of_a_step_leaves_the_hard_weight():
    layer = nn.Linear(8, 5)
    (tensor,) = fill(layer)
    tensor.lend(layer.weight)
    detach(layer)
    assert len(layer.weight.detach()[0].abs().unique()) <= 2


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_recurrent_layer_follows_a_replaced_parameter(kind: str, same_bits):
    make, names, shape = LAYERS[kind]
    layer, other, x = make(), make(), torch.randn(shape)
    tensors = fill(layer, *names, hard=False)
    missing, unexpected = layer.load_state_dict(other.state_dict(), assign=True)
    assert not missing
    assert not unexpected
    assert same_bits(output(layer, x), output(other, x))
    for name, tensor in zip(names, tensors):
        tensor.harden(layer._parameters[name])
    before = output(layer, x)
    assert same_bits(before, output(plain_of(make, layer), x))
    detach(layer)
    assert same_bits(output(layer, x), before)


def test_a_sharded_model_cannot_be_detached():
    class FSDPModule(nn.Linear):
        """What `fully_shard` makes of a layer is called so."""

    layer = FSDPModule(8, 5)
    (tensor,) = fill(layer)
    with pytest.raises(
        ValueError, match=r"detach: fully_shard has sharded this model.*psc_lightning\.save\(model, path\)"
    ):
        detach(layer)
    assert held(layer, "weight") is tensor


# ----------------------------------------------------------------------------------------------------------- hooks


def test_loading_is_noted_where_a_weight_is_among_what_is_loaded():
    model = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 8))
    (first,), (second,) = fill(model[0]), fill(model[1])
    model.load_state_dict({"0.bias": torch.zeros(5)}, strict=False)
    assert (first.loaded, second.loaded) == (False, False)
    model.load_state_dict({"1.weight": torch.zeros(8, 5)}, strict=False)
    assert (first.loaded, second.loaded) == (False, True)
    second.show(model[1].weight)
    assert not second.loaded
    assert not model[1].weight.any()
    model[0].load_state_dict(nn.Linear(8, 5).state_dict())
    assert first.loaded


def test_a_layer_has_one_hook_however_often_it_is_held():
    layer = nn.LSTM(4, 3)
    tensors = fill(layer, "weight_hh_l0", "weight_ih_l0")
    hold([(layer, "weight_hh_l0")], tensors[0])
    assert len(layer._load_state_dict_pre_hooks) == 1
    let_go(layer, "weight_hh_l0")
    assert len(layer._load_state_dict_pre_hooks) == 1
    layer.load_state_dict(nn.LSTM(4, 3).state_dict())
    assert (tensors[0].loaded, tensors[1].loaded) == (False, True)
    let_go(layer, "weight_ih_l0")
    assert len(layer._load_state_dict_pre_hooks) == 0
    let_go(layer, "weight_ih_l0")  # nothing to do


def test_a_copy_notes_its_own_loading():
    layer = nn.Linear(8, 5)
    fill(layer)
    for twin in (deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        twin.load_state_dict(nn.Linear(8, 5).state_dict())
        assert held(twin, "weight").loaded
        assert not held(layer, "weight").loaded
        detach(twin)
        assert not twin._load_state_dict_pre_hooks
