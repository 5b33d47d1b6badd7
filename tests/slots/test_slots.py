from __future__ import annotations

import itertools
import pickle
from copy import deepcopy

import pytest
import torch
from torch import Tensor

from psc_lightning.slots.layout import Layout
from psc_lightning.slots.slots import HARD, OFF, SOFT, Slots, Spec
from psc_lightning.slots.stored import decode

SHARE = {"threshold": 0.5}


def make(shape: tuple[int, ...] = (4, 8), **methods: tuple[str, dict[str, object]]) -> tuple[Slots, Tensor]:
    """Slots of which none has begun, and a latent weight."""
    slots = Slots(Layout(), shape)
    for slot, (method, options) in methods.items():
        slots.fill(slot, Spec(method, options, f"the {method} callback"))
    return slots, torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_by_hand_all_three():
    slots = Slots(Layout(), (1, 8))
    slots.fill("levels", Spec("ternary"))
    slots.fill("tying", Spec("row", {"block": 2}))
    slots.fill("mask", Spec("magnitude", {"threshold": 0.25}))
    latent = torch.tensor([[1.0, 3.0, 0.1, 0.1, -4.0, -2.0, 1.5, 0.5]])
    slots.harden(latent)
    # core 2, 0.1, -3, 1; mask drops 0.1; Δ = 0.7·2 = 1.4 over the survivors; s = (2 + 3)/2
    assert slots.make(latent).tolist() == [[2.5, 2.5, 0.0, 0.0, -2.5, -2.5, 0.0, 0.0]]
    assert latent.tolist() == [pytest.approx([2.0, 2.0, 0.1, 0.1, -3.0, -3.0, 1.0, 1.0])]
    assert slots.pull(latent, torch.arange(8.0)[None]).tolist() == [[0.5, 0.5, 2.5, 2.5, 4.5, 4.5, 6.5, 6.5]]
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
        latent = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
        slots.harden(latent)
        results.append(slots.make(latent))
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
    slots, latent = make(levels=("uniform", {}))
    slots.set_strength("levels", 1.0, latent)
    with pytest.raises(ValueError, match="the late one comes after another slot has begun"):
        slots.fill("tying", Spec("row", {}, "the late one"))


def test_a_mask_may_come_later_and_leaves_what_the_levels_have_learned(same_bits):
    slots, latent = make(levels=("codebook", {"k": 3}))
    slots.harden(latent)
    centroids = slots.chain("core").levels.centroids
    slots.fill("mask", Spec("magnitude", SHARE))
    assert slots.chain("core").levels.centroids is centroids
    slots.harden(latent)
    assert int((slots.make(latent) == 0).sum()) >= 16


def test_empty_slots_have_no_strength():
    slots, latent = make(mask=("magnitude", SHARE))
    slots.set_strength("tying", 1.0, latent)
    slots.set_strength("levels", 1.0, latent)
    assert not slots.begun
    assert make()[0].method == "plain"
    assert make()[0].specs == {}


def test_mask_and_levels_wait_for_the_tying():
    slots, latent = make(tying=("row", {}), mask=("magnitude", SHARE), levels=("uniform", {}))
    for slot in ("mask", "levels"):
        slots.set_strength(slot, 1.0, latent)
    assert slots.phase == [OFF, OFF, OFF]
    assert slots.make(latent) is latent
    slots.set_strength("tying", 0.01, latent)  # no soft phase
    assert slots.phase == [HARD, OFF, OFF]
    slots.set_strength("mask", 0.5, latent)
    assert slots.phase == [HARD, SOFT, OFF]
    assert slots.soft


def test_hardening_brings_all_that_is_filled_to_full_strength():
    slots, latent = make(mask=("magnitude", SHARE), levels=("uniform", {}))
    slots.set_strength("mask", 0.5, latent)
    assert slots.acts("levels", 0.0)
    assert not slots.acts("mask", 0.5)  # a ramp's strength may be told anew each step
    slots.harden(latent)
    assert slots.strength.tolist() == [0.0, 1.0, 1.0]
    assert slots.phase == [OFF, HARD, HARD]
    assert not slots.stale
    assert not slots.soft
    assert slots.acts("levels", 1.0)
    assert slots.acts("mask", 1.0)
    before = pickle.dumps(slots)
    slots.harden(latent)  # nothing to do
    assert pickle.dumps(slots) == before


def test_hardening_brings_stale_buffers_up_to_date():
    slots, latent = make(levels=("uniform", {}))
    slots.harden(latent)
    scale = slots.chain("core").levels.scale.clone()
    latent.mul_(4)
    slots.harden(latent)  # it has not been told
    assert torch.equal(slots.chain("core").levels.scale, scale)
    slots.stale = True
    slots.harden(latent)
    assert torch.equal(slots.chain("core").levels.scale, 4 * scale)


def test_only_what_is_due_is_recomputed():
    """A threshold every few steps, say: the flags count once, all is due again after that."""
    slots, latent = make((1, 4), mask=("magnitude", SHARE), levels=("uniform", {}))
    latent.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    slots.harden(latent)
    latent.copy_(torch.tensor([[8.0, 7.0, 6.0, 5.0]]))
    slots.due = [True, False, True]
    slots.refresh(latent)
    assert slots.chain("core").mask.keep.tolist() == [[False, False, True, True]]
    assert slots.make(latent)[0, 2].item() == pytest.approx(6.0, rel=1e-3)  # the scale is that of now: 6 is its largest
    assert slots.due == [True, True, True]
    slots.refresh(latent)
    assert slots.chain("core").mask.keep.tolist() == [[True, True, False, False]]


def test_levels_begin_with_the_mask_of_that_moment():
    slots, latent = make((1, 4), mask=("magnitude", SHARE), levels=("codebook", {"k": 2}))
    latent.copy_(torch.tensor([[0.5, 0.25, 4.0, -4.0]]))
    slots.set_strength("levels", 1.0, latent)
    slots.set_strength("mask", 1.0, latent)
    slots.refresh(latent)
    assert slots.make(latent).tolist() == [[0.0, 0.0, 4.0, -4.0]]
    assert slots.chain("core").levels.centroids.tolist() == [[-4.0, 4.0]]


def test_centroids_and_learned_steps_learn_from_the_survivors_only():
    """A masked entry belongs to no cluster: what is stored for it is nothing."""
    gradient = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    values = torch.tensor([[0.5, 0.25, 4.0, -4.0]])
    slots, latent = make((1, 4), mask=("magnitude", SHARE), levels=("codebook", {"k": 2}))
    latent.copy_(values)
    slots.harden(latent)
    pulled = slots.pull(latent, gradient)
    assert slots.chain("core").levels.centroids.grad.tolist() == [[8.0, 4.0]]
    assert pulled.tolist() == gradient.tolist()  # but the masked weight itself goes on learning
    slots, latent = make((1, 4), mask=("magnitude", SHARE), levels=("uniform", {"learned_step": True, "bits": 4}))
    latent.copy_(values)
    slots.harden(latent)
    levels = slots.chain("core").levels
    with torch.no_grad():
        levels.step.fill_(1.5)
    pulled = slots.pull(latent, gradient)
    # 4/1.5 = 2.667 → 3: 1/3 of a step, for 4.0 and, with the other sign, for -4.0
    assert levels.step.grad.tolist() == pytest.approx([4 / 3 - 8 / 3])
    assert pulled.tolist() == gradient.tolist()


@pytest.mark.parametrize(
    "methods",
    [{}, {"levels": ("ternary", {})}, {"mask": ("magnitude", SHARE), "levels": ("log", {})}],
    ids=str,
)
def test_where_all_is_straight_through_the_gradient_is_the_same_tensor(
    methods: dict[str, tuple[str, dict[str, object]]],
):
    slots, latent = make(**methods)
    slots.harden(latent)
    gradient = torch.randn(4, 8)
    assert slots.straight
    assert slots.pull(latent, gradient) is gradient


def test_a_mask_may_keep_the_gradient_from_what_it_drops():
    slots, latent = make((1, 4), mask=("saliency", SHARE), levels=("ternary", {}))
    slots.observe("mask", latent.fill_(1.0), torch.tensor([[4.0, 1.0, 2.0, 3.0]]))
    slots.harden(latent)
    assert not slots.straight
    assert slots.pull(latent, torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[1.0, 0.0, 0.0, 4.0]]


def test_what_is_trained_beside_the_weight_gets_its_gradient_once_it_has_begun():
    slots, latent = make((6, 8), mask=("movement", SHARE), levels=("codebook", {"k": 4}))
    assert slots.straight  # nothing has begun
    assert list(slots.active_sidecars()) == []
    slots.set_strength("levels", 1.0, latent)
    slots.refresh(latent)
    assert not slots.straight
    assert list(slots.active_sidecars()) == list(slots.sidecars("levels"))
    slots.pull(latent, torch.ones(6, 8))
    centroids, scores = slots.chain("core").levels.centroids, slots.chain("core").mask.scores
    assert float(centroids.grad.sum()) == 48.0  # each entry belongs to one centroid
    assert scores.grad is None
    slots.set_strength("mask", 1.0, latent)
    slots.refresh(latent)
    slots.pull(latent, torch.ones(6, 8))
    assert float(centroids.grad.sum()) == 24.0  # the survivors only; not added to what was there
    # ∂L/∂S = ∂L/∂Ŵ · W, of the value that the mask lets through
    assert scores.grad.shape == (6, 8)
    assert scores.grad.any()


def test_factors_take_all_of_the_gradient():
    slots, latent = make((6, 8), tying=("low_rank", {"rank": 1}))
    slots.harden(latent)
    gradient = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    assert slots.pull(latent, gradient) is None  # the loss does not depend on the latent weight
    (u, v) = slots.tying.parameters()
    assert torch.allclose(u.grad, gradient @ v.detach().reshape(8, 1), rtol=1e-5)
    assert torch.allclose(v.grad.reshape(8), (u.detach().reshape(1, 6) @ gradient).reshape(8), rtol=1e-5)


def test_a_blend_hands_through_what_both_of_its_parts_do():
    """Of centroids half: they are half of what is computed with."""
    slots, latent = make((1, 4), levels=("codebook", {"k": 2}))
    latent.copy_(torch.tensor([[0.5, 0.5, 4.0, 4.0]]))
    slots.set_strength("levels", 0.25, latent)
    slots.refresh(latent)
    pulled = slots.pull(latent, torch.tensor([[1.0, 2.0, 4.0, 8.0]]))
    # hard + (1 - 0.25)·(x - hard)
    assert slots.chain("core").levels.centroids.grad.tolist() == [[0.75, 3.0]]
    assert pulled.tolist() == [[1.0, 2.0, 4.0, 8.0]]


def test_labels_reach_the_mask_through_a_tying():
    slots, latent = make((1, 4), tying=("row", {"block": 2}), mask=("saliency", SHARE))
    latent.copy_(torch.tensor([[1.0, 1.0, 9.0, 9.0]]))
    gradient = torch.tensor([[8.0, 8.0, 0.0, 0.5]])
    slots.observe("mask", latent, gradient)  # before the tying begins there is no core to look at
    assert not slots.chain("core").mask.total.any()
    slots.set_strength("tying", 1.0, latent)
    slots.observe("mask", latent, gradient)
    slots.harden(latent)
    assert slots.make(latent).tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_labels_of_factors_are_their_own_gradients():
    slots, latent = make(
        (6, 8), tying=("low_rank", {"rank": 1}), mask=("saliency", {"threshold": 0.5, "label": "fisher"})
    )
    slots.set_strength("tying", 1.0, latent)
    assert slots.pull(latent, torch.randn(6, 8)) is None
    slots.observe("mask", latent, None)
    for name, factor in slots.tying.named_parameters():
        assert torch.equal(slots.chain(name).mask.total, factor.grad.square())


def test_nothing_to_observe_without_a_gradient():
    slots, latent = make(mask=("saliency", SHARE))
    slots.observe("mask", latent, None)
    slots.observe("mask", latent, torch.full((4, 8), torch.nan))  # nor in one that is not finite
    assert not slots.chain("core").mask.total.any()
    slots.observe("mask", latent, torch.ones(4, 8))
    assert slots.chain("core").mask.total.any()


def test_a_slot_that_has_not_begun_is_not_stored(tape, same_bits):
    slots, latent = make(mask=("magnitude", SHARE), levels=("uniform", {}))
    slots.set_strength("mask", 1.0, latent)
    slots.refresh(latent)
    written = tape()
    slots.encode(written, latent)
    read = decode(written, (4, 8), torch.float32)
    assert same_bits(read.weight, slots.make(latent))
    assert read.method == "mask"
    assert same_bits(slots.stored(latent).weight, slots.make(latent))


@pytest.mark.parametrize(("at", "value"), [(1, 6), (1, -1), (2, 2), (3, 9)])
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
    new.copy_(torch.randn(6, 8, generator=torch.Generator().manual_seed(9)))
    other.harden(new)
    loaded = other.make(new)
    slots, latent = make((6, 8), **methods)
    slots.harden(latent)
    latent.copy_(loaded)
    slots.begin_again(latent)
    slots.refresh(latent)
    assert torch.allclose(slots.make(latent), loaded, atol=1e-5)


def test_making_draws_no_random_numbers_and_changes_no_state():
    slots, latent = make((6, 8), mask=("movement", SHARE), levels=("codebook", {"k": 4}))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    slots.harden(latent)
    kept, state = latent.clone(), pickle.dumps(slots)
    for _ in range(3):
        slots.make(latent)
        slots.stored(latent)
    assert torch.equal(torch.get_rng_state(), before)
    assert pickle.dumps(slots) == state
    assert torch.equal(latent, kept)


def test_what_is_made_may_be_written_into_memory_that_is_there(same_bits):
    for methods in ({}, {"levels": ("ternary", {})}, {"tying": ("row", {}), "mask": ("magnitude", SHARE)}):
        slots, latent = make(**methods)
        slots.harden(latent)
        made, out = slots.make(latent), torch.full((4, 8), torch.nan)
        assert slots.make(latent, out=out) is out
        assert same_bits(out, made)
        assert not made.requires_grad


def test_what_is_made_knows_no_gradient():
    slots, latent = make(tying=("low_rank", {"rank": 1}), levels=("codebook", {"k": 4}))
    slots.harden(latent)
    assert not slots.make(latent.requires_grad_()).requires_grad


def test_a_copy_looks_ahead_alone():
    slots, latent = make(mask=("magnitude", SHARE), levels=("codebook", {"k": 4}))
    slots.set_strength("mask", 0.5, latent)
    slots.refresh(latent)
    before = pickle.dumps(slots)
    twin, ahead = deepcopy(slots), latent.clone()
    twin.harden(ahead)
    ahead.mul_(2)
    twin.refresh(ahead)
    assert pickle.dumps(slots) == before


# --------------------------------------------------------------------------------------------------- checkpoints

STATES: dict[str, dict[str, tuple[str, dict[str, object]]]] = {
    "mask, levels": {"mask": ("magnitude", SHARE), "levels": ("uniform", {})},
    "scores, centroids": {"mask": ("movement", SHARE), "levels": ("codebook", {"k": 4})},
    "labels": {"mask": ("saliency", SHARE), "levels": ("log", {})},
    "factors, steps": {"tying": ("low_rank", {"rank": 2}), "levels": ("uniform", {"learned_step": True})},
    "a bank": {"tying": ("cross_channel", {"groups": 2}), "mask": ("magnitude", SHARE)},
}


def trained(methods: dict[str, tuple[str, dict[str, object]]], strength: float) -> tuple[Slots, Tensor]:
    """Some steps into training: labels were seen, sidecars have moved."""
    slots, latent = make((6, 8), **methods)
    generator = torch.Generator().manual_seed(2)
    for slot in ("tying", "mask"):
        slots.observe(slot, latent, torch.randn(6, 8, generator=generator))
    for slot in ("tying", "mask", "levels"):
        slots.set_strength(slot, strength, latent)
        slots.refresh(latent)
    with torch.no_grad():
        for sidecar in slots.parameters():
            sidecar.mul_(1 + 0.1 * torch.randn(sidecar.shape, generator=generator))
    slots.refresh(latent)
    return slots, latent


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("methods", STATES.values(), ids=STATES)
def test_a_state_of_training_leads_to_the_same_slots(methods, strength: float, same_bits):
    slots, latent = trained(methods, strength)
    before = pickle.dumps(slots)
    state = slots.training_state(latent)
    assert pickle.dumps(slots) == before
    again, _ = make((6, 8), **methods)
    again.load_training_state(latent.clone(), deepcopy(state))
    assert again.phase == slots.phase
    assert not again.stale
    mine, its = slots.state_dict(), again.state_dict()
    assert list(mine) == list(its)
    assert [key for key in mine if not same_bits(mine[key], its[key])] == []
    assert same_bits(again.make(latent), slots.make(latent))


@pytest.mark.parametrize("methods", STATES.values(), ids=STATES)
def test_a_state_of_training_is_a_copy_and_leaves_out_what_follows_from_it(methods):
    slots, latent = trained(methods, 1.0)
    state = slots.training_state(latent)
    learned = {name for name, _ in slots.named_parameters()}
    assert learned | {"strength"} <= set(state) <= set(slots.state_dict())
    own = {value.data_ptr() for value in slots.state_dict().values()}
    assert not {value.data_ptr() for value in state.values()} & own
    if methods == STATES["mask, levels"]:
        assert set(state) == {"strength"}  # masks and scales are a refresh away


def test_a_mask_that_is_older_than_the_weight_is_part_of_the_state(same_bits):
    """Where thresholds are recomputed every few steps only."""
    slots, latent = make(mask=("magnitude", SHARE), levels=("uniform", {}))
    slots.harden(latent)
    latent.neg_().add_(torch.linspace(-2, 2, 32).reshape(4, 8))
    slots.due = [True, False, True]
    slots.refresh(latent)
    again, _ = make(mask=("magnitude", SHARE), levels=("uniform", {}))
    again.load_training_state(latent, slots.training_state(latent))
    assert same_bits(again.make(latent), slots.make(latent))
    fresh = deepcopy(slots)
    fresh.refresh(latent)
    assert not same_bits(fresh.make(latent), slots.make(latent))


def test_the_gradient_is_the_same_from_run_to_run(same_bits):
    def gradients() -> list[Tensor]:
        slots, latent = make((32, 64), mask=("magnitude", SHARE), levels=("codebook", {"k": 4, "group": "channel"}))
        slots.harden(latent)
        pulled = slots.pull(latent, torch.randn(32, 64, generator=torch.Generator().manual_seed(1)))
        return [pulled, *(sidecar.grad for sidecar in slots.parameters())]

    first = gradients()
    for _ in range(3):
        assert all(same_bits(a, b) for a, b in zip(first, gradients(), strict=True))
