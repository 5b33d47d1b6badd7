from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psc_lightning.tying.row import RowSharing


def test_by_hand_with_a_shorter_last_block():
    tying = RowSharing.build((2, 5), block=2)
    w = torch.tensor([[1.0, 3.0, 5.0, 9.0, 4.0], [0.0, -2.0, 1.0, 1.0, 7.0]], requires_grad=True)
    cores = tying.reduce(w)
    assert tying.core_shapes() == {"core": (2, 3)}
    assert cores["core"].tolist() == [[2.0, 7.0, 4.0], [-1.0, 1.0, 7.0]]
    out = tying.expand(cores)
    out.backward(torch.tensor([[1.0, 2.0, 3.0, 5.0, 6.0], [0.0, 0.0, 0.0, 8.0, 1.0]]))
    assert out.tolist() == [[2.0, 2.0, 7.0, 7.0, 4.0], [-1.0, -1.0, 1.0, 1.0, 7.0]]
    assert w.grad.tolist() == [[1.5, 1.5, 4.0, 4.0, 6.0], [0.0, 0.0, 4.0, 4.0, 1.0]]


@pytest.mark.parametrize(
    ("shape", "block", "expected"),
    [
        ((8, 4, 5, 3), None, 3),  # the kernel's width
        ((8, 4, 1, 1), None, 4),
        ((8, 12), None, 4),
        ((8, 3), None, 3),
        ((8, 4, 3, 3), 99, 36),  # the whole row
    ],
)
def test_block_length(shape: tuple[int, ...], block: int | None, expected: int):
    assert RowSharing.build(shape, block=block).block == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99))
def test_constant_along_blocks_against_a_loop(outputs, inputs, width, block, seed):
    shape = (outputs, inputs, 2, width)
    w = np.random.default_rng(seed).normal(size=shape)
    tying = RowSharing.build(shape, block=block)
    out = tying.expand(tying.reduce(torch.from_numpy(w))).numpy().reshape(outputs, -1)
    flat = w.reshape(outputs, -1)
    for o in range(outputs):
        for i in range(flat.shape[1]):
            first = i // block * block
            np.testing.assert_allclose(out[o, i], flat[o, first : first + block].mean(), rtol=1e-12)
            assert out[o, i] == out[o, first]


def test_where_it_does_not_apply():
    with pytest.raises(ValueError, match=r"rows of two or more entries, this weight is \(5, 1, 1\)"):
        RowSharing.build((5, 1, 1))
