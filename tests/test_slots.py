from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from psc_lightning.layout import Layout
from psc_lightning.slots import HARD, OFF, SOFT, Slots, Spec
from psc_lightning.stored import decode

SHARE = {"threshold": 0.5}


def make(shape: tuple[int, ...] = (4, 8), **methods: tuple[str, dict[str, object]]) -> tuple[Slots, nn.Parameter]:
    slots = Slots(Layout(), shape)
    for slot, (method, options) in methods.items():
        slots.fill(slot, Spec(method, options, f"the {method} callback"))
    return slots, nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def test_by_hand_all_three():
    slots = Slots(Layout(), (1, 8))
    slots.fill("levels", Spec("ternary"))
    slots.fill("tying", Spec("row", {"block": 2}))
    slots.fill("mask", Spec("magnitude", {"threshold": 0.25}))
    weight = nn.Parameter(torch.tensor([[1.0, 3.0, 0.1, 0.1, -4.0, -2.0, 1.5, 0.5]]))
    slots.harden(weight)
    # core 2, 0.1, -3, 1; mask drops 0.1; Δ = 0.7·2 = 1.4 over the survivors; s = (2 + 3)/2
    assert slots.effective(weight).tolist() == [[2.5, 2.5, 0.0, 0.0, -2.5, -2.5, 0.0, 0.0]]
    assert weight.tolist() == [pytest.approx([2.0, 2.0, 0.1, 0.1, -3.0, -3.0, 1.0, 1.0])]
    slots.effective(weight).backward(torch.arange(8.0)[None])
    assert weight.grad.tolist() == [[0.5, 0.5, 2.5, 2.5, 4.5, 4.5, 6.5, 6.5]]
    assert slots.method == "row+magnitude+ternary"
    assert slots.core_shapes() == {"core": (1, 4)}


@pytest.mark.parametrize("order", list(itertools.permutations(("tying", "mask", "levels"))), ids="-".join)
def test_the_order_of_filling_does_not_matter(order: tuple[str, ...], same_bits):
    specs = {
        "tying": Spec("low_rank", {"rank": 2}),
        "mask": Spec("magnitude", SHARE),
        "levels": Spec("codebook", {"k": 4}),
    }
    results = []
    for names in (("tying", "mask", "levels"), order):
        slots = Slots(Layout(), (6, 8))
        for name in names:
            slots.fill(name, specs[name])
        weight = nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)))
        slots.harden(weight)
        results.append(slots.effective(weight))
        assert slots.method == "low_rank+magnitude+codebook"
    assert same_bits(*results)


def test_a_slot_filled_twice_names_both():
    slots, _ = make(mask=("magnitude", SHARE))
    with pytest.raises(
        ValueError, match=r"mask slot is filled by the magnitude callback and again by another.*keep one"
    ):
        slots.fill("mask", Spec("movement", SHARE, "another"))
    assert slots.method == "magnitude"


def test_a_tying_after_something_has_begun_is_refused():
    slots, weight = make(levels=("uniform", {}))
    slots.set_strength("levels", 1.0, weight)
    with pytest.raises(ValueError, match="the late one comes after another slot has begun"):
        slots.fill("tying", Spec("row", {}, "the late one"))


def test_a_mask_may_come_later_and_leaves_what_the_levels_have_learned(same_bits):
    slots, weight = make(levels=("codebook", {"k": 3}))
    slots.harden(weight)
    centroids = slots._chain("core").levels.centroids
    slots.fill("mask", Spec("magnitude", SHARE))
    assert slots._chain("core").levels.centroids is centroids
    slots.harden(weight)
    assert int((slots.effective(weight) == 0).sum()) >= 16


def test_empty_slots_have_no_strength():
    slots, weight = make(mask=("magnitude", SHARE))
    slots.set_strength("tying", 1.0, weight)
    slots.set_strength("levels", 1.0, weight)
    assert not slots.begun
    assert not make()[0].filled
    assert make()[0].method == "plain"


def test_mask_and_levels_wait_for_the_tying():
    slots, weight = make(tying=("row", {}), mask=("magnitude", SHARE), levels=("uniform", {}))
    for slot in ("mask", "levels"):
        slots.set_strength(slot, 1.0, weight)
    assert slots.phase == [OFF, OFF, OFF]
    assert slots.effective(weight) is weight
    slots.set_strength("tying", 0.01, weight)  # no soft phase
    assert slots.phase == [HARD, OFF, OFF]
    slots.set_strength("mask", 0.5, weight)
    assert slots.phase == [HARD, SOFT, OFF]


def test_hardening_says_whether_anything_changed():
    slots, weight = make(mask=("magnitude", SHARE), levels=("uniform", {}))
    slots.set_strength("mask", 0.5, weight)
    assert slots.harden(weight)
    assert not slots.harden(weight)
    assert slots.strength.tolist() == [0.0, 1.0, 1.0]


def test_hardening_brings_stale_buffers_up_to_date():
    slots, weight = make(levels=("uniform", {}))
    slots.harden(weight)
    scale = slots._chain("core").levels.scale.clone()
    with torch.no_grad():
        weight.mul_(4)
    slots.stale = True
    assert not slots.harden(weight)
    assert torch.equal(slots._chain("core").levels.scale, 4 * scale)


def test_levels_begin_with_the_mask_of_that_moment():
    slots, weight = make((1, 4), mask=("magnitude", SHARE), levels=("codebook", {"k": 2}))
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.5, 0.25, 4.0, -4.0]]))
    slots.set_strength("levels", 1.0, weight)
    slots.set_strength("mask", 1.0, weight)
    assert slots.effective(weight).tolist() == [[0.0, 0.0, 4.0, -4.0]]
    assert slots._chain("core").levels.centroids.tolist() == [[-4.0, 4.0]]


def test_centroids_and_learned_steps_learn_from_the_survivors_only():
    """A masked entry belongs to no cluster: what is stored for it is nothing."""
    gradient = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    values = torch.tensor([[0.5, 0.25, 4.0, -4.0]])
    slots, weight = make((1, 4), mask=("magnitude", SHARE), levels=("codebook", {"k": 2}))
    with torch.no_grad():
        weight.copy_(values)
    slots.harden(weight)
    slots.effective(weight).backward(gradient)
    assert slots._chain("core").levels.centroids.grad.tolist() == [[8.0, 4.0]]
    assert weight.grad.tolist() == gradient.tolist()  # but the masked weight itself goes on learning
    slots, weight = make((1, 4), mask=("magnitude", SHARE), levels=("uniform", {"learned_step": True, "bits": 4}))
    with torch.no_grad():
        weight.copy_(values)
    slots.harden(weight)
    levels = slots._chain("core").levels
    with torch.no_grad():
        levels.step.fill_(1.5)
    slots.effective(weight).backward(gradient)
    # 4/1.5 = 2.667 → 3: 1/3 of a step, for 4.0 and, with the other sign, for -4.0
    assert levels.step.grad.tolist() == pytest.approx([4 / 3 - 8 / 3])
    assert weight.grad.tolist() == gradient.tolist()


def test_labels_reach_the_mask_through_a_tying():
    slots, weight = make((1, 4), tying=("row", {"block": 2}), mask=("saliency", SHARE))
    with torch.no_grad():
        weight.copy_(torch.tensor([[1.0, 1.0, 9.0, 9.0]]))
    weight.grad = torch.tensor([[8.0, 8.0, 0.0, 0.5]])
    slots.observe("mask", weight)  # before the tying begins there is no core to look at
    assert not slots._chain("core").mask.total.any()
    slots.set_strength("tying", 1.0, weight)
    slots.observe("mask", weight)
    slots.harden(weight)
    assert slots.effective(weight).tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_labels_of_factors_are_their_own_gradients():
    slots, weight = make(
        (6, 8), tying=("low_rank", {"rank": 1}), mask=("saliency", {"threshold": 0.5, "label": "fisher"})
    )
    slots.set_strength("tying", 1.0, weight)
    slots.effective(weight).backward(torch.randn(6, 8))
    weight.grad = torch.zeros_like(weight)
    slots.observe("mask", weight)
    for name, factor in slots.tying.named_parameters():
        assert torch.equal(slots._chain(name).mask.total, factor.grad.square())


def test_nothing_to_observe_without_a_gradient():
    slots, weight = make(mask=("saliency", SHARE))
    slots.observe("mask", weight)
    assert not slots._chain("core").mask.total.any()


def test_a_soft_or_absent_slot_is_not_stored(tape, same_bits):
    slots, weight = make(mask=("magnitude", SHARE), levels=("uniform", {}))
    slots.set_strength("mask", 1.0, weight)
    written = tape()
    slots.encode(written, weight)
    assert same_bits(decode(written, (4, 8), torch.float32).weight, slots.effective(weight))


@pytest.mark.parametrize(("at", "value"), [(1, 6), (1, -1), (2, 2), (3, 8)])
def test_numbers_that_name_no_method_are_refused(at: int, value: int, tape):
    written = tape()
    for number in [*[0] * at, value]:
        written.integer(number)
    with pytest.raises(ValueError, match=r"not in|unknown"):
        decode(written, (2, 2), torch.float32)


def test_sidecars_belong_to_one_slot_each():
    slots, _ = make(
        (6, 8), tying=("low_rank", {"rank": 1}), mask=("movement", SHARE), levels=("uniform", {"learned_step": True})
    )
    by_slot = [list(slots.sidecars(slot)) for slot in ("tying", "mask", "levels")]
    assert [len(part) for part in by_slot] == [2, 2, 2]
    assert {id(p) for part in by_slot for p in part} == {id(p) for p in slots.parameters()}


@pytest.mark.parametrize(
    "methods",
    [{"tying": ("low_rank", {"rank": 2})}, {"levels": ("codebook", {"k": 4})}, {"tying": ("row", {})}],
    ids=str,
)
def test_a_plain_checkpoint_begins_anew(methods: dict[str, tuple[str, dict[str, object]]]):
    """Factors and centroids that were made for another weight would hide the one that was loaded."""
    other, new = make((6, 8), **methods)
    with torch.no_grad():
        new.copy_(torch.randn(6, 8, generator=torch.Generator().manual_seed(9)))
    other.harden(new)
    loaded = other.effective(new).detach()
    slots, weight = make((6, 8), **methods)
    slots.harden(weight)
    slots.load_state_dict({})
    with torch.no_grad():
        weight.copy_(loaded)
    assert torch.allclose(slots.effective(weight), loaded, atol=1e-2)


def test_forward_draws_no_random_numbers_and_changes_no_state():
    slots, weight = make((6, 8), mask=("movement", SHARE), levels=("codebook", {"k": 4}))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    slots.harden(weight)
    state = {key: value.clone() for key, value in slots.state_dict().items()}
    for _ in range(3):
        slots.effective(weight)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[key]) for key, value in slots.state_dict().items())


def test_the_gradient_is_the_same_from_run_to_run(same_bits):
    def gradients() -> list[Tensor]:
        slots, weight = make((32, 64), mask=("magnitude", SHARE), levels=("codebook", {"k": 4, "group": "channel"}))
        slots.harden(weight)
        slots.effective(weight).backward(torch.randn(32, 64, generator=torch.Generator().manual_seed(1)))
        return [p.grad for p in (weight, *slots.parameters())]

    first = gradients()
    for _ in range(3):
        assert all(same_bits(a, b) for a, b in zip(first, gradients(), strict=True))
