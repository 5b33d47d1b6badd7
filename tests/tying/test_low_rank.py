from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psc_lightning.tying.low_rank import LowRank, resolve_rank


def test_by_hand():
    tying = LowRank.build((3, 3), rank=1)
    assert tying.core_shapes() == {"u": (3, 1), "v": (1, 3)}
    with torch.no_grad():
        tying.u.copy_(torch.tensor([[1.0], [2.0], [-1.0]]))
        tying.v.copy_(torch.tensor([[3.0, 0.0, -2.0]]))
    out = tying.expand(tying.reduce(torch.zeros(3, 3)))
    out.backward(torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [1.0, 0.0, 1.0]]))
    assert out.tolist() == [[3.0, 0.0, -2.0], [6.0, 0.0, -4.0], [-3.0, 0.0, 2.0]]
    assert tying.u.grad.tolist() == [[3.0], [0.0], [1.0]]  # g Vᵀ
    assert tying.v.grad.tolist() == [[0.0, 4.0, -1.0]]  # Uᵀ g


def test_zeros_of_the_product_are_positive(same_bits):
    tying = LowRank.build((3, 3), rank=1)
    with torch.no_grad():
        tying.u.fill_(-1.0)
    assert same_bits(tying.expand(tying.reduce(torch.zeros(3, 3))), torch.zeros(3, 3))


@settings(max_examples=25, deadline=None)
@given(st.integers(4, 7), st.integers(2, 3), st.integers(2, 3), st.integers(1, 2), st.integers(0, 99))
def test_start_is_the_best_of_its_rank(outputs, inputs, width, rank, seed):
    w = np.random.default_rng(seed).normal(size=(outputs, inputs, width)).astype(np.float32)
    try:
        tying = LowRank.build(w.shape, rank=rank)
    except ValueError:
        assert rank * (outputs + inputs * width) >= outputs * inputs * width
        return
    out = tying.begin(torch.from_numpy(w)).detach().numpy().reshape(outputs, -1)
    u, s, v = np.linalg.svd(w.reshape(outputs, -1).astype(np.float64))
    best = (u[:, :rank] * s[:rank]) @ v[:rank]
    np.testing.assert_allclose(out, best, atol=1e-5)
    assert np.linalg.matrix_rank(out, tol=1e-4) == rank
    # a plain loop over the factors gives the same float32 numbers
    p, q = tying.u.detach().double().numpy(), tying.v.detach().double().numpy()
    loop = [[np.float32(sum(p[o, r] * q[r, n] for r in range(rank))) for n in range(q.shape[1])] for o in range(len(p))]
    assert (out == np.array(loop)).all()


def test_rank_as_a_share():
    assert [resolve_rank(r, 16) for r in (0.5, 0.01, 3, 99)] == [8, 1, 3, 16]
    assert LowRank.build((16, 64)).rank == 4


def test_where_it_does_not_apply():
    with pytest.raises(ValueError, match="two factors of rank 2 are no smaller than a 4 × 4 weight"):
        LowRank.build((4, 4), rank=2)
