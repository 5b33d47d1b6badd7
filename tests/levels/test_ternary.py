from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psc_lightning.levels.ternary import TernaryLevels


def ready(levels, x, keep=None):
    keep = torch.ones(x.shape, dtype=torch.bool) if keep is None else keep
    levels.begin(x, keep)
    levels.refresh(x, keep)
    return levels


def test_by_hand():
    # row 0: Δ = 0.7·1 = 0.7, s = (1.5 + 2)/2; row 1: all alike, none is zero
    x = torch.tensor([[1.5, -2.0, 0.25, -0.25], [-0.5, -0.5, 0.5, 0.5]])
    levels = ready(TernaryLevels((2, 4)), x)
    pulled = levels.pull(x, torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]))
    assert levels.hard(x).tolist() == [[1.75, -1.75, 0.0, 0.0], [-0.5, -0.5, 0.5, 0.5]]
    assert pulled.tolist() == [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]


def test_scales_come_from_the_survivors_only():
    # over the survivors Δ = 0.7, with the 100 it would be 18
    x = torch.tensor([[100.0, 1.5, -2.0, 0.25, -0.25]])
    keep = torch.tensor([[False, True, True, True, True]])
    assert ready(TernaryLevels((1, 5)), x, keep).hard(x).tolist() == [[1.75, 1.75, -1.75, 0.0, 0.0]]


def test_zeros_are_positive(same_bits):
    x = torch.tensor([[-0.001, 0.001, 1.0, -1.0]])
    out = ready(TernaryLevels((1, 4)), x).hard(x)
    assert same_bits(out[:, :2], torch.zeros(1, 2))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 99), st.sampled_from([None, 2, 5]))
def test_against_a_loop(rows, columns, seed, size):
    x = np.random.default_rng(seed).normal(size=(rows, columns))
    size = size or columns
    out = ready(TernaryLevels((rows, columns), group=size), torch.from_numpy(x)).hard(torch.from_numpy(x))
    flat = out.reshape(-1).numpy()
    for i in range(0, x.size, size):
        part = x.reshape(-1)[i : i + size]
        big = np.abs(part) > 0.7 * np.abs(part).mean()
        expected = np.sign(part) * big * np.abs(part)[big].mean()
        np.testing.assert_allclose(flat[i : i + size], expected, rtol=0, atol=2e-3 * np.abs(x).max())
        assert len(np.unique(np.abs(flat[i : i + size]))) <= 2
