from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psc_lightning.levels.codebook import CodebookLevels


def ready(levels, x, keep=None):
    keep = torch.ones(x.shape, dtype=torch.bool) if keep is None else keep
    levels.begin(x, keep)
    levels.refresh(x, keep)
    return levels


def test_by_hand():
    x = torch.tensor([[1.0, 1.5], [-2.0, -2.5], [8.0, 8.0]])
    levels = ready(CodebookLevels((3, 2), k=3), x)
    pulled = levels.pull(x, torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]]))
    assert levels.hard(x).tolist() == [[1.25, 1.25], [-2.25, -2.25], [8.0, 8.0]]
    assert pulled.tolist() == [[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]]
    assert levels.centroids.grad.tolist() == [[12.0, 3.0, 48.0]]  # -2.25, 1.25, 8


def test_a_codebook_a_channel_by_hand():
    x = torch.tensor([[1.0, 2.0, 1.0, 2.0], [-5.0, -5.0, 7.0, 7.0]])
    levels = ready(CodebookLevels((2, 4), k=2, group="channel"), x)
    levels.pull(x, torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]]))
    assert levels.hard(x).tolist() == x.tolist()
    assert levels.centroids.grad.tolist() == [[5.0, 10.0], [3.0, 12.0]]


def test_centroids_are_placed_among_the_survivors():
    x = torch.tensor([[100.0, 1.0, 2.0, -100.0]])
    levels = ready(CodebookLevels((1, 4), k=2), x, torch.tensor([[False, True, True, False]]))
    assert levels.centroids.tolist() == [[1.0, 2.0]]


def test_refresh_reorders_trained_centroids_and_reassigns():
    x = torch.tensor([[1.0, 2.0, 8.0, 9.0]])
    levels = ready(CodebookLevels((1, 4), k=2), x)
    with torch.no_grad():
        levels.centroids.copy_(torch.tensor([[8.0, 2.5]]))
    levels.refresh(x, torch.ones(1, 4, dtype=torch.bool))
    assert levels.centroids.tolist() == [[2.5, 8.0]]
    assert levels.hard(x).tolist() == [[2.5, 2.5, 8.0, 8.0]]


def test_a_moved_centroid_takes_its_entries_along_without_a_refresh():
    x = torch.tensor([[1.0, 1.0, 8.0, 8.0]])
    levels = ready(CodebookLevels((1, 4), k=2), x)
    with torch.no_grad():
        levels.centroids[0, 0] = 3.0
    assert levels.hard(x).tolist() == [[3.0, 3.0, 8.0, 8.0]]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 12), st.integers(0, 99), st.integers(2, 6), st.sampled_from(["tensor", 5]))
def test_the_nearest_of_at_most_k_against_a_loop(rows, columns, seed, k, group):
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, columns))).float()
    levels = ready(CodebookLevels((rows, columns), k=k, group=group), x)
    table, out = levels._table(), levels.hard(x).reshape(-1)
    size = x.numel() if group == "tensor" else group
    for i, value in enumerate(x.reshape(-1).tolist()):
        centroids = table[i // size]
        assert out[i] in centroids
        assert abs(out[i] - value) <= (centroids - value).abs().min() + 1e-6
    for part in out.split(size):
        assert len(part.unique()) <= k


@pytest.mark.parametrize("k", [2, 256])
def test_more_centroids_than_entries(k: int):
    x = torch.tensor([[0.5, -0.25]])
    np.testing.assert_allclose(ready(CodebookLevels((1, 2), k=k), x).hard(x), x, rtol=1e-3)
