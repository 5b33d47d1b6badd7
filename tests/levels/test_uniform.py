from __future__ import annotations

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from psc_lightning.levels import LEVELS
from psc_lightning.levels.uniform import UniformLevels

ALL = torch.ones(2, 4, dtype=torch.bool)


def ready(levels, x, keep=None):
    keep = torch.ones(x.shape, dtype=torch.bool) if keep is None else keep
    levels.begin(x, keep)
    levels.refresh(x, keep)
    return levels


def test_by_hand_a_scale_a_channel():
    # 3 bits: m = 3; scales 1.5/3 = 0.5 and 6/3 = 2
    x = torch.tensor([[1.5, -0.3, 0.2, -0.8], [-6.0, 1.1, 0.9, 5.1]])
    levels = ready(UniformLevels((2, 4), bits=3), x)
    pulled = levels.pull(x, torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]))
    assert levels.hard(x).tolist() == [[1.5, -0.5, 0.0, -1.0], [-6.0, 2.0, 0.0, 6.0]]
    assert pulled.tolist() == [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]


def test_scales_come_from_the_survivors_only():
    x = torch.tensor([[100.0, 1.5, -0.75, 0.2]])
    levels = ready(UniformLevels((1, 4), bits=3), x, torch.tensor([[False, True, True, True]]))
    assert levels.scale.tolist() == [0.5]
    assert levels.hard(x).tolist() == [[1.5, 1.5, -1.0, 0.0]]  # half to even: -1.5 steps are -2


def test_one_bit_is_plus_or_minus_the_mean():
    x = torch.tensor([[0.0, -3.0, 1.0, 4.0]])
    levels = ready(UniformLevels((1, 4), bits=1), x)
    assert levels.hard(x).tolist() == [[2.0, -2.0, 2.0, 2.0]]


def test_learned_step_by_hand():
    # m = 1 (2 bits); s = 2·mean|x|/√1 = 2·0.75 = 1.5
    x = torch.tensor([[0.25, -0.5, 0.25, 2.0]])
    levels = ready(UniformLevels((1, 4), bits=2, learned_step=True), x)
    assert levels.step.tolist() == [1.5]
    with torch.no_grad():
        levels.step.fill_(1.0)
    pulled = levels.pull(x, torch.tensor([[1.0, 2.0, 4.0, 8.0]]))
    assert levels.hard(x).tolist() == [[0.0, 0.0, 0.0, 1.0]]
    assert pulled.tolist() == [[1.0, 2.0, 4.0, 0.0]]  # 2.0 lies outside
    # ∂s = 1·(0 - 0.25) + 2·(0 + 0.5) + 4·(0 - 0.25) + 8·1
    assert levels.step.grad.tolist() == [7.75]


def test_a_learned_step_stays_between_refreshes_and_never_reaches_zero():
    x = torch.tensor([[1.0, -1.0, 0.5, 0.1]])
    levels = ready(UniformLevels((1, 4), learned_step=True), x)
    with torch.no_grad():
        levels.step.fill_(-3.0)
    levels.refresh(x, torch.ones(1, 4, dtype=torch.bool))
    assert levels.step.tolist() == [-3.0]
    assert levels.hard(x).isfinite().all()
    assert levels._scale().item() > 0


def reference(x: np.ndarray, bits: int, size: int) -> np.ndarray:
    """A loop over the groups; scales as the file holds them."""
    m = max(1, 2 ** (bits - 1) - 1)
    flat, out = x.reshape(-1), np.zeros(x.size)
    starts = range(0, x.size, size)
    scales = [np.abs(flat[i : i + size]).mean() if bits == 1 else np.abs(flat[i : i + size]).max() / m for i in starts]
    unit = 2.0 ** (np.frexp(max(scales))[1]) if max(scales) else 1.0
    for i, scale in zip(starts, scales, strict=True):
        # torch rounds a float64 to float16 by way of float32
        s = max(float(np.float16(np.float32(scale / unit))), 2.0**-24) * unit
        for j in range(i, min(i + size, x.size)):
            ratio = flat[j] / s
            code = (1 if ratio >= 0 else -1) if bits == 1 else min(max(round(ratio), -m), m)
            out[j] = code * s
    return out.reshape(x.shape)


@settings(max_examples=60, deadline=None)
@example(bits=5, rows=4, columns=8, seed=75, size=1)  # a scale that lies between two float16 but for its last bits
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 9), st.integers(0, 99), st.sampled_from([None, 1, 3, 7]))
def test_against_a_loop(bits, rows, columns, seed, size):
    # float64, so that the loop rounds where torch does
    x = np.random.default_rng(seed).normal(size=(rows, columns))
    levels = ready(UniformLevels((rows, columns), bits=bits, group=size or "channel"), torch.from_numpy(x))
    out = levels.hard(torch.from_numpy(x))
    np.testing.assert_allclose(out.numpy(), reference(x, bits, size or columns), rtol=1e-9, atol=0)
    for part in out.reshape(-1).split(size or columns):
        assert len(part.unique()) <= max(2, 2**bits - 1)


def test_it_is_listed():
    assert LEVELS["uniform"] is UniformLevels
