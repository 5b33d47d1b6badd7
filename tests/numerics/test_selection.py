from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psc_lightning.numerics import selection
from psc_lightning.numerics.selection import largest, magnitudes, mark_largest, numbers


def dropped(scores: list[float], second: list[float] | None, zeros: int) -> list[int]:
    """By a full sort."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], second[i] if second else 0.0, i))
    return sorted(order[:zeros])


few = st.integers(-2, 2).map(float)  # few values: many ties


@settings(deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 9), st.booleans())
def test_largest_is_the_stable_sort(data, rows, columns, with_second):
    draw = st.lists(st.lists(few, min_size=columns, max_size=columns), min_size=rows, max_size=rows)
    scores, tiebreak = data.draw(draw), data.draw(draw)
    zeros = data.draw(st.integers(0, columns - 1))
    keep = largest(torch.tensor(scores), torch.tensor(tiebreak) if with_second else None, zeros).tolist()
    for kept, score, second in zip(keep, scores, tiebreak, strict=True):
        assert [i for i in range(columns) if not kept[i]] == dropped(score, second if with_second else None, zeros)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_largest_of_other_types(dtype: torch.dtype):
    keep = largest(torch.tensor([[3.0, 1.0, 2.0, 1.0]], dtype=dtype), None, 2)
    assert keep.tolist() == [[True, False, True, False]]


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(1, 40), st.booleans(), st.integers(1, 9), st.sampled_from([0, 1 << 13]))
def test_a_row_in_strips_is_the_stable_sort(data, n, with_second, strip, few_entries):
    number = st.one_of(few, st.floats(-3, 3, width=32), st.sampled_from([-0.0, float("inf"), -float("inf")]))
    scores = data.draw(st.lists(data.draw(st.sampled_from([few, number])), min_size=n, max_size=n))
    second = data.draw(st.lists(data.draw(st.sampled_from([few, number])), min_size=n, max_size=n))
    zeros = data.draw(st.integers(0, n - 1))
    kept = np.empty(n, dtype=bool)
    # a sample of every second entry often guesses wrong
    with patch.multiple(selection, _STRIP=strip, _FEW=few_entries, _SAMPLE=2):
        tiebreak = magnitudes(torch.tensor(second)) if with_second else None
        mark_largest(numbers(torch.tensor(scores)), tiebreak, zeros, kept)
    expected = dropped(scores, [abs(x) for x in second] if with_second else None, zeros)
    assert np.flatnonzero(~kept).tolist() == expected


@pytest.mark.parametrize("zeros", [1, 777, 30_000, 59_000, 59_999])
@pytest.mark.parametrize("kind", ["normal", "rounded", "constant", "mostly zero", "sorted", "every column another"])
def test_a_long_row_is_the_stable_sort(kind: str, zeros: int):
    random = np.random.default_rng(zeros)
    scores = random.normal(size=60_000).astype(np.float32)
    if kind == "rounded":
        scores = scores.round(1)
    elif kind == "constant":
        scores[:] = 2.0
    elif kind == "mostly zero":  # the rows of a table that no batch has reached
        scores[3_000:] = 0.0
    elif kind == "sorted":
        scores.sort()
    elif kind == "every column another":
        scores = (scores.reshape(-1, 60) * np.arange(1, 61, dtype=np.float32)).reshape(-1)
    second = random.normal(size=60_000).astype(np.float32).round(2)
    kept = np.empty(60_000, dtype=bool)
    mark_largest(numbers(torch.from_numpy(scores)), magnitudes(torch.from_numpy(second)), zeros, kept)
    order = np.lexsort((np.arange(60_000), np.abs(second), scores))
    expected = np.ones(60_000, dtype=bool)
    expected[order[:zeros]] = False
    np.testing.assert_array_equal(kept, expected)


def test_what_is_not_a_number_is_kept():
    kept = np.empty(4, dtype=bool)
    mark_largest(magnitudes(torch.tensor([float("nan"), 1.0, -2.0, 3.0])), None, 2, kept)
    assert kept.tolist() == [True, False, False, True]
