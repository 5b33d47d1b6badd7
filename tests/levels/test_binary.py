from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psc_lightning.levels.binary import BinaryLevels


def ready(levels, x, keep=None):
    keep = torch.ones(x.shape, dtype=torch.bool) if keep is None else keep
    levels.begin(x, keep)
    levels.refresh(x, keep)
    return levels


def test_sign_by_hand():
    x = torch.tensor([[1.0, -2.0, 0.0], [-0.25, -0.25, -0.25]])
    levels = ready(BinaryLevels((2, 3)), x)
    pulled = levels.pull(x, torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert levels.hard(x).tolist() == [[1.0, -1.0, 1.0], [-0.25, -0.25, -0.25]]
    assert pulled.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


def test_zero_and_one_by_hand():
    # mean 1; below: 0, -1 → -0.5; above: 2, 3 → 2.5
    x = torch.tensor([[0.0, 2.0, 3.0, -1.0]])
    levels = ready(BinaryLevels((1, 4), form="01"), x)
    pulled = levels.pull(x, torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert levels.code(x).tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert (levels.offset.tolist(), levels.scale.tolist()) == ([-0.5], [3.0])
    assert levels.hard(x).tolist() == [[-0.5, 2.5, 2.5, -0.5]]
    assert pulled.tolist() == [[1.0, 2.0, 3.0, 4.0]]


@pytest.mark.parametrize(("form", "expected"), [("sign", [[2.0, -2.0, 2.0]]), ("01", [[3.0, -1.0, 3.0]])])
def test_scales_come_from_the_survivors_only(form: str, expected: list[list[float]]):
    x = torch.tensor([[100.0, -1.0, 3.0]])
    levels = ready(BinaryLevels((1, 3), form=form), x, torch.tensor([[False, True, True]]))
    assert levels.hard(x).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 99), st.sampled_from([None, 2, 5]), st.booleans())
def test_two_values_a_group_against_a_loop(rows, columns, seed, size, signs):
    x = np.random.default_rng(seed).normal(size=(rows, columns))
    size = size or columns
    levels = BinaryLevels((rows, columns), group=size, form="sign" if signs else "01")
    out = ready(levels, torch.from_numpy(x)).hard(torch.from_numpy(x)).reshape(-1).numpy()
    for i in range(0, x.size, size):
        part, given_ = out[i : i + size], x.reshape(-1)[i : i + size]
        assert len(np.unique(part)) <= 2
        if signs:
            low, high = -np.abs(given_).mean(), np.abs(given_).mean()
            expected = np.where(given_ >= 0, high, low)
        else:
            upper = given_ > given_.mean()
            low = given_[~upper].mean()
            expected = np.where(upper, given_[upper].mean() if upper.any() else low, low)
        np.testing.assert_allclose(part, expected, rtol=0, atol=2e-3 * np.abs(x).max())
