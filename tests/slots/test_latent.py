"""The latent weight beside the hard one: lent to an optimizer, given back, and what becomes of what others write."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from graph import through_all
from torch import Tensor, nn

from psc_lightning.artifact import load, measure, save, to_bytes
from psc_lightning.slots.latent import Compressed
from psc_lightning.slots.layout import Layout
from psc_lightning.slots.live import held, hold
from psc_lightning.slots.slots import OFF, Slots, Spec

Methods = dict[str, tuple[str, dict[str, Any]]]

SHARE = {"threshold": 0.5}
METHODS: dict[str, Methods] = {
    "ternary": {"levels": ("ternary", {})},
    "magnitude, uniform": {"mask": ("magnitude", SHARE), "levels": ("uniform", {"bits": 4})},
    "movement, centroids": {"mask": ("movement", SHARE), "levels": ("codebook", {"k": 4})},
    "steps": {"levels": ("uniform", {"bits": 3, "learned_step": True})},
    "magnitude, two sizes": {"mask": ("magnitude", SHARE), "levels": ("ttq", {})},
    "rows, binary": {"tying": ("row", {"block": 2}), "levels": ("binary", {})},
    "factors, ternary": {"tying": ("low_rank", {"rank": 2}), "levels": ("ternary", {})},
    "a bank": {"tying": ("cross_channel", {"groups": 2}), "mask": ("magnitude", SHARE)},
}


def made(values: list[list[float]] | Tensor, hard: bool = True, **methods: tuple[str, dict[str, Any]]) -> nn.Linear:
    """A layer of this weight, compressed."""
    weight = torch.as_tensor(values, dtype=torch.float32)
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data.copy_(weight)
    slots = Slots(Layout.of(layer), tuple(weight.shape))
    for slot, (method, options) in methods.items():
        slots.fill(slot, Spec(method, options, "the test"))
    tensor = Compressed(slots)
    hold([(layer, "weight")], tensor)
    if hard:
        tensor.harden(layer.weight)
    return layer


def of(layer: nn.Module) -> Compressed:
    tensor = held(layer, "weight")
    assert tensor is not None
    return tensor


def random(methods: Methods, hard: bool = True) -> nn.Linear:
    return made(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), hard, **methods)


def state(layer: nn.Module) -> bytes:
    """All that there is of a layer, its slots and its latent weight, bit for bit."""
    return pickle.dumps(layer)


#: Δ = 0.7 · mean |w| = 2.1875, s = 4
TERNARY = [[4.0, 4.0, -4.0, 0.5]]


def ternary() -> nn.Linear:
    layer = made(TERNARY, levels=("ternary", {}))
    assert layer.weight.tolist() == [[4.0, 4.0, -4.0, 0.0]]
    return layer


# ------------------------------------------------------------------------------------------------ what is where


def test_before_anything_begins_the_parameter_is_the_latent_weight():
    layer = made(TERNARY, hard=False, levels=("ternary", {}))
    tensor, pointer = of(layer), layer.weight.data_ptr()
    assert tensor.dense(layer.weight).data_ptr() == pointer
    tensor.set_strength("levels", 0.0, layer.weight)
    tensor.set_strength("mask", 1.0, layer.weight)  # nobody has filled it
    for action in (tensor.pull, tensor.lend, tensor.show, tensor.show_if_stale, tensor.absorb):
        action(layer.weight)
    assert tensor.latent is None
    assert not tensor.lent
    assert layer.weight.data_ptr() == pointer
    assert layer.weight.tolist() == TERNARY
    assert tensor.snapshot(layer.weight) is None


def test_from_the_first_strength_on_they_are_two_tensors():
    layer = made(TERNARY, hard=False, levels=("ternary", {}))
    tensor, weight = of(layer), layer.weight
    weight.grad = torch.ones(1, 4)
    tensor.set_strength("levels", 0.5, weight)
    assert weight.tolist() == TERNARY  # nothing is shown yet
    tensor.show(weight)
    assert weight.tolist() == [[4.0, 4.0, -4.0, 0.25]]  # 0 + (1 - 0.5)·(0.5 - 0)
    tensor.set_strength("levels", 1.0, weight)
    tensor.show(weight)
    assert weight.tolist() == [[4.0, 4.0, -4.0, 0.0]]
    assert tensor.latent.tolist() == TERNARY
    assert tensor.dense(weight).tolist() == TERNARY
    assert layer.weight is weight
    assert weight.requires_grad
    assert not tensor.latent.requires_grad
    assert weight.grad.tolist() == [[1.0] * 4]
    tensor.set_strength("levels", 0.0, weight)  # and off again
    tensor.show(weight)
    assert weight.tolist() == TERNARY
    assert tensor.slots.phase == [OFF, OFF, OFF]


def test_a_tying_overwrites_the_latent_weight_alone():
    layer = made([[1.0, 3.0, 0.0, -2.0]], tying=("row", {"block": 2}))
    assert of(layer).latent.tolist() == [[2.0, 2.0, -1.0, -1.0]]
    assert layer.weight.tolist() == [[2.0, 2.0, -1.0, -1.0]]
    assert of(layer).latent.data_ptr() != layer.weight.data_ptr()


def test_a_frozen_parameter_stays_frozen():
    layer = made(TERNARY, hard=False, levels=("ternary", {}))
    layer.weight.requires_grad_(False)
    of(layer).harden(layer.weight)
    of(layer).lend(layer.weight)
    of(layer).show(layer.weight)
    assert not layer.weight.requires_grad
    assert layer.weight.tolist() == [[4.0, 4.0, -4.0, 0.0]]


# ------------------------------------------------------------------------------------------- an optimizer's step


def test_a_step_by_hand():
    """Binary: s = mean |w|; the gradient at the hard weight is the latent one's."""
    layer = made([[1.0, 3.0, -2.0, -2.0]], levels=("binary", {}))
    tensor, weight = of(layer), layer.weight
    assert weight.tolist() == [[2.0, 2.0, -2.0, -2.0]]
    optimizer = torch.optim.SGD([weight], lr=0.5)
    (weight * torch.tensor([[1.0, -1.0, 2.0, 0.0]])).sum().backward()
    tensor.pull(weight)
    assert weight.grad.tolist() == [[1.0, -1.0, 2.0, 0.0]]
    tensor.lend(weight)
    assert tensor.lent
    assert weight.tolist() == [[1.0, 3.0, -2.0, -2.0]]
    assert weight.grad.tolist() == [[1.0, -1.0, 2.0, 0.0]]
    optimizer.step()
    tensor.show(weight)
    assert not tensor.lent
    assert tensor.latent.tolist() == [[0.5, 3.5, -3.0, -2.0]]
    assert weight.tolist() == [[2.25, 2.25, -2.25, -2.25]]


def test_a_step_that_is_skipped_leaves_everything_as_it_was(same_bits):
    layer = random(METHODS["movement, centroids"])
    tensor, before = of(layer), deepcopy(layer)
    for _ in range(2):  # twice, as a step within a step
        tensor.lend(layer.weight)
    assert same_bits(layer.weight, of(before).latent)
    for _ in range(2):
        tensor.show(layer.weight)
    assert same_bits(tensor.latent, of(before).latent)
    assert same_bits(layer.weight, before.weight)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("name", METHODS)
def test_steps_are_those_of_a_graph_through_the_slots(name: str, optimizer: str, same_bits):
    """Twenty steps on the Parameter, which the slots leave hard, and on a leaf that they are a part of the graph of."""
    make: Callable[..., torch.optim.Optimizer] = {
        "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1),
        "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    }[optimizer]
    layer = random(METHODS[name])
    tensor, weight = of(layer), layer.weight
    twin, leaf = deepcopy(tensor.slots), tensor.latent.clone().requires_grad_()
    theirs, its = make([weight]), make([leaf])
    sidecars, twins = list(tensor.slots.parameters()), list(twin.parameters())
    beside = [torch.optim.AdamW(found, lr=0.01) for found in (sidecars, twins) if found]
    generator = torch.Generator().manual_seed(3)
    before = weight.detach().clone()

    def same(one: Tensor, other: Tensor) -> bool:
        """Gradients of centroids and of what is tied are sums, in whatever order."""
        summed = name in ("movement, centroids", "rows, binary")
        return torch.allclose(one, other, rtol=1e-4, atol=1e-5) if summed else same_bits(one, other)

    for _ in range(20):
        x, y = torch.randn(5, 8, generator=generator), torch.randn(5, 6, generator=generator)
        ((x @ weight.T - y).square().mean()).backward()
        tensor.pull(weight)
        tensor.lend(weight)
        theirs.step()
        seen = through_all(twin, leaf)
        assert same(seen, before)
        ((x @ seen.T - y).square().mean()).backward()
        its.step()
        for other in beside:
            other.step()
        for one in [theirs, its, *beside]:
            one.zero_grad()
        tensor.show(weight)
        twin.refresh(leaf.detach())
        before = weight.detach().clone()
        assert same(tensor.latent, leaf)
    assert all(same(one, other) for one, other in zip(sidecars, twins, strict=True))
    assert same_bits(tensor.latent, of(random(METHODS[name])).latent) == (name == "factors, ternary")  # what is trained


def test_gradients_that_come_together_are_pulled_once(same_bits):
    """Accumulation: what sums up at the hard weight is what would have summed up at the latent one."""
    layer = random({"tying": ("row", {"block": 2})})
    tensor, weight = of(layer), layer.weight
    one, other = (torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    weight.grad = one + other
    tensor.pull(weight)
    slots = tensor.slots
    torch.testing.assert_close(weight.grad, slots.pull(tensor.latent, one) + slots.pull(tensor.latent, other))


def test_pulling_needs_a_gradient():
    layer = random(METHODS["movement, centroids"])
    of(layer).pull(layer.weight)
    assert layer.weight.grad is None
    assert all(sidecar.grad is None for sidecar in of(layer).slots.parameters())


def test_memory_is_swapped_and_not_copied():
    layer = ternary()
    tensor, weight = of(layer), layer.weight
    hard, latent = weight.data_ptr(), tensor.latent.data_ptr()
    for _ in range(3):
        tensor.lend(weight)
        assert weight.data_ptr() == latent
        tensor.show(weight)
        assert (weight.data_ptr(), tensor.latent.data_ptr()) == (hard, latent)


@pytest.mark.parametrize("kind", ["a view of more", "shared with other processes"])
def test_where_others_hold_the_memory_it_stays_where_it_is(kind: str):
    layer = made(TERNARY, hard=False, levels=("ternary", {}))
    flat = torch.zeros(9)
    if kind == "a view of more":
        flat[:4] = layer.weight.detach()[0]
        layer.weight.data = flat[:4].view(1, 4)
    else:
        layer.weight.share_memory_()
    pointer, tensor, weight = layer.weight.data_ptr(), of(layer), layer.weight
    tensor.harden(weight)
    assert weight.tolist() == [[4.0, 4.0, -4.0, 0.0]]
    tensor.lend(weight)
    assert weight.tolist() == TERNARY
    with torch.no_grad():
        weight.mul_(2)
    tensor.show(weight)
    assert tensor.latent.tolist() == [[8.0, 8.0, -8.0, 1.0]]
    assert weight.tolist() == [[8.0, 8.0, -8.0, 0.0]]
    assert weight.data_ptr() == pointer
    if kind == "a view of more":
        assert flat.tolist() == [8.0, 8.0, -8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]


# --------------------------------------------------------------------------------------------- what others write


@pytest.mark.parametrize("how", ["under no_grad", "by data"])
def test_a_change_in_place_goes_to_the_latent_weight_as_a_difference(how: str):
    """A weight norm that is kept, say: 0.75 of the hard weight is a quarter of it less of the latent one."""
    layer = ternary()
    tensor, weight = of(layer), layer.weight
    if how == "by data":
        weight.data.mul_(0.75)  # which no version counts
    else:
        with torch.no_grad():
            weight.mul_(0.75)
    assert tensor.written(weight)
    tensor.show(weight)
    assert tensor.latent.tolist() == [[3.0, 3.0, -3.0, 0.5]]
    assert weight.tolist() == [[3.0, 3.0, -3.0, 0.0]]
    assert not tensor.written(weight)


def test_a_target_that_follows_by_a_momentum_loses_nothing():
    """Each step moves a tenth of the way: what the levels round off adds up in the latent weight."""
    layer = made([[4.0, -4.0, 4.0, 0.0]], levels=("ternary", {}))
    tensor, weight = of(layer), layer.weight
    target = torch.tensor([[4.0, -4.0, 4.0, 4.0]])
    for step in range(60):
        with torch.no_grad():
            weight.lerp_(target, 0.1)
        tensor.show(weight)
        if step < 6:  # 0.4 a step, against Δ = 0.7·(12 + 0.4·step)/4
            assert weight.tolist() == [[4.0, -4.0, 4.0, 0.0]]
    assert weight.tolist() == [pytest.approx(target[0].tolist(), abs=0.01)]


def test_a_change_may_come_in_the_middle_of_a_step():
    """In the latent weight's place: it is the latent weight's own."""
    layer = ternary()
    tensor, weight = of(layer), layer.weight
    tensor.lend(weight)
    with torch.no_grad():
        weight.sub_(torch.tensor([[1.0, 1.0, -1.0, 0.0]]))
    assert not tensor.written(weight)
    tensor.show(weight)
    assert tensor.latent.tolist() == [[3.0, 3.0, -3.0, 0.5]]
    assert weight.tolist() == [[3.0, 3.0, -3.0, 0.0]]


def test_a_change_between_two_steps_is_taken_before_the_next():
    layer = ternary()
    tensor, weight = of(layer), layer.weight
    with torch.no_grad():
        weight.mul_(0.75)
    tensor.lend(weight)
    assert weight.tolist() == [[3.0, 3.0, -3.0, 0.5]]


def test_where_zeros_are_written_into_a_row_its_zeros_are_zero():
    """By a pruning hook, say: what the levels round to zero is zero for it, too. Other rows go on."""
    layer = made([[4.0, 4.0, -4.0, 0.5], [4.0, -4.0, 4.0, 1.0]], levels=("ternary", {}))
    tensor, weight = of(layer), layer.weight
    with torch.no_grad():
        weight[0, 0] = 0.0
    tensor.show(weight)
    assert tensor.latent.tolist() == [[0.0, 4.0, -4.0, 0.0], [4.0, -4.0, 4.0, 1.0]]
    assert weight.tolist() == [[0.0, 4.0, -4.0, 0.0], [4.0, -4.0, 4.0, 0.0]]


@pytest.mark.parametrize(
    "write",
    [
        lambda layer, new: layer.load_state_dict({"weight": new, "bias": torch.zeros(1)}),
        lambda layer, new: layer.load_state_dict({"weight": new, "bias": torch.zeros(1)}, assign=True),
        lambda layer, new: setattr(layer, "weight", nn.Parameter(new)),
        lambda layer, new: setattr(layer.weight, "data", new),
    ],
    ids=["load_state_dict", "load_state_dict, assigning", "a new Parameter", "new data"],
)
@pytest.mark.parametrize("new", [[[1.0, -8.0, 2.0, -8.0]], [[4.0, 4.0, -4.0, 0.25]]], ids=["far", "near"])
def test_what_is_loaded_or_assigned_replaces_the_latent_weight(write, new: list[list[float]]):
    layer, given = ternary(), torch.tensor(new)
    tensor = of(layer)
    write(layer, given)
    assert tensor.written(layer.weight)
    assert layer.weight.tolist() == new
    tensor.show(layer.weight)
    assert tensor.latent.tolist() == new
    far = new[0][0] == 1.0
    assert layer.weight.tolist() == ([[0.0, -8.0, 0.0, -8.0]] if far else [[4.0, 4.0, -4.0, 0.0]])
    assert given.tolist() == new  # the caller's own
    tensor.lend(layer.weight)
    tensor.show(layer.weight)
    assert given.tolist() == new
    assert not tensor.written(layer.weight)


def test_what_is_initialised_anew_replaces_the_latent_weight():
    layer = random(METHODS["magnitude, uniform"])
    torch.manual_seed(0)
    nn.init.normal_(layer.weight, std=0.1)
    new = layer.weight.detach().clone()
    of(layer).show(layer.weight)
    assert torch.equal(of(layer).latent, new)
    assert int((layer.weight == 0).sum()) >= 24


@pytest.mark.parametrize("name", METHODS)
def test_a_weight_of_another_shape_begins_anew_under_the_same_methods(name: str):
    """An embedding that has grown, say."""
    layer = random(METHODS[name])
    before = of(layer).slots
    new = torch.randn(10, 8, generator=torch.Generator().manual_seed(7))
    layer.weight = nn.Parameter(new.clone())
    data, _ = to_bytes(layer)
    assert of(layer).slots is before
    of(layer).show(layer.weight)
    fresh = made(new, **METHODS[name])
    assert of(layer).slots.specs == before.specs
    assert of(layer).slots.phase == before.phase
    assert torch.equal(layer.weight, fresh.weight)
    assert to_bytes(layer)[0] == data


@pytest.mark.parametrize("name", ["a bank", "factors", "movement, centroids"])
def test_what_was_made_for_another_weight_begins_anew(name: str):
    """Factors, centroids, a bank: what is loaded must be seen, not what they have learned."""
    methods = {**METHODS, "factors": {"tying": ("low_rank", {"rank": 2})}}[name]
    layer, other = random(methods), random(methods)
    with torch.no_grad():
        other.weight.copy_(torch.randn(6, 8, generator=torch.Generator().manual_seed(7)))
    of(other).show(other.weight)
    layer.load_state_dict(other.state_dict())
    of(layer).show(layer.weight)
    assert torch.allclose(layer.weight, other.weight, atol=1e-2)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "factors, ternary"])  # which a product hides
def test_a_hard_weight_that_is_loaded_is_written_again_as_it_is(name: str, tmp_path, same_bits):
    layer, fresh = random(METHODS[name]), random(METHODS[name], hard=False)
    other = made(torch.randn(6, 8, generator=torch.Generator().manual_seed(7)), **METHODS[name])
    for one in (fresh, other):
        one.load_state_dict(layer.state_dict())
        before = state(one)
        save(one, tmp_path / "model.psc")
        assert same_bits(load(tmp_path / "model.psc")["weight"], layer.weight)
        assert state(one) == before


def test_rows_that_change_places_are_a_write():
    """Of the same numbers, whose sum is the same."""
    layer = made([[4.0, 4.0, -4.0, 0.5], [1.0, -1.0, 1.0, 0.25]], levels=("ternary", {}))
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(0))
    of(layer).show(layer.weight)
    assert layer.weight.tolist() == [[1.0, -1.0, 1.0, 0.0], [4.0, 4.0, -4.0, 0.0]]


def test_a_weight_that_was_written_as_it_was_is_no_write():
    layer = ternary()
    tensor, weight = of(layer), layer.weight
    with torch.no_grad():
        weight.copy_(weight.clone())
    layer.load_state_dict(deepcopy(layer.state_dict()))
    tensor.show(weight)
    assert tensor.latent.tolist() == TERNARY


@pytest.mark.parametrize(
    "move",
    [
        lambda layer: setattr(layer.weight, "data", layer.weight.data.clone()),
        lambda layer: layer.share_memory(),
        lambda layer: layer.to("cpu"),
        lambda layer: layer.requires_grad_(False),
        lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().clone())),
        lambda layer: layer.double(),
        lambda layer: layer.bfloat16(),
    ],
    ids=["other memory", "shared memory", "to", "frozen", "another Parameter", "double", "bfloat16"],
)
@pytest.mark.parametrize("name", METHODS)
def test_a_weight_that_was_moved_is_no_write(name: str, move: Callable[[nn.Module], object], same_bits):
    layer = random(METHODS[name])
    tensor, latent = of(layer), of(layer).latent.clone()
    sidecars = {key: value.clone() for key, value in tensor.slots.named_parameters()}
    move(layer)
    tensor.show(layer.weight)
    assert tensor.latent.dtype == layer.weight.dtype
    assert same_bits(tensor.latent, latent.to(layer.weight.dtype))
    assert all(same_bits(value, sidecars[key]) for key, value in tensor.slots.named_parameters())
    assert same_bits(layer.weight, tensor.slots.make(tensor.latent))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_a_file_of_a_model_of_another_type_holds_what_it_shows_next(name: str, dtype: torch.dtype, tmp_path, same_bits):
    layer = random(METHODS[name]).to(dtype)
    before = state(layer)
    save(layer, tmp_path / "model.psc")
    assert state(layer) == before
    found = load(tmp_path / "model.psc")["weight"]
    of(layer).show(layer.weight)
    assert same_bits(found, layer.weight)


def test_a_constraint_that_the_levels_cannot_hold_is_told_once():
    layer = made([[1.0, 3.0, -2.0, -2.0]], levels=("binary", {}))
    with torch.no_grad():
        layer.weight[0, 0] = 0.0
    with pytest.warns(UserWarning, match=r"a weight was written to while .* \(binary\).*cannot hold"):
        of(layer).show(layer.weight)
    assert layer.weight.tolist() == [[1.75, 1.75, -1.75, -1.75]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            layer.weight[0, 0] = 0.0
        of(layer).show(layer.weight)


@pytest.mark.parametrize("copy", [deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["deepcopy", "pickle"])
@pytest.mark.filterwarnings("ignore:load_state_dict wrote what their slots cannot hold")  # dense ones
@pytest.mark.parametrize("moment", ["hard", "written", "loaded", "lent", "soft"])
def test_a_copy_at_any_moment_is_the_same_model(moment: str, copy: Callable[[nn.Module], nn.Module], same_bits):
    layer = random(METHODS["magnitude, uniform"])
    tensor = of(layer)
    if moment == "written":
        with torch.no_grad():
            layer.weight.mul_(0.9)
    elif moment == "loaded":
        layer.load_state_dict(nn.Linear(8, 6).state_dict())
    elif moment == "lent":
        tensor.lend(layer.weight)
        with torch.no_grad():
            layer.weight.mul_(0.9)
    elif moment == "soft":
        tensor.set_strength("levels", 0.5, layer.weight)
    twin = copy(layer)
    assert to_bytes(twin)[0] == to_bytes(layer)[0]
    for one in (layer, twin):
        of(one).show(one.weight)
    assert same_bits(twin.weight, layer.weight)
    assert same_bits(of(twin).latent, tensor.latent)


# ------------------------------------------------------------------------------------------------- looking ahead


def moments() -> dict[str, Callable[[nn.Linear, Compressed], None]]:
    """What may be going on when someone asks for a file."""

    def soften(layer: nn.Linear, tensor: Compressed) -> None:
        for slot in tensor.slots.specs:
            tensor.set_strength(slot, 0.5, layer.weight)
        tensor.show(layer.weight)

    def lend(layer: nn.Linear, tensor: Compressed) -> None:
        tensor.lend(layer.weight)
        with torch.no_grad():
            layer.weight.mul_(1.5).add_(0.1)

    def write(layer: nn.Linear, tensor: Compressed) -> None:
        with torch.no_grad():
            layer.weight.mul_(1.25)

    def stale(layer: nn.Linear, tensor: Compressed) -> None:
        tensor.slots.stale = True

    return {
        "hard": lambda layer, tensor: None,
        "soft": soften,
        "lent": lend,
        "written": write,
        "stale": stale,
        "loaded": lambda layer, tensor: layer.load_state_dict(nn.Linear(8, 6).state_dict()) and None,
    }


@pytest.mark.filterwarnings("ignore:load_state_dict wrote what their slots cannot hold")  # dense ones
@pytest.mark.parametrize("moment", moments())
@pytest.mark.parametrize("name", METHODS)
def test_a_snapshot_says_what_hardening_now_would_give_and_changes_nothing(name: str, moment: str, same_bits):
    torch.manual_seed(0)
    layer = random(METHODS[name])
    tensor = of(layer)
    moments()[moment](layer, tensor)
    before, pointers = state(layer), (layer.weight.data_ptr(), tensor.latent.data_ptr(), layer.weight._version)
    generator = torch.get_rng_state()
    slots, latent = tensor.snapshot(layer.weight)
    weight = slots.stored(latent).weight
    report, (data, _) = measure(layer), to_bytes(layer)
    assert torch.equal(torch.get_rng_state(), generator)
    assert state(layer) == before
    assert (layer.weight.data_ptr(), tensor.latent.data_ptr(), layer.weight._version) == pointers
    assert report.file_bytes == len(data)
    assert not slots.soft
    if tensor.lent:
        tensor.show(layer.weight)
    tensor.harden(layer.weight)
    tensor.show(layer.weight)
    assert same_bits(layer.weight, weight)
    assert to_bytes(layer)[0] == data


def test_a_snapshot_hardens_what_has_begun_and_begins_nothing():
    layer = random(METHODS["magnitude, uniform"], hard=False)
    tensor = of(layer)
    tensor.set_strength("mask", 0.5, layer.weight)
    tensor.show(layer.weight)
    slots, latent = tensor.snapshot(layer.weight)
    weight = slots.stored(latent).weight
    assert int((weight == 0).sum()) == 24  # half of 48, where the ramp is at a quarter
    assert int((layer.weight == 0).sum()) == 12
    assert len(weight.unique()) == 25


# --------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("moment", ["hard", "soft", "written"])
@pytest.mark.parametrize("name", METHODS)
def test_a_state_of_training_goes_on_where_it_was(name: str, moment: str, same_bits):
    layer = random(METHODS[name])
    moments()[moment](layer, of(layer))
    tensor = of(layer)
    found = {key: value.clone() for key, value in tensor.training_state(layer.weight).items()}
    own = {value.data_ptr() for value in (tensor.latent, layer.weight, *tensor.slots.state_dict().values())}
    assert not {value.data_ptr() for value in tensor.training_state(layer.weight).values()} & own
    other = made(torch.randn(6, 8), hard=False, **METHODS[name])
    other.load_state_dict(layer.state_dict())
    of(other).load_training_state(other.weight, found)
    assert same_bits(other.weight, layer.weight)
    assert same_bits(of(other).latent, tensor.latent)
    assert of(other).slots.phase == tensor.slots.phase
    assert to_bytes(other)[0] == to_bytes(layer)[0]
    weights = []
    for one in (layer, other):
        one.weight.grad = torch.linspace(-1, 1, 48).reshape(6, 8)
        of(one).pull(one.weight)
        of(one).lend(one.weight)
        with torch.no_grad():
            for parameter in (one.weight, *of(one).slots.parameters()):
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)
        of(one).show(one.weight)
        weights.append(one.weight)
    assert same_bits(*weights)


def test_before_anything_begins_a_state_holds_no_latent_weight(same_bits):
    layer = random(METHODS["movement, centroids"], hard=False)
    found = of(layer).training_state(layer.weight)
    assert "latent" not in found
    other = made(torch.randn(6, 8), hard=False, **METHODS["movement, centroids"])
    other.load_state_dict(layer.state_dict())
    of(other).load_training_state(other.weight, found)
    assert of(other).latent is None
    assert same_bits(other.weight, layer.weight)
    for one in (layer, other):
        of(one).harden(one.weight)
    assert same_bits(other.weight, layer.weight)


def test_an_average_of_latent_weights_is_shown_hard():
    layer = ternary()
    tensor, average = of(layer), torch.tensor([[2.0, 4.0, -4.0, 4.0]])
    tensor.follow(layer.weight, average)
    assert tensor.latent.tolist() == average.tolist()
    assert tensor.latent.data_ptr() != average.data_ptr()
    assert layer.weight.tolist() == [[0.0, 4.0, -4.0, 4.0]]  # Δ = 0.7·3.5 = 2.45
    tensor.lend(layer.weight)
    tensor.follow(layer.weight, torch.tensor(TERNARY))
    assert layer.weight.tolist() == [[4.0, 4.0, -4.0, 0.0]]
    assert not tensor.lent


def test_a_factor_an_output_channel_by_hand():
    layer = made([[4.0, 4.0, -4.0, 0.5], [1.0, -1.0, 1.0, 1.0]], levels=("ternary", {}))
    of(layer).rescale(layer.weight, torch.tensor([0.5, 3.0]))
    assert layer.weight.tolist() == [[2.0, 2.0, -2.0, 0.0], [3.0, -3.0, 3.0, 3.0]]
    assert not of(layer).written(layer.weight)
    of(layer).show(layer.weight)
    assert layer.weight.tolist() == [[2.0, 2.0, -2.0, 0.0], [3.0, -3.0, 3.0, 3.0]]
