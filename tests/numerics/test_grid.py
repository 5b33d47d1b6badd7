from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from psc_lightning.numerics.grid import grid_steps


@settings(deadline=None)
@given(
    st.lists(st.integers(-7, 7), min_size=1, max_size=30),
    st.floats(2.0**-20, 2.0**10, width=16),
    st.sampled_from([np.float32, np.float64]),
)
def test_what_lies_on_a_grid_is_found(codes, step, dtype):
    values = np.array(codes, dtype=dtype) * dtype(step)
    found = list(grid_steps(values, 7))
    assert bool(found) == any(codes)
    for s in found:
        multiples = np.rint(values / dtype(s))
        assert np.abs(multiples).max() <= 7
        np.testing.assert_array_equal(multiples * dtype(s), values)


def test_no_grid():
    assert not list(grid_steps(np.array([0.1, 0.25, -0.7], dtype=np.float32), 7))
    assert not list(grid_steps(np.arange(9, dtype=np.float32), 7))  # too many
    assert not list(grid_steps(np.random.default_rng(0).normal(size=9999), 127))
    assert not list(grid_steps(np.zeros(3, dtype=np.float32), 7))
    assert not list(grid_steps(np.empty(0, dtype=np.float32), 7))
    assert not list(grid_steps(np.array([np.inf, 1.0], dtype=np.float32), 7))


def test_without_a_zero():
    assert not list(grid_steps(np.array([0.0, 2.0], dtype=np.float32), 1, zero=False))
    assert list(grid_steps(np.array([-2.0, 2.0], dtype=np.float32), 1, zero=False)) == [2.0]
