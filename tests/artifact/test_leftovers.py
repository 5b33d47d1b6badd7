from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from psc_lightning.artifact import leftovers
from psc_lightning.artifact.directory import DTYPES, Entry, Kind
from psc_lightning.artifact.streams import SymbolReader, SymbolWriter


class Planes:
    """A writer that shows what it is given."""

    def __init__(self) -> None:
        self.planes: list[list[int]] = []
        self.integers: list[int] = []

    def integer(self, value: int) -> None:
        self.integers.append(value)

    def symbols(self, values: Tensor, size: int, grid: Tensor | None = None) -> None:
        self.planes.append(values.tolist())


def test_floats_by_hand() -> None:
    planes = Planes()
    # 1.0 = 0 01111111 000…; -2.5 = 1 10000000 0100…: exponent, then sign and the mantissa's seven high bits.
    encode(planes, [torch.tensor([1.0, -2.5])])
    assert planes.planes == [[127, 128], [0, 0b1_0100000], [0, 0], [0, 0]]


def test_integers_by_hand() -> None:
    planes = Planes()
    encode(planes, [torch.tensor([0, -1, 1, -2, 300], dtype=torch.int16)])
    assert planes.planes == [[0, 0, 0, 0, 2], [0, 1, 2, 3, 600 - 512]]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and (a.numel() == 0 or raw(a) == raw(b))


def encode(writer: Planes | SymbolWriter, tensors: Sequence[Tensor], kind: Kind = Kind.LEFTOVER) -> None:
    stored = leftovers.stored_as(Entry("", kind, tensors[0].dtype, ()))
    leftovers.encode(writer, {str(number): tensor for number, tensor in enumerate(tensors)}, stored)


def decode(
    writer: SymbolWriter, shapes: Sequence[Sequence[int]], dtype: torch.dtype, kind: Kind = Kind.LEFTOVER
) -> list[Tensor]:
    return leftovers.decode(SymbolReader(writer.finish()), [Entry("", kind, dtype, tuple(shape)) for shape in shapes])


def raw(tensor: Tensor) -> list[int]:
    values: list[int] = tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
    return values


@given(st.sampled_from(DTYPES), st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=3), st.randoms())
@settings(max_examples=80, deadline=None)
def test_any_bits_return(dtype: torch.dtype, shapes: list[list[int]], random: object) -> None:
    generator = torch.Generator().manual_seed(random.randrange(10**6))  # type: ignore[attr-defined]
    tensors = []
    for shape in shapes:
        number = torch.Size(shape).numel() * dtype.itemsize
        high = 2 if dtype == torch.bool else 256
        entries = torch.randint(0, high, (number,), generator=generator).to(torch.uint8)
        tensors.append(entries.view(dtype).reshape(shape))
    writer = SymbolWriter()
    encode(writer, tensors)
    found = decode(writer, shapes, dtype)
    assert all(same_bits(a, b) for a, b in zip(tensors, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_signs_of_zero_infinities_and_not_a_number(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).tiny], dtype=dtype)
    writer = SymbolWriter()
    encode(writer, [tensor])
    (found,) = decode(writer, [(6,)], dtype)
    assert same_bits(tensor, found)


def test_non_contiguous() -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    writer = SymbolWriter()
    encode(writer, [tensor])
    (found,) = decode(writer, [(4, 3)], torch.float32)
    assert torch.equal(found, tensor)
    assert found.is_contiguous()


def test_exponents_and_zeros_are_cheap() -> None:
    """Weights of one scale: about 2 bits of exponent instead of 8; zeros cost nothing at all."""
    generator = torch.Generator().manual_seed(0)
    writer = SymbolWriter()
    encode(writer, [torch.randn(4000, generator=generator)])
    assert writer.bits / 4000 < 27
    writer = SymbolWriter()
    encode(writer, [torch.zeros(4000)])
    assert writer.bits < 60


def test_a_logarithmic_grid_by_hand() -> None:
    """Each tensor has the power of two above its largest number: 4 and 0.5; then steps of 2^(1/8)."""
    planes = Planes()
    encode(planes, [torch.tensor([2.0, -1.0, 0.0]), torch.tensor([0.25, 1e-9])], Kind.LOG)
    # 2/4 is 8 steps below 1, which is 127; 1/4 is 16; 0.25/0.5 again 8
    assert planes.integers == [2, -1]
    assert planes.planes == [[127 + 119, 127 - 111, 127, 127 + 119, 127]]
    writer = SymbolWriter()
    encode(writer, [torch.tensor([2.0, -1.0, 0.0, 1.02]), torch.tensor([0.25, 1e-9])], Kind.LOG)
    first, second = decode(writer, [(4,), (2,)], torch.float32, Kind.LOG)
    assert (first.tolist(), second.tolist()) == ([2.0, -1.0, 0.0, 1.0], [0.25, 0.0])


@given(st.integers(0, 10**6), st.integers(-60, 60))
@settings(max_examples=50, deadline=None)
def test_the_grid_is_near_and_rounds_once(seed: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(20, generator=generator) * 2.0**exponent
    once, again = SymbolWriter(), SymbolWriter()
    encode(once, [values], Kind.LOG)
    (found,) = decode(once, [(20,)], torch.float32, Kind.LOG)
    large = values.abs() > values.abs().max() * 2.0**-14
    assert bool(((found - values).abs() <= 0.0453 * values.abs())[large].all())  # half of 2^(1/8) - 1, from below
    assert bool((found.abs() <= values.abs().max() * 2).all())
    encode(again, [found], Kind.LOG)
    assert same_bits(found, decode(again, [(20,)], torch.float32, Kind.LOG)[0])
