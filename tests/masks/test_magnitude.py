from __future__ import annotations

import pytest
import torch

from psc_lightning.masks.magnitude import MagnitudeMask


def test_by_hand(same_bits):
    mask = MagnitudeMask((2, 3), threshold=0.5)
    w = torch.tensor([[0.1, -4.0, 0.2], [-0.3, 3.0, 0.25]])
    mask.refresh(w)
    pulled = mask.pull(w, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert same_bits(mask.hard(w), torch.tensor([[0.0, -4.0, 0.0], [-0.3, 3.0, 0.0]]))
    assert pulled.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]  # masked weights go on learning


def test_a_grown_weight_returns():
    mask = MagnitudeMask((1, 3), threshold=0.34)
    mask.refresh(torch.tensor([[1.0, 2.0, 3.0]]))
    assert mask.keep.tolist() == [[False, True, True]]
    mask.refresh(torch.tensor([[5.0, 2.0, 3.0]]))
    assert mask.keep.tolist() == [[True, False, True]]


def test_a_unit_counts_by_its_mean_magnitude():
    mask = MagnitudeMask((2, 2), threshold=0.5, granularity="channel")
    mask.refresh(torch.tensor([[-3.0, 3.0], [2.0, 2.0]]))
    assert mask.keep.tolist() == [[True, True], [False, False]]


def test_a_share_of_each_group():
    mask = MagnitudeMask((1, 6), threshold=0.5, group=2)
    mask.refresh(torch.tensor([[1.0, 2.0, 30.0, 20.0, 5.0, 5.0]]))
    assert mask.keep.tolist() == [[False, True, True, False, False, True]]


@pytest.mark.parametrize(("options", "strength"), [({}, 0.5), ({"threshold": 0.25}, 1.0), ({"threshold": 0.0}, 0.0),
                                                   ({"granularity": "channel"}, 0.0),
                                                   ({"granularity": "row", "block": 2}, 0.5)])  # fmt: skip
def test_the_strength_that_holds_the_zeros_of_a_pruned_core(options, strength):
    """Two of eight entries, one of four blocks, none of two channels: in units of the threshold, at most 1."""
    mask = MagnitudeMask((2, 4), **{"threshold": 0.5, **options})
    assert mask.hold_zeros(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 1.0, 2.0]])) == strength
