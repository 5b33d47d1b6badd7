from __future__ import annotations

import pytest
import torch

from psc_lightning.masks.movement import MovementMask


def test_by_hand():
    mask = MovementMask((1, 4), threshold=0.5)
    w = torch.tensor([[1.0, -4.0, 2.0, 3.0]])
    with torch.no_grad():
        mask.scores.copy_(torch.tensor([[5.0, -5.0, 1.0, 0.0]]))
    mask.refresh(w)
    pulled = mask.pull(w, torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert mask.hard(w).tolist() == [[1.0, 0.0, 2.0, 0.0]]
    assert pulled.tolist() == [[1.0, 0.0, 3.0, 0.0]]
    assert mask.scores.grad.tolist() == [[1.0, -8.0, 6.0, 12.0]]


def test_the_first_mask_is_the_magnitude_mask():
    mask = MovementMask((1, 4), threshold=0.5)
    mask.refresh(torch.tensor([[1.0, -4.0, 2.0, 3.0]]))
    assert mask.keep.tolist() == [[False, True, False, True]]


def test_one_step_without_an_optimizer_prefers_what_the_loss_moves_away_from_zero():
    mask = MovementMask((1, 4), threshold=0.5)
    w = torch.tensor([[1.0, -4.0, 2.0, 3.0]])
    mask.observe(w, torch.tensor([[-1.0, -1.0, -1.0, 1.0]]))  # descent adds to w: grows, shrinks, grows, shrinks
    assert mask.scores.tolist() == [[1.0, -4.0, 2.0, -3.0]]
    mask.refresh(w)
    assert mask.keep.tolist() == [[True, False, True, False]]


def test_a_score_a_unit_gets_the_sum():
    mask = MovementMask((2, 3), threshold=0.5, granularity="channel")
    assert mask.scores.shape == (2, 1)
    mask.pull(torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]), torch.ones(2, 3))
    assert mask.scores.grad.tolist() == [[6.0], [3.0]]


def test_scores_learn_although_nothing_is_masked():
    mask = MovementMask((1, 2), threshold=0.0)
    mask.pull(torch.tensor([[1.0, 2.0]]), torch.ones(1, 2))
    assert mask.scores.grad.tolist() == [[1.0, 2.0]]


def test_rows_without_a_gradient_go_by_magnitude_among_themselves():
    """By hand: half of each kind; by scores alone the unseen row (all 0) would lose to every positive score."""
    mask = MovementMask((2, 4), threshold=0.5)
    core = torch.tensor([[9.0, 9.0, 9.0, 9.0], [1.0, -4.0, 2.0, 3.0]])
    with torch.no_grad():
        mask.scores[0] = torch.tensor([-1.0, 2.0, 0.5, -3.0])
    mask.refresh(core)
    assert mask.keep.tolist() == [[False, True, True, False], [False, True, False, True]]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("rows", [1, 3, 9])
def test_the_count_of_zeros_is_exact_however_many_rows_were_seen(share, rows):
    mask = MovementMask((10, 7), threshold=share)
    with torch.no_grad():
        mask.scores[:rows] = torch.randn(rows, 7, generator=torch.Generator().manual_seed(rows))
    mask.refresh(torch.randn(10, 7, generator=torch.Generator().manual_seed(0)))
    assert int((~mask.keep).sum()) == min(int(share * 70 + 0.5), 69)
    assert abs(int((~mask.keep[rows:]).sum()) - share * 7 * (10 - rows)) <= 1


def test_what_is_zero_before_it_begins_is_dropped_first_whatever_the_scores_become():
    mask = MovementMask((1, 4), threshold=0.5)
    core = torch.tensor([[0.0, -4.0, 2.0, 3.0]])
    assert mask.hold_zeros(core) == 0.5  # a quarter of the units, half of the threshold
    with torch.no_grad():
        mask.scores[0, 1:] = torch.tensor([-7.0, -5.0, -6.0])
    for strength, kept in ((0.5, [False, True, True, True]), (1.0, [False, False, True, True])):
        mask.refresh(core, strength)
        assert mask.keep.tolist() == [kept]


def test_zeros_of_rows_without_a_gradient_are_kept_too():
    """By hand: five of twelve are zero before, three of them in the first row; the others' shares do not push one out."""
    mask = MovementMask((3, 4), threshold=0.5)
    core = torch.tensor([[0.0, 0.0, 0.0, 9.0], [1.0, -4.0, 2.0, 3.0], [0.0, 0.0, 5.0, 6.0]])
    assert mask.hold_zeros(core) == pytest.approx(5 / 6)
    with torch.no_grad():
        mask.scores[2, 2:] = torch.tensor([1.0, 2.0])  # the only row that has got gradients
    mask.refresh(core)
    assert mask.keep.tolist() == [[False, False, False, True], [False, True, True, True], [False, False, True, True]]


def test_a_core_of_zeros_is_no_pruned_one():
    mask = MovementMask((1, 4), threshold=0.5)
    assert mask.hold_zeros(torch.zeros(1, 4)) == 0.0
    assert mask.scores.tolist() == [[0.0] * 4]
