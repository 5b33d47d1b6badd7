from __future__ import annotations

import pytest
import torch

from psc_lightning.levels.half import BFloat16Levels, Float16Levels

BOTH = pytest.mark.parametrize("method", [Float16Levels, BFloat16Levels])


@BOTH
def test_by_hand(method: type[Float16Levels], same_bits):
    x = torch.tensor([[1.0 + 2.0**-12, -1.0 - 2.0**-9, 0.1, 3.0]])
    levels = method((1, 4))
    out, pulled = levels.hard(x), levels.pull(x, torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert same_bits(out, x.to(method.stored).float())
    expected = [1.0, -1.0 - 2.0**-9, 1638 / 2**14, 3.0] if method is Float16Levels else [1.0, -1.0, 205 / 2**11, 3.0]
    assert out.tolist() == [expected]
    assert pulled.tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_a_tiny_negative_number_becomes_a_positive_zero(same_bits):
    x = torch.tensor([[-1e-9, 1e-9]])
    assert same_bits(Float16Levels((1, 2)).hard(x), torch.zeros(1, 2))


def test_overflow_is_an_error_unless_it_is_masked():
    x = torch.tensor([[65504.0, 70000.0]])
    levels = Float16Levels((1, 2))
    with pytest.raises(ValueError, match=r"torch.float16 holds numbers up to 65504, a weight of size 70000 overflows"):
        levels.refresh(x, torch.tensor([[True, True]]))
    levels.refresh(x, torch.tensor([[True, False]]))
    assert levels.hard(x)[0, 0] == 65504.0


@BOTH
def test_not_a_number_is_an_error(method: type[Float16Levels]):
    with pytest.raises(ValueError, match="overflows"):
        method((1, 1)).refresh(torch.tensor([[float("nan")]]), torch.ones(1, 1, dtype=torch.bool))


@BOTH
def test_stored_in_two_bytes_an_entry_of_the_kept(method: type[Float16Levels], tape, same_bits):
    x, keep = torch.randn(3, 5), torch.rand(3, 5) > 0.4
    written = tape()
    method((3, 5)).encode(written, x, keep)
    assert [(len(values), size) for values, size in written.items] == [(int(keep.sum()), 256)] * 2
    read = method.decode(written, keep, torch.float32)
    assert same_bits(read[keep], method((3, 5)).hard(x)[keep])
