from __future__ import annotations

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from psc_lightning import StraightThroughQuantization, compress, load, save
from psc_lightning.callbacks.presets import composed
from psc_lightning.levels.ttq import TrainedTernaryLevels
from psc_lightning.numerics import strips


def ready(levels, x, keep=None):
    levels.begin(x, keep)
    levels.refresh(x, keep)
    return levels


def test_by_hand():
    # row 0: Δ = 0.7·5/5, n = 2, p = (1 + 1.5)/2; row 1: none below -Δ, so n is p's
    x = torch.tensor([[0.25, -2.0, 1.0, 1.5, -0.25], [0.5, 0.5, 0.0, 1.5, -0.25]])
    levels = ready(TrainedTernaryLevels((2, 5)), x)
    assert levels.sizes.tolist() == [[2.0, 1.25], [0.83349609375, 0.83349609375]]  # 2.5/3, rounded
    assert levels.limit.tolist() == pytest.approx([0.7, 0.7 * 2.75 / 5])
    assert levels.hard(x).tolist() == [
        [0.0, -2.0, 1.25, 1.25, 0.0],
        [0.83349609375, 0.83349609375, 0.0, 0.83349609375, 0.0],
    ]


def test_gradients_by_hand():
    x = torch.tensor([[0.25, -2.0, 1.0, 1.5, -0.25, -3.0]])
    levels = ready(TrainedTernaryLevels((1, 6)), x)
    gradient = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0, math.inf]])
    keep = torch.tensor([[True, True, True, True, True, False]])
    # Δ = 0.7·8/6: p stands for 1 and 1.5, n for -2; -3 is not kept
    assert levels.pull(x, gradient, keep).tolist() == gradient.tolist()
    assert levels.sizes.grad.tolist() == [[-2.0, 12.0]]
    levels.pull(x, gradient, keep, strength=0.5)
    assert levels.sizes.grad.tolist() == [[-1.0, 6.0]]
    levels.pull(x, gradient)
    assert levels.sizes.grad.tolist() == [[-math.inf, 12.0]]


def test_the_trained_sizes_are_the_levels():
    x = torch.tensor([[1.0, -1.0, 0.0, 1.0]])
    levels = ready(TrainedTernaryLevels((1, 4)), x)
    with torch.no_grad():
        levels.sizes.copy_(torch.tensor([[-0.5, 2.5]]))  # below zero: the smallest that there is
    levels.refresh(x)
    assert float(levels.unit) == 4.0
    assert levels.hard(x).tolist() == [[2.5, -4.0 * 2**-24, 0.0, 2.5]]


def test_scales_come_from_the_survivors_only():
    # over the survivors Δ = 0.7, with the 100 it would be 14.56
    x = torch.tensor([[100.0, 0.25, -2.0, 1.0, 1.5, -0.25]])
    keep = torch.tensor([[False, True, True, True, True, True]])
    levels = ready(TrainedTernaryLevels((1, 6)), x, keep)
    assert levels.sizes.tolist() == [[2.0, 1.25]]
    assert levels.hard(x, keep=keep).tolist() == [[0.0, 0.0, -2.0, 1.25, 1.25, 0.0]]


def test_zeros_are_positive(same_bits):
    x = torch.tensor([[-0.001, 0.001, -0.0, 1.0, -1.0]])
    out = ready(TrainedTernaryLevels((1, 5)), x).hard(x)
    assert same_bits(out[:, :3], torch.zeros(1, 3))


@pytest.mark.parametrize("scales", ["float32", "float16", "log8"])
def test_three_values_are_recognised_however_unlike(scales, same_bits):
    """0.7·mean |x| is above the 0.125, which would be zero."""
    x = torch.tensor([[8.0, 8.0, -0.125, 8.0, 0.0, 8.0, -0.0]]).repeat(3, 9)
    levels = ready(TrainedTernaryLevels(x.shape, scales=scales), x)
    assert levels.sizes.tolist() == [[0.125, 8.0]] * 3
    assert same_bits(levels.hard(x), x + 0.0)
    levels.refresh(x)  # Δ comes from what is there, not from how it began
    assert same_bits(levels.hard(x), x + 0.0)
    x[:, 0] = 7.0  # an optimizer's step
    levels.refresh(x)
    assert not levels.hard(x)[:, 2].any()


def test_equal_numbers_are_their_mean(same_bits):
    x = torch.full((1, 1000), 0.1)
    x[:, ::3] = -0.7
    levels = ready(TrainedTernaryLevels((1, 1000), scales="float32"), x)
    assert same_bits(levels.hard(x), x)


def test_nothing_kept_and_only_zeros():
    x = torch.tensor([[3.0, -1.0], [0.0, 0.0]])
    keep = torch.tensor([[False, False], [True, True]])
    levels = ready(TrainedTernaryLevels((2, 2)), x, keep)
    assert not levels.hard(x, keep=keep).any()
    assert levels.sizes.isfinite().all()
    assert (levels.sizes > 0).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(0, 99),
    st.sampled_from([None, 2, 5]),
    st.sampled_from([1, 4, 1 << 16]),
)
def test_against_a_loop(rows, columns, seed, size, strip):
    numbers = np.random.default_rng(seed)
    x, g = numbers.normal(size=(rows, columns)), numbers.normal(size=(rows, columns))
    keep = numbers.random((rows, columns)) < 0.8
    size = size or columns
    levels = TrainedTernaryLevels((rows, columns), group=size)
    with patch.object(strips, "STRIP", strip):
        ready(levels, torch.from_numpy(x), torch.from_numpy(keep))
        out = levels.hard(torch.from_numpy(x), keep=torch.from_numpy(keep)).reshape(-1).numpy()
        levels.pull(torch.from_numpy(x), torch.from_numpy(g), torch.from_numpy(keep))
    for i, start in enumerate(range(0, x.size, size)):
        part, grads, kept = (a.reshape(-1)[start : start + size] for a in (x, g, keep))
        if not kept.any():
            continue
        high, low, limit = part[kept].max(), -part[kept].min(), 0.7 * np.abs(part[kept]).mean()
        if 0 < min(high, low) <= limit and set(part[kept]) <= {high, -low}:
            limit = min(high, low) / 2
        above, below = kept & (part > limit), kept & (part < -limit)
        expected = np.zeros(len(part))
        for there in (above, below):
            expected[there] = part[there].mean() if there.any() else 0.0
        np.testing.assert_allclose(out[start : start + size], expected, rtol=0, atol=2e-3 * np.abs(x).max())
        sums = [-grads[below].sum(), grads[above].sum()]
        np.testing.assert_allclose(levels.sizes.grad[i].numpy(), sums, rtol=1e-5, atol=1e-6)


def test_rescale_multiplies_both():
    x = torch.tensor([[0.25, -2.0, 1.0, 1.5, -0.25]])
    levels = ready(TrainedTernaryLevels((1, 5)), x)
    hard = levels.rescale(levels.code(x), torch.tensor([4.0]))
    assert hard.tolist() == levels.hard(hard).tolist() == [[0.0, -8.0, 5.0, 5.0, 0.0]]
    with pytest.raises(ValueError, match="group='channel' gives it one"):
        TrainedTernaryLevels((1, 5), group="tensor").rescale(levels.code(x), torch.tensor([4.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scales", ["float32", "float16", "log8"])
def test_a_file_is_loaded_and_written_again_as_it_is(scales, dtype, tmp_path, same_bits):
    model, fresh = (nn.Sequential(nn.Linear(30, 8)).to(dtype) for _ in range(2))
    quantise = StraightThroughQuantization("ttq", scales=scales)
    with torch.no_grad():
        model[0].weight.copy_(torch.where(torch.rand(8, 30) < 0.8, 5.0, -0.3) + 0.1 * torch.randn(8, 30))
        model[0].weight[:, ::3] = 0
    compress(model, [quantise])
    save(model, tmp_path / "model.psc")
    state = load(tmp_path / "model.psc")
    fresh.load_state_dict(state)
    compress(fresh, [StraightThroughQuantization("ttq", scales=scales)])
    save(fresh, tmp_path / "again.psc")
    assert same_bits(load(tmp_path / "again.psc")["0.weight"], state["0.weight"])


def test_it_is_picked_up_by_its_name():
    assert StraightThroughQuantization("ttq", step_lr=0.5).lr == 0.5
    assert composed("none", levels="ttq").callbacks.levels.step_lr == 1e-4
    with pytest.raises(ValueError, match=r"^bits: 'ttq' does not read it; it takes group, scales"):
        StraightThroughQuantization("ttq", bits=2)
