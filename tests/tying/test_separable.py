from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psc_lightning.tying.separable import Separable


def test_by_hand():
    tying = Separable.build((3, 2, 3), rank=1)
    assert tying.core_shapes() == {"p": (3, 2, 1), "d": (2, 1, 3)}
    with torch.no_grad():
        tying.p.copy_(torch.tensor([[[1.0], [2.0]], [[0.0], [-1.0]], [[3.0], [1.0]]]))
        tying.d.copy_(torch.tensor([[[1.0, 2.0, 0.0]], [[-1.0, 0.0, 4.0]]]))
    out = tying.expand(tying.reduce(torch.zeros(3, 2, 3)))
    assert out.tolist() == [
        [[1.0, 2.0, 0.0], [-2.0, 0.0, 8.0]],
        [[0.0, 0.0, 0.0], [1.0, 0.0, -4.0]],
        [[3.0, 6.0, 0.0], [-1.0, 0.0, 4.0]],
    ]
    gradient = torch.zeros(3, 2, 3)
    gradient[0, 0], gradient[2, 1] = torch.tensor([1.0, 1.0, 5.0]), torch.tensor([1.0, 0.0, 1.0])
    out.backward(gradient)
    assert tying.p.grad.tolist() == [[[3.0], [0.0]], [[0.0], [0.0]], [[0.0], [3.0]]]  # g · d
    assert tying.d.grad.tolist() == [[[1.0, 1.0, 5.0]], [[1.0, 0.0, 1.0]]]  # p · g


def test_zeros_of_the_product_are_positive(same_bits):
    tying = Separable.build((3, 2, 3))
    with torch.no_grad():
        tying.p.fill_(-1.0)
    assert same_bits(tying.expand(tying.reduce(torch.zeros(3, 2, 3))), torch.zeros(3, 2, 3))


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 6), st.integers(1, 3), st.integers(2, 3), st.integers(1, 2), st.integers(0, 99))
def test_start_is_the_best_of_its_rank_for_each_input(outputs, inputs, width, rank, seed):
    w = np.random.default_rng(seed).normal(size=(outputs, inputs, width, width)).astype(np.float32)
    try:
        tying = Separable.build(w.shape, rank=rank)
    except ValueError:
        assert rank * (outputs + width * width) >= outputs * width * width
        return
    out = tying.begin(torch.from_numpy(w)).detach().numpy()
    p, d = tying.p.detach().double().numpy(), tying.d.detach().double().numpy()
    for i in range(inputs):
        part = out[:, i].reshape(outputs, -1)
        u, s, v = np.linalg.svd(w[:, i].reshape(outputs, -1).astype(np.float64))
        np.testing.assert_allclose(part, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-5)
        assert np.linalg.matrix_rank(part, tol=1e-4) == rank
    for o, i, h, x in np.ndindex(*w.shape):
        assert out[o, i, h, x] == np.float32(sum(p[o, i, r] * d[i, r, h, x] for r in range(rank)))


@pytest.mark.parametrize(
    ("shape", "rank", "message"),
    [
        ((16, 8), 1, "no kernel of two or more entries"),
        ((16, 8, 1, 1), 1, "no kernel of two or more entries"),
        ((4, 8, 2, 2), 2, "factors of rank 2 are no smaller than 4 × 4 entries an input"),
    ],
)
def test_where_it_does_not_apply(shape: tuple[int, ...], rank: int, message: str):
    with pytest.raises(ValueError, match=message):
        Separable.build(shape, rank=rank)
