from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psc_lightning.tying.cross_channel import CrossChannelSharing


def test_by_hand():
    tying = CrossChannelSharing.build((1, 4, 2), groups=2)
    assert tying.core_shapes() == {"bank": (1, 2, 2)}
    w = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 0.0], [-3.0, 2.0]]], requires_grad=True)
    out = tying.expand(tying.reduce(w))
    out.backward(torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 0.0]]]))
    assert out.tolist() == [[[3.0, 1.0], [0.0, 3.0], [3.0, 1.0], [0.0, 3.0]]]
    assert w.grad.tolist() == [[[3.0, 4.0], [5.0, 2.0], [3.0, 4.0], [5.0, 2.0]]]


def test_labels_choose_position_by_position():
    tying = CrossChannelSharing.build((2, 2), groups=2)
    w = torch.tensor([[10.0, 1.0], [10.0, 1.0]])
    tying.observe(w, torch.tensor([[0.1, 3.0], [0.0, 0.0]]))  # labels 1 against 3
    tying.observe(w, torch.tensor([[0.0, 0.0], [0.2, -1.0]]))  # 2 against 1
    assert tying.begin(w).tolist() == [[1.0, 1.0], [10.0, 10.0]]


def test_equal_labels_mean_the_first_group_and_no_labels_the_largest_weight():
    w = torch.tensor([[1.0, -1.0, 2.0, -3.0]])
    tying = CrossChannelSharing.build((1, 4), groups=4)
    tying.observe(w, 1 / w)
    assert tying.begin(w).tolist() == [[1.0] * 4]
    assert CrossChannelSharing.build((1, 4), groups=4).begin(w).tolist() == [[-3.0] * 4]
    by_size = CrossChannelSharing.build((1, 4), groups=2, labels="magnitude")
    assert not by_size.labelled
    assert by_size.begin(w).tolist() == [[2.0, -3.0, 2.0, -3.0]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(2, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 99))
def test_bank_and_choice_against_a_loop(outputs, groups, channels, kernel, seed):
    rng = np.random.default_rng(seed)
    w = torch.from_numpy(rng.normal(size=(outputs, groups * channels, kernel, 2)))
    labels = torch.from_numpy(rng.normal(size=w.shape))
    tying = CrossChannelSharing.build(tuple(w.shape), groups=groups)
    tying.total = tying.total.double()
    tying.observe(w, labels)
    chosen, mean = tying.begin(w), tying.expand(tying.reduce(w))
    for o, i, h, v in np.ndindex(*w.shape):
        members = [g * channels + i % channels for g in range(groups)]
        best = max(members, key=lambda m: (abs(labels[o, m, h, v] * w[o, m, h, v]), -m))
        assert chosen[o, i, h, v] == w[o, best, h, v]
        np.testing.assert_allclose(mean[o, i, h, v], w[o, members, h, v].mean(), rtol=1e-12)


def test_where_it_does_not_apply():
    with pytest.raises(ValueError, match="3 input channels are not divisible by groups=2"):
        CrossChannelSharing.build((4, 3, 3, 3), groups=2)


def test_a_file_with_groups_that_do_not_divide_is_refused(tape):
    written = tape()
    written.integer(3)
    with pytest.raises(ValueError, match="3 groups do not divide 4"):
        CrossChannelSharing.decode(written, (2, 4))
