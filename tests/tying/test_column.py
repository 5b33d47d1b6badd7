from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psc_lightning.tying.column import ColumnSharing


def test_by_hand_with_a_shorter_last_block():
    tying = ColumnSharing.build((3, 2, 2), block=2)
    w = torch.tensor(
        [[[1.0, 2.0], [3.0, 4.0]], [[3.0, 6.0], [-3.0, 0.0]], [[5.0, 7.0], [9.0, 8.0]]], requires_grad=True
    )
    cores = tying.reduce(w)
    assert tying.core_shapes() == {"core": (2, 2, 2)}
    assert cores["core"].tolist() == [[[2.0, 4.0], [0.0, 2.0]], [[5.0, 7.0], [9.0, 8.0]]]
    out = tying.expand(cores)
    out.backward(torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 0.0], [1.0, 4.0]], [[1.0, 1.0], [2.0, 3.0]]]))
    assert out.tolist() == [[[2.0, 4.0], [0.0, 2.0]], [[2.0, 4.0], [0.0, 2.0]], [[5.0, 7.0], [9.0, 8.0]]]
    assert w.grad.tolist() == [[[3.0, 1.0], [2.0, 4.0]], [[3.0, 1.0], [2.0, 4.0]], [[1.0, 1.0], [2.0, 3.0]]]


def test_block_length():
    assert ColumnSharing.build((8, 3)).block == 4
    assert ColumnSharing.build((3, 3)).block == 3
    assert ColumnSharing.build((3, 3), block=99).block == 3


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 7), st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.integers(0, 99))
def test_constant_along_blocks_against_a_loop(outputs, inputs, width, block, seed):
    w = np.random.default_rng(seed).normal(size=(outputs, inputs, width))
    tying = ColumnSharing.build(w.shape, block=block)
    out = tying.expand(tying.reduce(torch.from_numpy(w))).numpy()
    for o, i, k in np.ndindex(w.shape):
        first = o // block * block
        np.testing.assert_allclose(out[o, i, k], w[first : first + block, i, k].mean(), rtol=1e-12)
        assert out[o, i, k] == out[first, i, k]


def test_where_it_does_not_apply():
    with pytest.raises(ValueError, match=r"two or more outputs, this weight is \(1, 5\)"):
        ColumnSharing.build((1, 5))
