"""What every method promises on every layer, alone and in combinations; a new method is picked up from its dictionary."""

from __future__ import annotations

import itertools
import math
import os
import pickle
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from graph import through_all
from torch import Tensor, nn

from psc_lightning.artifact import load, load_into, to_bytes
from psc_lightning.levels import LEVELS
from psc_lightning.masks import MASKS
from psc_lightning.numerics.functional import zero_count
from psc_lightning.slots.latent import Compressed
from psc_lightning.slots.layout import Layout
from psc_lightning.slots.live import detach, held, hold
from psc_lightning.slots.slots import SLOTS, Slots, Spec
from psc_lightning.slots.stored import decode
from psc_lightning.tying import TYINGS

LAYERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Linear": (lambda: nn.Linear(6, 5), "weight"),
    "Linear, one output": (lambda: nn.Linear(10, 1), "weight"),
    "Linear, one input": (lambda: nn.Linear(1, 7), "weight"),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), "weight"),
    "Conv2d": (lambda: nn.Conv2d(4, 5, 3), "weight"),
    "Conv2d, 1 × 1": (lambda: nn.Conv2d(4, 6, 1), "weight"),
    "Conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), "weight"),
    "Conv2d, depthwise": (lambda: nn.Conv2d(6, 6, (3, 2), groups=6), "weight"),
    "Conv3d": (lambda: nn.Conv3d(2, 5, (1, 3, 2)), "weight"),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 5, 3), "weight"),
    "ConvTranspose2d, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), "weight"),
    "Embedding": (lambda: nn.Embedding(7, 4), "weight"),
    "LSTM": (lambda: nn.LSTM(4, 3), "weight_hh_l0"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2), "in_proj_weight"),
}

# Options beyond the defaults; a method that is not here is tried with its defaults.
TYING_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "cross_channel": [{}, {"labels": "magnitude"}],
    "row": [{}, {"block": 2}, {"block": 99}],
    "column": [{}, {"block": 2}, {"block": 99}],
    "separable": [{}, {"rank": 2}],
    "low_rank": [{}, {"rank": 2}, {"rank": 0.5}],
}
SHARE = {"threshold": 0.4}
MASK_OPTIONS: dict[str, list[dict[str, Any]]] = {
    name: [
        SHARE,
        {"threshold": 0.0},
        {**SHARE, "group": "channel"},
        {**SHARE, "group": 5},
        {**SHARE, "granularity": "row"},
        {**SHARE, "granularity": "column", "block": 2},
        {**SHARE, "granularity": "channel"},
    ]
    for name in MASKS
}
LEVEL_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "uniform": [
        {},
        {"bits": 1},
        {"bits": 3, "group": "tensor"},
        {"bits": 2, "group": 5},
        {"learned_step": True},
        {"scales": "log8"},
        {"learned_step": True, "scales": "log8"},
        {"scales": "float32"},
    ],
    "binary": [{}, {"form": "01"}, {"group": 5}, {"form": "01", "group": "tensor"}, {"form": "01", "scales": "log8"}],
    "ternary": [{}, {"group": "tensor"}, {"group": 7}, {"scales": "float32"}],
    "log": [{}, {"bits": 3, "group": "tensor"}, {"bits": 2, "group": 5}, {"root": 2}, {"root": 8}],
    "ttq": [{}, {"group": "tensor"}, {"group": 7}, {"scales": "float32"}, {"scales": "log8"}],
    "codebook": [{}, {"k": 3, "group": "channel"}, {"k": 256}, {"k": 2, "group": 5}, {"k": 4, "scales": "log8"}],
}
FOLDERS = {"tying": (TYINGS, TYING_OPTIONS), "mask": (MASKS, MASK_OPTIONS), "levels": (LEVELS, LEVEL_OPTIONS)}

Choice = tuple[str, dict[str, Any]] | None


def options_of(slot: str, name: str) -> list[dict[str, Any]]:
    return FOLDERS[slot][1].get(name, [{}])


def combinations() -> Iterator[dict[str, Choice]]:
    """Every method alone and every pair of two slots' methods, with their first options; all triples where asked for."""
    ties, masks, levels = ([None, *((n, options_of(slot, n)[0]) for n in FOLDERS[slot][0])] for slot in SLOTS)
    if "PSC_TRIPLES" in os.environ:  # PSC_TRIPLES=1 pytest tests/test_contract.py
        yield from (dict(zip(SLOTS, three)) for three in itertools.product(ties, masks, levels) if any(three))
        return
    for slot, choices in zip(SLOTS, (ties, masks, levels), strict=True):
        yield from ({**dict.fromkeys(SLOTS), slot: choice} for choice in choices[1:])
    for (i, tying), (j, level) in itertools.product(enumerate(ties), enumerate(levels)):
        three = (tying, masks[(i + j) % len(masks)], level)  # each mask beside each tying, and beside each levels
        if sum(part is not None for part in three) > 1:
            yield dict(zip(SLOTS, three))


def shares(layer: str) -> Iterator[tuple[int, dict[str, Choice]]]:
    """A layer's share of the combinations, numbered: each method alone, and a fourth of the pairs beside its layers."""
    at = list(LAYERS).index(layer)
    for number, choice in enumerate(combinations()):
        alone = sum(part is not None for part in choice.values()) == 1
        if alone or number % 4 == at % 4 or "PSC_TRIPLES" in os.environ:
            yield number, choice


def test_combinations_hold_every_pair():
    found = {(a, b) for choice in combinations() for a, b in itertools.combinations(map(str, choice.items()), 2)}
    for one, other in itertools.combinations(SLOTS, 2):
        for a, b in itertools.product(FOLDERS[one][0], FOLDERS[other][0]):
            pair = (str((one, (a, options_of(one, a)[0]))), str((other, (b, options_of(other, b)[0]))))
            assert pair in found, (a, b)
    shared = [str(choice) for layer in LAYERS for _, choice in shares(layer)]
    assert all(shared.count(str(choice)) >= len(LAYERS) // 4 for choice in combinations())


def alone() -> Iterator[dict[str, Choice]]:
    """Every method with each of its options."""
    for slot in SLOTS:
        for name in FOLDERS[slot][0]:
            for options in options_of(slot, name):
                yield {slot: (name, options)}


def label(layer: str, choice: dict[str, Choice], more: object = "") -> str:
    methods = "+".join(f"{part[0]}{part[1] or ''}" for part in choice.values() if part)
    return f"{layer}: {methods} {more}"


def applies(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> bool:
    """DESIGN §2 in short: where a tying has something to tie."""
    outputs, entries, kernel = shape[0], math.prod(shape[1:]), math.prod(shape[2:])
    rank = options.get("rank", 1 if name == "separable" else 0.25)
    if name == "cross_channel":
        return shape[1] % 2 == 0
    if name == "row":
        return entries > 1
    if name == "column":
        return outputs > 1
    if name == "low_rank":
        rank = max(1, int(rank * min(outputs, entries))) if isinstance(rank, float) else min(rank, outputs, entries)
        return rank * (outputs + entries) < outputs * entries
    if name == "separable":
        rank = min(rank, outputs, kernel)
        return kernel > 1 and rank * (outputs + kernel) < outputs * kernel
    return True


def fill(layer: nn.Module, name: str, choice: dict[str, Choice]) -> Compressed:
    """Compress one tensor; nothing has begun."""
    slots = Slots(Layout.of(layer), tuple(layer._parameters[name].shape))
    for slot, part in choice.items():
        if part is not None:
            slots.fill(slot, Spec(part[0], part[1], f"{slot} of the test"))
    tensor = Compressed(slots)
    hold([(layer, name)], tensor)
    return tensor


def train(tensor: Compressed, weight: nn.Parameter, generator: torch.Generator) -> None:
    """What a few steps do: labels come in, everything that is trained moves, nothing is recomputed since."""

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    slots, labels = tensor.slots, noise(weight)
    for slot in ("tying", "mask"):
        slots.observe(slot, tensor.dense(weight), labels)
    tensor.harden(weight)
    with torch.no_grad():
        tensor.lend(weight)
        for parameter in slots.parameters():
            parameter.mul_(1 + 0.1 * noise(parameter)).add_(1e-3 * noise(parameter) * parameter.abs().mean())
        if slots.tying is None or not list(slots.tying.parameters()):
            weight.add_(0.1 * noise(weight) * weight.abs().mean())
        slots.due = [False, False, False]
        tensor.show(weight)


def build(
    layer: str,
    choice: dict[str, Choice],
    dtype: torch.dtype = torch.float32,
    values: Tensor | None = None,
    seed: int = 0,
) -> tuple[nn.Module, str, Compressed] | None:
    """A layer under these methods, some steps into training; None where the tying rightly does not apply."""
    generator = torch.Generator().manual_seed(seed)
    make, name = LAYERS[layer]
    module = make()
    weight = module._parameters[name]
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) if values is None else values)
        if values is None:
            weight.view(-1)[::5] = -0.0
    module.to(dtype)
    shape = Layout.of(module).shape(tuple(weight.shape))
    tying = choice.get("tying")
    if tying is not None and not applies(*tying, shape):
        with pytest.raises(ValueError, match=r"\w+ \w+"):
            fill(module, name, choice)
        return None
    tensor = fill(module, name, choice)
    train(tensor, weight, generator)
    return module, name, tensor


def there_and_back(tensor: Compressed, weight: nn.Parameter, tape: type) -> Tensor:
    written = tape()
    tensor.slots.encode(written, tensor.dense(weight))
    read = decode(written, tuple(weight.shape), weight.dtype).weight
    assert written.finished
    return read


# ------------------------------------------------------------------------------------------------------- law 1


def check_law_one(layer: str, choice: dict[str, Choice], tape: type, same_bits: Any, **how: Any) -> None:
    built = build(layer, choice, **how)
    if built is None:
        return
    module, name, tensor = built
    weight = module._parameters[name]
    for refreshed in (False, True):  # between two refreshes, and after one
        if refreshed:
            tensor.slots.stale = True
            tensor.show(weight)
        read = there_and_back(tensor, weight, tape)
        why = label(layer, choice, f"{how} refreshed={refreshed}")
        assert same_bits(read, weight), why
        assert read.is_contiguous(), why
        assert weight.is_contiguous(), f"equal numbers in another memory layout give other logits: {why}"
        assert not read.requires_grad, why
        made = tensor.slots.make(tensor.latent)
        assert same_bits(made, weight), f"made again: {why}"
        assert not made.requires_grad, why
        assert same_bits(tensor.slots.stored(tensor.latent).weight, weight), why
        # (A float16 Parameter may underflow to -0.0 when the finished weight is cast to it.)
        if choice.get("levels") and weight.dtype != torch.float16:
            assert not read.signbit()[read == 0].any(), f"a zero is -0.0: {why}"


@pytest.mark.parametrize("layer", LAYERS)
def test_the_file_is_the_model_in_every_combination(layer: str, tape, same_bits):
    for seed, choice in shares(layer):
        check_law_one(layer, choice, tape, same_bits, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_the_file_is_the_model_with_every_option(dtype: torch.dtype, tape, same_bits):
    for layer in LAYERS:
        for choice in alone():
            check_law_one(layer, choice, tape, same_bits, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_file_is_the_model_in_combinations_in_other_types(dtype: torch.dtype, tape, same_bits):
    for tying, levels in itertools.product(TYINGS, LEVELS):
        for options in options_of("levels", levels):
            choice = {"tying": (tying, {}), "mask": ("magnitude", SHARE), "levels": (levels, options)}
            for layer in ("Conv2d", "ConvTranspose2d, grouped"):
                check_law_one(layer, choice, tape, same_bits, dtype=dtype)


def test_factors_of_a_float64_weight_are_read_in_the_precision_they_are_used_in(tape, same_bits):
    """Their cores are float32 everywhere: a sum that float32 rounds must not come back exact."""
    module = nn.Conv2d(4, 8, 3).double()
    tensor = fill(
        module, "weight", {"tying": ("low_rank", {"rank": 1}), "levels": ("binary", {"form": "01", "group": "tensor"})}
    )
    weight = module._parameters["weight"]
    tensor.set_strength("tying", 1.0, weight)
    with torch.no_grad():
        for factor in tensor.slots.tying.parameters():
            noise = torch.rand(factor.shape, generator=torch.Generator().manual_seed(2))
            factor.copy_(1.0 + 1e-4 * (noise - 0.5))
    tensor.set_strength("levels", 1.0, weight)
    tensor.show(weight)
    assert same_bits(there_and_back(tensor, weight, tape), module.weight)


VALUES = {
    "zeros": lambda w: torch.zeros_like(w),
    "negative zeros": lambda w: torch.full_like(w, -0.0),
    "constant": lambda w: torch.full_like(w, 0.1),
    "tiny": lambda w: torch.randn_like(w) * 1e-30,
    "subnormal": lambda w: torch.randn_like(w) * 1e-41,
    "huge": lambda w: torch.randn_like(w) * 1e30,
    "wide": lambda w: torch.randn_like(w) * torch.logspace(-30, 30, w.numel()).reshape(w.shape),
}


@pytest.mark.parametrize("kind", VALUES)
def test_odd_values(kind: str, tape, same_bits):
    torch.manual_seed(0)
    for layer in ("Linear", "Conv2d", "ConvTranspose2d, grouped"):
        make, name = LAYERS[layer]
        values = VALUES[kind](getattr(make(), name).detach())
        for choice in itertools.chain(alone(), ({"mask": ("magnitude", SHARE), "levels": (n, {})} for n in LEVELS)):
            if (choice.get("levels") or ("",))[0] == "float16" and kind in ("huge", "wide"):
                with pytest.raises(ValueError, match="float16 holds numbers up to 65504"):
                    build(layer, choice, values=values)
            else:
                check_law_one(layer, choice, tape, same_bits, values=values)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (3, 1, 1, 1), (1, 3, 5, 7), (13, 2, 1, 3)], ids=str)
def test_odd_shapes(shape: tuple[int, ...], tape, same_bits):
    for choice in itertools.chain(alone(), combinations()):
        module = nn.Module()
        module.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        tying = choice.get("tying")
        if tying is not None and not applies(*tying, shape):
            continue
        tensor = fill(module, "weight", choice)
        train(tensor, module.weight, torch.Generator().manual_seed(2))
        read = there_and_back(tensor, module.weight, tape)
        assert same_bits(read, module.weight), label(str(shape), choice)


# --------------------------------------------------------------------------------------------- laws 3, 7, and files


def model(choice: dict[str, Choice]) -> nn.Module:
    """All layers in one model, some steps into training."""
    built = {f"l{i}": build(layer, choice, seed=i) for i, layer in enumerate(LAYERS)}
    return nn.ModuleDict({key: found[0] for key, found in built.items() if found is not None})


@pytest.mark.parametrize("first", [None, *TYINGS])
@pytest.mark.parametrize("second", [None, *MASKS])
def test_size_sum_and_sameness_of_the_file(first, second, tmp_path, same_bits):
    for choice in combinations():
        if [part and part[0] for part in (choice["tying"], choice["mask"])] != [first, second]:
            continue
        whole, why = model(choice), label("a model", choice)
        before = deepcopy(whole)
        data, report = to_bytes(whole)
        assert report.file_bytes == len(data), why
        assert sum(row.stored_bytes for row in report.tensors) + report.overhead_bytes == len(data), why
        assert to_bytes(whole)[0] == data, f"written twice: {why}"
        assert to_bytes(before)[0] == data, f"a copy: {why}"
        path = tmp_path / "model.psc"
        path.write_bytes(data)
        read, plain = load(path), whole.state_dict()
        assert list(read) == list(plain), why
        assert all(same_bits(read[key], plain[key]) for key in plain), why
        fresh = nn.ModuleDict({key: LAYERS[list(LAYERS)[int(key[1:])]][0]() for key in whole})
        fresh.load_state_dict(read)  # strict
        load_into(fresh, path)
        assert all(same_bits(value, plain[key]) for key, value in fresh.state_dict().items()), why


# ------------------------------------------------------------------------------------------------------ gradients


def check_gradients(tensor: Compressed, weight: nn.Parameter, seed: int, why: str, same_bits: Any) -> None:
    """`pull` gives everything that is trained a gradient, and the one that autograd finds by the whole graph."""
    slots = tensor.slots
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    weight.grad = gradient.clone()
    hard = weight.detach().clone()
    tensor.pull(weight)
    assert same_bits(weight, hard), why
    factors = list(slots.sidecars("tying"))
    found = [weight.grad, *(sidecar.grad for sidecar in slots.parameters())]
    for parameter in [*slots.parameters(), *([] if factors else [weight])]:
        assert parameter.grad is not None, why
        assert parameter.grad.isfinite().all(), why
        assert parameter.grad.dtype == parameter.dtype, why
    assert not factors or weight.grad is None, why
    assert any(bool(one.any()) for one in found if one is not None), why
    leaf = tensor.latent.clone().requires_grad_()
    made = through_all(slots, leaf)
    assert same_bits(made, hard), why
    wanted = torch.autograd.grad(made, [leaf, *slots.parameters()], gradient, allow_unused=True)
    if slots.tying is None and not slots.soft:
        assert torch.equal(found[0], wanted[0]), why
    for one, other in zip(found, wanted, strict=True):  # of ties and sidecars sums, in whatever order
        assert (one is None and other is None) or torch.allclose(one, other, rtol=1e-5, atol=1e-5), why


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_finite_reach_everything_that_is_trained_and_are_those_of_the_whole_graph(layer: str, same_bits):
    whole = combinations() if layer in ("Conv2d", "ConvTranspose2d, grouped") else ()
    for seed, choice in enumerate(itertools.chain(alone(), whole)):
        built = build(layer, choice, seed=seed)
        if built is not None:
            module, name, tensor = built
            check_gradients(tensor, module._parameters[name], seed, label(layer, choice), same_bits)


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("layer", ["Conv2d", "ConvTranspose2d, grouped"])
@pytest.mark.parametrize("levels", ["a step", "a step of one bit", "a codebook a channel", "binary", "two sizes"])
def test_gradients_pass_masks_and_ties_of_every_kind_in_a_ramp_too(levels, layer, strength, same_bits):
    """Few levels, so that some weights lie beyond the last."""
    few = {
        "a step": ("uniform", {"bits": 2, "learned_step": True}),
        "a step of one bit": ("uniform", {"bits": 1, "learned_step": True}),
        "a codebook a channel": ("codebook", {"k": 3, "group": "channel"}),
        "binary": ("binary", {}),
        "two sizes": ("ttq", {"group": 7}),
    }
    masks = [None, *((name, options) for name in MASKS for options in options_of("mask", name))]
    ties = [None, *((name, options_of("tying", name)[0]) for name in TYINGS)]
    at = list(few).index(levels)
    for seed, ((i, tying), (j, mask)) in enumerate(itertools.product(enumerate(ties), enumerate(masks))):
        if (i + j) % len(few) != at and "PSC_TRIPLES" not in os.environ:
            continue  # each pair of the three, this tying and mask beside other levels
        choice = {"tying": tying, "mask": mask, "levels": few[levels]}
        built = build(layer, choice, seed=seed)
        if built is None:
            continue
        module, name, tensor = built
        for slot in ("mask", "levels"):
            tensor.set_strength(slot, strength, module._parameters[name])
        tensor.show_if_stale(module._parameters[name])
        check_gradients(tensor, module._parameters[name], seed, label(layer, choice, strength), same_bits)


# ------------------------------------------------------------------------------------------------------- strength


def test_strength_zero_is_the_parameter_itself(same_bits):
    for layer in ("Conv2d", "ConvTranspose2d, grouped", "LSTM"):
        for choice in combinations():
            make, name = LAYERS[layer]
            module = make()
            weight = module._parameters[name]
            tying = choice.get("tying")
            if tying is not None and not applies(*tying, Layout.of(module).shape(tuple(weight.shape))):
                continue
            kept, pointer = weight.detach().clone(), weight.data_ptr()
            tensor = fill(module, name, choice)
            for slot in choice:
                tensor.set_strength(slot, 0.0, weight)
            tensor.show(weight)
            tensor.lend(weight)
            tensor.show(weight)
            assert module._parameters[name] is weight, label(layer, choice)
            assert not tensor.slots.begun
            assert tensor.latent is None
            assert weight.data_ptr() == pointer
            assert same_bits(weight, kept), label(layer, choice)


@pytest.mark.parametrize("strength", [0.25, 0.5])
def test_strength_between_blends_levels_and_scales_the_share_of_a_mask(strength: float):
    w = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(3))

    def shown(tensor: Compressed, slot: str, value: float, weight: nn.Parameter) -> Tensor:
        tensor.set_strength(slot, value, weight)
        tensor.show(weight)
        return weight.detach().clone()

    for name in LEVELS:
        for options in options_of("levels", name):
            module = nn.Conv2d(4, 6, 3)
            module.weight.data.copy_(w)
            tensor = fill(module, "weight", {"levels": (name, options)})
            soft = shown(tensor, "levels", strength, module.weight)
            hard = shown(tensor, "levels", 1.0, module.weight)
            assert torch.equal(soft, hard + (1 - strength) * (w - hard)), (name, options)
    for name in MASKS:
        module = nn.Conv2d(4, 6, 3)
        module.weight.data.copy_(w)
        tensor = fill(module, "weight", {"mask": (name, SHARE), "levels": ("uniform", {})})
        weight = shown(tensor, "mask", strength, module.weight)
        assert int((weight == 0).sum()) == zero_count(strength * 0.4, w.numel()), name
        weight = shown(tensor, "levels", strength, module.weight)  # masked zeros are exact while levels are soft
        assert int((weight == 0).sum()) >= zero_count(strength * 0.4, w.numel()), name
        weight = shown(tensor, "mask", 1.0, module.weight)
        assert int((weight == 0).sum()) >= zero_count(0.4, w.numel()), name


# ---------------------------------------------------------------------------------------- copies, pickles, state dicts


def each(layer: str) -> Iterator[tuple[dict[str, Choice], nn.Module, str, Compressed]]:
    """A layer under every method by itself, and its share of the combinations, that applies to it."""
    for _, choice in shares(layer):
        built = build(layer, choice)
        if built is not None:
            yield choice, *built


def step(module: nn.Module, name: str) -> Tensor:
    """One step of plain gradient descent on everything; the hard weight after it."""
    tensor, weight = held(module, name), module._parameters[name]
    weight.grad = torch.linspace(-1, 1, weight.numel()).reshape(weight.shape)
    tensor.pull(weight)
    tensor.lend(weight)
    with torch.no_grad():
        for parameter in (weight, *tensor.slots.parameters()):
            if parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad)
                parameter.grad = None
    tensor.show(weight)
    return weight.detach().clone()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_copy_is_independent(layer, same_bits):
    for choice, module, name, tensor in each(layer):
        why = label(layer, choice)
        control, baked = deepcopy(module), deepcopy(module)
        assert held(control, name) is not tensor
        assert held(control, name).latent.data_ptr() != tensor.latent.data_ptr()
        before = module._parameters[name].detach().clone()
        detach(baked)
        assert same_bits(baked._parameters[name], before), why
        assert held(baked, name) is None
        assert vars(baked).keys() == vars(LAYERS[layer][0]()).keys()
        with torch.no_grad():
            baked._parameters[name].zero_()
        assert same_bits(module._parameters[name], before), why
        for _ in range(2):
            assert same_bits(step(module, name), step(control, name)), why


@pytest.mark.parametrize("layer", LAYERS)
def test_pickle_gives_the_same_layer(layer, same_bits):
    for choice, module, name, _ in each(layer):
        again = pickle.loads(pickle.dumps(module))
        why = label(layer, choice)
        assert type(again) is type(module), why
        assert same_bits(again._parameters[name], module._parameters[name]), why
        assert to_bytes(again)[0] == to_bytes(module)[0], why
        assert same_bits(step(again, name), step(module, name)), why


@pytest.mark.parametrize("layer", LAYERS)
def test_the_module_is_the_plain_one_and_our_state_is_by_itself(layer, same_bits):
    for choice, module, name, tensor in each(layer):
        why = label(layer, choice)
        plain = LAYERS[layer][0]()
        assert type(module) is type(plain), why
        assert list(module.state_dict()) == list(plain.state_dict()), why
        for kind in ("named_parameters", "named_buffers", "named_modules"):
            assert [key for key, _ in getattr(module, kind)()] == [key for key, _ in getattr(plain, kind)()], why
        other = LAYERS[layer][0]()
        again = fill(other, name, choice)
        other.load_state_dict(module.state_dict())
        again.load_training_state(other._parameters[name], tensor.training_state(module._parameters[name]))
        assert same_bits(other._parameters[name], module._parameters[name]), f"resumed: {why}"
        assert same_bits(again.latent, tensor.latent), f"resumed: {why}"
        assert to_bytes(other)[0] == to_bytes(module)[0], f"resumed: {why}"
        assert same_bits(step(other, name), step(module, name)), f"resumed: {why}"


@pytest.mark.parametrize("layer", LAYERS)
def test_plain_checkpoints_load_strictly_and_misspelt_ones_do_not(layer, same_bits):
    for choice, module, name, tensor in each(layer):
        why = label(layer, choice)
        plain = LAYERS[layer][0]()
        state = plain.state_dict()
        keys = list(state)
        module.load_state_dict(state)
        assert list(state) == keys, "the caller's dictionary is the caller's"
        assert same_bits(module._parameters[name], plain._parameters[name]), why
        tensor.show(module._parameters[name])
        assert module._parameters[name].isfinite().all(), why
        if choice["tying"] is None:
            assert same_bits(tensor.latent, plain._parameters[name]), why
        with pytest.raises(RuntimeError, match="wieght"):
            module.load_state_dict({("wieght" if key == name else key): value for key, value in state.items()})
        with pytest.raises(RuntimeError, match=rf"Unexpected key.*psc\.{name}\.strength"):
            module.load_state_dict({**state, f"psc.{name}.strength": torch.ones(3)})
        fresh = LAYERS[layer][0]()
        waiting = fill(fresh, name, choice)
        fresh.load_state_dict(state)
        assert waiting.latent is None, f"not begun: {why}"
        assert same_bits(fresh._parameters[name], plain._parameters[name]), why


@pytest.mark.parametrize("layer", LAYERS)
def test_sidecars_stay_float32_in_half_precision(layer, tape, same_bits):
    for choice, module, name, tensor in each(layer):
        why = label(layer, choice)
        types = {key: value.dtype for key, value in tensor.slots.state_dict().items()}
        for dtype in (torch.bfloat16, torch.float64, torch.float32):
            before = tensor.latent.clone()
            module.to(dtype)
            weight = module._parameters[name]
            tensor.show(weight)
            assert weight.dtype == dtype
            assert {key: value.dtype for key, value in tensor.slots.state_dict().items()} == types, why
            assert same_bits(tensor.latent, before.to(dtype)), f"moved, not written: {dtype} {why}"
            assert same_bits(there_and_back(tensor, weight, tape), weight), f"{dtype} {why}"
