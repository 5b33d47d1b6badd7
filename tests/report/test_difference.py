from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from psc_lightning.report.difference import differences


def one(first: Tensor, second: Tensor) -> tuple[int | None, float | None]:
    (found,) = differences({"x": first}, {"x": second})
    return found.differing, found.max_abs_difference


def test_by_hand() -> None:
    first = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    second = torch.tensor([[1.0, 2.5], [3.0, -6.0]])
    assert one(first, second) == (2, 2.0)
    assert one(first, first.clone()) == (0, 0.0)
    assert one(first.t(), first.t().contiguous()) == (0, 0.0)


def test_bits_and_not_numbers_are_compared() -> None:
    assert one(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])) == (1, 0.0)
    nan = torch.tensor([math.nan, 1.0])
    assert one(nan, nan.clone()) == (0, 0.0)
    assert one(nan, torch.tensor([1.0, 5.0])) == (2, None)
    assert one(torch.tensor([5.0, math.nan]), torch.tensor([1.0, 1.0])) == (2, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_every_width(dtype: torch.dtype) -> None:
    assert one(torch.tensor([0, 1, 1]).to(dtype), torch.tensor([1, 1, 0]).to(dtype)) == (2, 1.0)
    assert one(torch.zeros(0, 3, dtype=dtype), torch.zeros(0, 3, dtype=dtype)) == (0, 0.0)


def test_large_tensors_are_compared_to_their_end() -> None:
    first = torch.zeros((1 << 20) + 3, dtype=torch.uint8)
    second = first.clone()
    second[-1], second[5] = 1, 7
    assert one(first, second) == (2, 7.0)


def test_what_cannot_be_compared() -> None:
    first = {"a": torch.zeros(2), "b": torch.zeros(2, 3), "c": torch.zeros(2)}
    second = {"d": torch.zeros(1), "b": torch.zeros(3, 2), "a": torch.zeros(2).double()}
    found = differences(first, second)
    assert [f.name for f in found] == ["a", "b", "c", "d"]
    assert not any(f.equal for f in found)
    assert [f.text("A", "B") for f in found] == [
        "a is float32 [2] in A, float64 [2] in B",
        "b is float32 [2, 3] in A, float32 [3, 2] in B",
        "c is only in A",
        "d is only in B",
    ]
