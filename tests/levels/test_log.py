from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psc_lightning.levels.log import ROOTS, LogLevels


def ready(levels, x, keep=None):
    keep = torch.ones(x.shape, dtype=torch.bool) if keep is None else keep
    levels.begin(x, keep)
    levels.refresh(x, keep)
    return levels


def test_by_hand():
    # 3 bits: three magnitudes. √2·2 = 2.828 is the border of 2 and 4.
    x = torch.tensor([[6.0, 2.8, -2.9, 1.0], [0.5, -0.3, 0.2, 0.01]])
    levels = ready(LogLevels((2, 4), bits=3), x)
    pulled = levels.pull(x, torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]))
    # 6 is nearer to 8 in the logarithm (log2 6 = 2.58); 8, 4, 2 are the levels, 1 is below them
    assert levels.hard(x).tolist() == [[8.0, 2.0, -4.0, 0.0], [0.5, -0.25, 0.25, 0.0]]
    assert pulled.tolist() == [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]


def test_the_square_root_of_two_by_hand():
    x = torch.tensor([[1.0, 1.4, 2.0, -1.1]])
    out = ready(LogLevels((1, 4), root=2), x).hard(x)
    root = torch.tensor(math.sqrt(2.0)).item()
    assert out.tolist() == [[1.0, root, 2.0, -1.0]]


def test_the_largest_exponent_comes_from_the_survivors_only():
    x = torch.tensor([[64.0, 4.0, 2.0, 1.0]])
    levels = ready(LogLevels((1, 4), bits=2), x, torch.tensor([[False, True, True, True]]))
    assert levels.hard(x)[:, 1:].tolist() == [[4.0, 0.0, 0.0]]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=2, max_size=12),
    st.integers(2, 8),
    st.sampled_from(ROOTS),
)
def test_zero_or_an_exact_power_and_the_nearest_one(values, bits, root):
    x = torch.tensor([values])
    out = ready(LogLevels(tuple(x.shape), bits=bits, root=root), x).hard(x)[0].double()
    top = max(abs(v) for v in values)
    if top < 2.0**-126:
        assert not out.any()
        return
    highest = round(root * math.log2(float(out.abs().max())))
    assert abs(root * math.log2(top) - highest) <= 0.5 + 1e-5
    table = [1.0, 0.0]
    for value, got in zip(values, out.tolist(), strict=True):
        if got == 0:
            smallest = highest - (2 ** (bits - 1) - 2)
            assert abs(value) < 2.0**-126 or root * math.log2(abs(value)) <= smallest - 0.5 + 1e-5
            continue
        assert math.copysign(1, value) == math.copysign(1, got)
        position = root * math.log2(abs(got))
        exponent = round(position)
        # the value is one float32: a power of two times one of `root` constants
        octave, step = divmod(exponent, root)
        table = [np.float32(2.0 ** (j / root)) for j in range(root)]
        assert abs(got) == float(table[step]) * 2.0**octave
        # nearest in the logarithm, and among the magnitudes that the bits allow
        assert abs(root * math.log2(abs(value)) - exponent) <= 0.5 + 1e-5
        assert highest - (2 ** (bits - 1) - 2) <= exponent <= highest


@pytest.mark.parametrize("root", ROOTS)
def test_every_power_keeps_its_value(root: int, same_bits):
    x = torch.tensor([[2.0 ** (i / root) for i in range(-3 * root, 3 * root)]], dtype=torch.float64)
    levels = ready(LogLevels(tuple(x.shape), root=root), x)
    np.testing.assert_allclose(levels.hard(x).numpy(), x.numpy(), rtol=1e-7)
    again = levels.hard(x).float()
    assert same_bits(ready(LogLevels(tuple(x.shape), root=root), again).hard(again), again)


def test_zeros_are_positive(same_bits):
    x = torch.tensor([[-0.25, -0.0, 1.0]])
    assert same_bits(ready(LogLevels((1, 3), bits=2), x).hard(x)[:, :2], torch.zeros(1, 2))
