from __future__ import annotations

import pytest
import torch

from psc_lightning.masks.saliency import SALIENCY_LABELS, SaliencyMask

W = torch.tensor([[1.0, -4.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    ("label", "totals", "keep"),
    [
        ("gradient_weight", [[9.0, 4.0, 4.0, 3.0]], [[True, True, False, False]]),
        ("fisher", [[41.0, 1.0, 2.0, 1.0]], [[True, False, True, False]]),
    ],
)
def test_by_hand(label: str, totals: list[list[float]], keep: list[list[bool]]):
    mask = SaliencyMask((1, 4), threshold=0.5, label=label)
    mask.observe(W, torch.tensor([[4.0, 1.0, 1.0, 1.0]]))
    mask.observe(W, torch.tensor([[-5.0, 0.0, -1.0, 0.0]]))  # signs do not cancel
    assert mask.total.tolist() == totals
    mask.refresh(W)
    assert mask.keep.tolist() == keep  # of equal scores the smaller weight goes


def test_gradients():
    mask = SaliencyMask((1, 4), threshold=0.5)
    mask.refresh(W)
    assert mask.pull(W, torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[0.0, 2.0, 0.0, 4.0]]


@pytest.mark.parametrize("label", SALIENCY_LABELS)
def test_a_unit_counts_by_its_mean(label: str):
    mask = SaliencyMask((2, 2), threshold=0.5, granularity="channel", label=label)
    mask.observe(torch.ones(2, 2), torch.tensor([[1.0, 1.0], [0.0, 3.0]]))
    mask.refresh(torch.ones(2, 2))
    assert mask.keep.tolist() == [[False, False], [True, True]]
