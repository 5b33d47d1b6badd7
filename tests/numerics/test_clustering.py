from __future__ import annotations

import itertools
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psc_lightning.numerics import clustering
from psc_lightning.numerics.clustering import optimal_centroids


def distortion(values: np.ndarray, centroids: np.ndarray) -> float:
    """Squared error of the nearest centroid of each value."""
    ordered = np.sort(centroids.astype(np.float64))
    nearest = ordered[np.searchsorted((ordered[1:] + ordered[:-1]) / 2, values)]
    return float(((values.astype(np.float64) - nearest) ** 2).sum())


def least(values: list[float], k: int) -> float:
    """The least squared error of k clusters, by trying all intervals of the sorted values."""
    ordered = sorted(values)
    found = []
    for cuts in itertools.combinations(range(1, len(ordered)), min(k, len(ordered)) - 1):
        parts = np.split(np.array(ordered), cuts)
        found.append(sum(((part - part.mean()) ** 2).sum() for part in parts))
    return min(found)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=11), st.integers(1, 5), st.integers(0, 3))
def test_the_least_squared_error_over_the_kept(values, k, left_out):
    row = torch.tensor([[99.0] * left_out + values])
    keep = torch.arange(row.shape[1])[None] >= left_out
    found = optimal_centroids(row, keep, k)
    assert (found.shape, found.dtype) == ((1, k), torch.float32)
    assert (found.diff(dim=1) >= 0).all()
    np.testing.assert_allclose(distortion(np.array(values), found[0].numpy()), least(values, k), rtol=1e-5, atol=1e-6)


def test_by_hand():
    values = torch.tensor([[0.0, 1.0, 10.0, 11.0, 12.0, 100.0], [5.0, 4.0, 3.0, 3.0, 4.0, 5.0]])
    assert optimal_centroids(values, None, 3).tolist() == [[0.5, 11.0, 100.0], [3.0, 4.0, 5.0]]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(1, 5))
def test_few_values_are_their_own_centroids(data, k, rows):
    """Bit for bit, however often each occurs; the largest is repeated."""
    drawn = [
        sorted(set(data.draw(st.lists(st.floats(-100, 100, width=32).map(lambda x: x + 0.0), min_size=1, max_size=k))))
        for _ in range(rows)
    ]
    row = torch.tensor(
        [
            data.draw(st.permutations((values * 7)[: 7 * len(values)])) + [values[0]] * 7 * (k - len(values))
            for values in drawn
        ]
    )
    found = optimal_centroids(row, None, k)
    assert found.tolist() == [values + [values[-1]] * (k - len(values)) for values in drawn]


def test_nothing_one_value_and_what_is_not_finite():
    values = torch.tensor([[3.0, 4.0], [5.0, 5.0], [float("inf"), 2.0], [float("nan"), float("nan")]])
    keep = torch.tensor([[False, False], [True, True], [True, True], [True, True]])
    assert optimal_centroids(values, keep, 3).tolist() == [[0.0] * 3, [5.0] * 3, [2.0] * 3, [0.0] * 3]


def test_rows_of_different_lengths_do_not_disturb_each_other():
    torch.manual_seed(0)
    values, keep = torch.randn(40, 60), torch.rand(40, 60) > torch.rand(40, 1)
    together = optimal_centroids(values, keep, 4)
    for i in range(40):
        np.testing.assert_allclose(optimal_centroids(values[i : i + 1], keep[i : i + 1], 4)[0], together[i], rtol=1e-6)
    with patch.object(clustering, "_BATCH", 1):
        np.testing.assert_allclose(optimal_centroids(values, keep, 4), together, rtol=1e-6)


@pytest.mark.parametrize("kind", ["normal", "student", "two heaps", "an outlier"])
@pytest.mark.parametrize("k", [2, 16])
def test_bins_are_within_a_thousandth_of_the_best(kind: str, k: int):
    random = np.random.default_rng(k)
    values = random.normal(size=20_000)
    if kind == "student":
        values = random.standard_t(3, size=20_000)
    elif kind == "two heaps":
        values[:5_000] = values[:5_000] * 0.01 + 50
    elif kind == "an outlier":
        values[7] = 1e6
    row = torch.from_numpy(values).float()[None]
    with patch.multiple(clustering, _EXACT=20_000, _WORK=10**9):
        best = distortion(row[0].numpy(), optimal_centroids(row, None, k)[0].numpy())
    binned = distortion(row[0].numpy(), optimal_centroids(row, None, k)[0].numpy())
    assert best <= binned * (1 + 1e-6)
    assert binned <= best * 1.001
