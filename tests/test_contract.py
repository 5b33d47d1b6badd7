"""What every method promises on every layer, alone and in company; a new method is picked up from its dictionary."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from psc_lightning.artifact import load, load_into, to_bytes
from psc_lightning.functional import zero_count
from psc_lightning.layout import Layout
from psc_lightning.levels import LEVELS
from psc_lightning.masks import MASKS
from psc_lightning.slots import SLOTS, Slots, Spec
from psc_lightning.stored import decode
from psc_lightning.tying import TYINGS
from psc_lightning.view import attach_slots, detach, plain_state, slots_of

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
    "codebook": [{}, {"k": 3, "group": "channel"}, {"k": 256}, {"k": 2, "group": 5}, {"k": 4, "scales": "log8"}],
}
FOLDERS = {"tying": (TYINGS, TYING_OPTIONS), "mask": (MASKS, MASK_OPTIONS), "levels": (LEVELS, LEVEL_OPTIONS)}

Choice = tuple[str, dict[str, Any]] | None


def options_of(slot: str, name: str) -> list[dict[str, Any]]:
    return FOLDERS[slot][1].get(name, [{}])


def company() -> Iterator[dict[str, Choice]]:
    """Every single, pair and triple of methods, with their first options."""
    choices = [[None, *((name, options_of(slot, name)[0]) for name in FOLDERS[slot][0])] for slot in SLOTS]
    for three in itertools.product(*choices):
        if any(three):
            yield dict(zip(SLOTS, three, strict=True))


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


def fill(layer: nn.Module, name: str, choice: dict[str, Choice]) -> Slots:
    """View one tensor; nothing has begun."""
    slots = Slots(Layout.of(layer), tuple(layer._parameters[name].shape))
    for slot, part in choice.items():
        if part is not None:
            slots.fill(slot, Spec(part[0], part[1], f"{slot} of the test"))
    attach_slots([(layer, name)], slots)
    return slots


def train(slots: Slots, weight: nn.Parameter, generator: torch.Generator) -> None:
    """What a few steps do: labels come in, everything that is trained moves."""

    def noise(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)

    weight.grad = noise(weight)
    for slot in ("tying", "mask"):
        slots.observe(slot, weight)
    weight.grad = None
    slots.harden(weight)
    with torch.no_grad():
        for parameter in slots.parameters():
            parameter.mul_(1 + 0.1 * noise(parameter)).add_(1e-3 * noise(parameter) * parameter.abs().mean())
        if slots.tying is None or not list(slots.tying.parameters()):
            weight.add_(0.1 * noise(weight) * weight.abs().mean())


def build(
    layer: str,
    choice: dict[str, Choice],
    dtype: torch.dtype = torch.float32,
    values: Tensor | None = None,
    seed: int = 0,
) -> tuple[nn.Module, str, Slots] | None:
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
    slots = fill(module, name, choice)
    train(slots, weight, generator)
    return module, name, slots


def there_and_back(slots: Slots, weight: nn.Parameter, tape: type) -> Tensor:
    written = tape()
    slots.encode(written, weight)
    read = decode(written, tuple(weight.shape), weight.dtype).weight
    assert written.finished
    return read


# ------------------------------------------------------------------------------------------------------- law 1


def check_law_one(layer: str, choice: dict[str, Choice], tape: type, same_bits: Any, **how: Any) -> None:
    built = build(layer, choice, **how)
    if built is None:
        return
    module, name, slots = built
    weight = module._parameters[name]
    module.eval()
    for stale in (False, True):  # between two refreshes, and after one
        slots.stale = stale
        with torch.no_grad():
            effective = getattr(module, name)
        read = there_and_back(slots, weight, tape)
        why = label(layer, choice, f"{how} stale={stale}")
        assert same_bits(read, effective), why
        assert read.is_contiguous(), why
        assert effective.is_contiguous(), f"equal numbers in another memory layout give other logits: {why}"
        assert not read.requires_grad, why
        assert same_bits(getattr(module, name), effective), f"with and without grad: {why}"
        # (A float16 Parameter may underflow to -0.0 when the finished weight is cast to it.)
        if choice.get("levels") and weight.dtype != torch.float16:
            assert not read.signbit()[read == 0].any(), f"a zero is -0.0: {why}"


@pytest.mark.parametrize("layer", LAYERS)
def test_the_file_is_the_model_in_every_company(layer: str, tape, same_bits):
    for seed, choice in enumerate(company()):
        check_law_one(layer, choice, tape, same_bits, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_the_file_is_the_model_with_every_option(dtype: torch.dtype, tape, same_bits):
    for layer in LAYERS:
        for choice in alone():
            check_law_one(layer, choice, tape, same_bits, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_file_is_the_model_in_company_in_other_types(dtype: torch.dtype, tape, same_bits):
    for tying, levels in itertools.product(TYINGS, LEVELS):
        for options in options_of("levels", levels):
            choice = {"tying": (tying, {}), "mask": ("magnitude", SHARE), "levels": (levels, options)}
            for layer in ("Conv2d", "ConvTranspose2d, grouped"):
                check_law_one(layer, choice, tape, same_bits, dtype=dtype)


def test_factors_of_a_float64_weight_are_read_in_the_precision_they_are_used_in(tape, same_bits):
    """Their cores are float32 everywhere: a sum that float32 rounds must not come back exact."""
    module = nn.Conv2d(4, 8, 3).double()
    slots = fill(
        module, "weight", {"tying": ("low_rank", {"rank": 1}), "levels": ("binary", {"form": "01", "group": "tensor"})}
    )
    weight = module._parameters["weight"]
    slots.set_strength("tying", 1.0, weight)
    with torch.no_grad():
        for factor in slots.tying.parameters():
            noise = torch.rand(factor.shape, generator=torch.Generator().manual_seed(2))
            factor.copy_(1.0 + 1e-4 * (noise - 0.5))
    slots.set_strength("levels", 1.0, weight)
    assert same_bits(there_and_back(slots, weight, tape), module.weight)


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
    for choice in itertools.chain(alone(), company()):
        module = nn.Module()
        module.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        tying = choice.get("tying")
        if tying is not None and not applies(*tying, shape):
            continue
        slots = fill(module, "weight", choice)
        train(slots, module._parameters["weight"], torch.Generator().manual_seed(2))
        read = there_and_back(slots, module._parameters["weight"], tape)
        assert same_bits(read, module.weight), label(str(shape), choice)


# --------------------------------------------------------------------------------------------- laws 3, 7, and files


def model(choice: dict[str, Choice]) -> nn.Module:
    """All layers in one model, some steps into training."""
    built = {f"l{i}": build(layer, choice, seed=i) for i, layer in enumerate(LAYERS)}
    return nn.ModuleDict({key: found[0] for key, found in built.items() if found is not None})


@pytest.mark.parametrize("first", [None, *TYINGS])
@pytest.mark.parametrize("second", [None, *MASKS])
def test_size_sum_and_sameness_of_the_file(first, second, tmp_path, same_bits):
    for choice in company():
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
        read, plain = load(path), plain_state(whole)
        assert list(read) == list(plain), why
        assert all(same_bits(read[key], plain[key]) for key in plain), why
        fresh = nn.ModuleDict({key: LAYERS[list(LAYERS)[int(key[1:])]][0]() for key in whole})
        fresh.load_state_dict(read)  # strict
        load_into(fresh, path)
        assert all(same_bits(value, plain[key]) for key, value in fresh.state_dict().items()), why


# ------------------------------------------------------------------------------------------------------ gradients


def test_gradients_are_finite_and_reach_everything_that_is_trained():
    for layer in LAYERS:
        whole = company() if layer in ("Conv2d", "ConvTranspose2d, grouped") else ()
        for seed, choice in enumerate(itertools.chain(alone(), whole)):
            built = build(layer, choice, seed=seed)
            if built is None:
                continue
            module, name, slots = built
            weight = module._parameters[name]
            out = getattr(module, name)
            why = label(layer, choice)
            out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)))
            factors = list(slots.sidecars("tying"))
            trained = [*slots.parameters(), *([] if factors else [weight])]
            for parameter in trained:
                assert parameter.grad is not None, why
                assert parameter.grad.isfinite().all(), why
                assert parameter.grad.dtype == parameter.dtype, why
            assert not factors or weight.grad is None, why
            assert any(bool(parameter.grad.any()) for parameter in trained), why


# ------------------------------------------------------------------------------------------------------- strength


def test_strength_zero_is_the_parameter_itself(same_bits):
    for layer in ("Conv2d", "ConvTranspose2d, grouped", "LSTM"):
        for choice in company():
            make, name = LAYERS[layer]
            module = make()
            weight = module._parameters[name]
            tying = choice.get("tying")
            if tying is not None and not applies(*tying, Layout.of(module).shape(tuple(weight.shape))):
                continue
            kept = weight.detach().clone()
            slots = fill(module, name, choice)
            for slot in choice:
                slots.set_strength(slot, 0.0, weight)
            assert getattr(module, name) is weight, label(layer, choice)
            assert not slots.begun
            assert same_bits(weight, kept), label(layer, choice)


@pytest.mark.parametrize("strength", [0.25, 0.5])
def test_strength_between_blends_levels_and_scales_the_share_of_a_mask(strength: float):
    w = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(3))
    for name in LEVELS:
        for options in options_of("levels", name):
            module = nn.Conv2d(4, 6, 3)
            module.weight.data.copy_(w)
            slots = fill(module, "weight", {"levels": (name, options)})
            weight = module._parameters["weight"]
            slots.set_strength("levels", strength, weight)
            soft = module.weight.detach()
            slots.set_strength("levels", 1.0, weight)
            hard = module.weight.detach()
            assert torch.equal(soft, hard + (1 - strength) * (w - hard)), (name, options)
    for name in MASKS:
        module = nn.Conv2d(4, 6, 3)
        module.weight.data.copy_(w)
        slots = fill(module, "weight", {"mask": (name, SHARE), "levels": ("uniform", {})})
        weight = module._parameters["weight"]
        slots.set_strength("mask", strength, weight)
        assert int((module.weight == 0).sum()) == zero_count(strength * 0.4, w.numel()), name
        slots.set_strength("levels", strength, weight)  # masked zeros are exact while levels are soft
        assert int((module.weight == 0).sum()) >= zero_count(strength * 0.4, w.numel()), name
        slots.set_strength("mask", 1.0, weight)
        assert int((module.weight == 0).sum()) >= zero_count(0.4, w.numel()), name


# ---------------------------------------------------------------------------------------- copies, pickles, state dicts


def each(layer: str) -> Iterator[tuple[dict[str, Choice], nn.Module, str, Slots]]:
    """A layer under every single, pair and triple of methods that applies to it."""
    for choice in company():
        built = build(layer, choice)
        if built is not None:
            yield choice, *built


def step(module: nn.Module, name: str) -> Tensor:
    """One step of plain gradient descent on everything; the effective weight after it."""
    out = getattr(module, name)
    out.backward(torch.linspace(-1, 1, out.numel()).reshape(out.shape))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.01 * parameter.grad)
                parameter.grad = None
    slots_of(module, name).stale = True
    return getattr(module, name).detach()


@pytest.mark.parametrize("layer", LAYERS)
def test_a_copy_is_independent(layer, same_bits):
    for choice, module, name, _ in each(layer):
        why = label(layer, choice)
        control, baked = deepcopy(module), deepcopy(module)
        assert slots_of(control, name) is not slots_of(module, name)
        before = getattr(module, name).detach().clone()
        detach(baked)
        assert same_bits(baked._parameters[name], before), why
        assert baked.weight is baked._parameters["weight"] if name == "weight" else True
        step(baked, name) if slots_of(baked, name) else None
        with torch.no_grad():
            baked._parameters[name].zero_()
        assert same_bits(getattr(module, name), before), why
        for _ in range(2):
            assert same_bits(step(module, name), step(control, name)), why


@pytest.mark.parametrize("layer", LAYERS)
def test_pickle_gives_the_same_layer(layer, same_bits):
    for choice, module, name, _ in each(layer):
        again = pickle.loads(pickle.dumps(module))
        why = label(layer, choice)
        assert type(again) is type(module), why
        assert same_bits(getattr(again, name), getattr(module, name)), why
        assert same_bits(step(again, name), step(module, name)), why


@pytest.mark.parametrize("layer", LAYERS)
def test_state_dict_has_the_plain_names_in_their_order_and_ours_by_themselves(layer, same_bits):
    for choice, module, name, _ in each(layer):
        why = label(layer, choice)
        plain = LAYERS[layer][0]()
        keys = list(module.state_dict())
        assert [key for key in keys if not key.startswith(f"psc.{name}.")] == list(plain.state_dict()), why
        assert [k for k, _ in module.named_parameters() if "psc." not in k] == [k for k, _ in plain.named_parameters()]
        other = LAYERS[layer][0]()
        fill(other, name, choice)
        other.load_state_dict(module.state_dict())
        assert same_bits(getattr(other, name), getattr(module, name)), f"resumed: {why}"
        assert to_bytes(other)[0] == to_bytes(module)[0], f"resumed: {why}"


@pytest.mark.parametrize("layer", LAYERS)
def test_plain_checkpoints_load_strictly_and_misspelt_ones_do_not(layer, same_bits):
    for choice, module, name, _ in each(layer):
        why = label(layer, choice)
        plain = LAYERS[layer][0]()
        state = plain.state_dict()
        keys = list(state)
        module.load_state_dict(state)
        assert list(state) == keys, "the caller's dictionary is the caller's"
        assert same_bits(module._parameters[name], plain._parameters[name]), why
        assert getattr(module, name).isfinite().all(), why
        with pytest.raises(RuntimeError, match="wieght"):
            module.load_state_dict({("wieght" if key == name else key): value for key, value in state.items()})
        ours = module.state_dict()
        key = next(key for key in ours if key.startswith("psc."))
        with pytest.raises(RuntimeError, match="misspelt"):
            module.load_state_dict({(k + "misspelt" if k == key else k): value for k, value in ours.items()})
        fresh = LAYERS[layer][0]()
        fill(fresh, name, choice)
        fresh.load_state_dict(state)
        assert getattr(fresh, name) is fresh._parameters[name], f"not begun: {why}"


@pytest.mark.parametrize("layer", LAYERS)
def test_sidecars_stay_float32_in_half_precision(layer, tape, same_bits):
    for choice, module, name, slots in each(layer):
        why = label(layer, choice)
        types = {key: value.dtype for key, value in slots.state_dict().items()}
        for dtype in (torch.bfloat16, torch.float64, torch.float32):
            module.to(dtype)
            assert module._parameters[name].dtype == dtype
            assert {key: value.dtype for key, value in slots.state_dict().items()} == types, why
            effective = getattr(module, name)
            assert effective.dtype == dtype
            assert same_bits(there_and_back(slots, module._parameters[name], tape), effective), f"{dtype} {why}"
