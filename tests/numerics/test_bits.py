"""Any tensor as bytes, and back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from psc_lightning.numerics import bits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_bits_come_back(dtype: torch.dtype, tape, same_bits):
    values = torch.tensor([0.0, -0.0, 1.0, -3.1415926535, 6e-8], dtype=torch.float64).to(dtype)
    strided: Tensor = torch.stack([values, values], 1)[:, 0]
    written = tape()
    bits.write_bits(written, strided)
    assert same_bits(bits.read_bits(written, 5, dtype), values)
    assert written.finished
    assert len(written.items) == dtype.itemsize


def test_no_bits_at_all(tape):
    written = tape()
    bits.write_bits(written, torch.zeros(0))
    assert bits.read_bits(written, 0, torch.float32).shape == (0,)


def test_equal_exponents_meet_in_one_array(tape):
    written = tape()
    bits.write_bits(written, torch.tensor([1.0, -1.0, 1.5, -1.75]))
    highest, second = written.items[0][0], written.items[1][0]
    assert highest.tolist() == [127] * 4  # the whole exponent, no sign
    assert [value >> 7 for value in second.tolist()] == [0, 1, 0, 1]  # the sign is next
