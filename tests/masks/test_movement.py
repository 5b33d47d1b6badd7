from __future__ import annotations

import torch

from psc_lightning.masks.movement import MovementMask


def test_by_hand():
    mask = MovementMask((1, 4), threshold=0.5)
    w = torch.tensor([[1.0, -4.0, 2.0, 3.0]], requires_grad=True)
    with torch.no_grad():
        mask.scores.copy_(torch.tensor([[5.0, -5.0, 1.0, 0.0]]))
    mask.refresh(w)
    out = mask(w, w)
    out.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert out.tolist() == [[1.0, 0.0, 2.0, 0.0]]
    assert w.grad.tolist() == [[1.0, 0.0, 3.0, 0.0]]
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
    w = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]], requires_grad=True)
    mask(w, w).sum().backward()
    assert mask.scores.grad.tolist() == [[6.0], [3.0]]


def test_scores_learn_although_nothing_is_masked():
    mask = MovementMask((1, 2), threshold=0.0)
    w = torch.tensor([[1.0, 2.0]], requires_grad=True)
    mask(w, w).sum().backward()
    assert mask.scores.grad.tolist() == [[1.0, 2.0]]
