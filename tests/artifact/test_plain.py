"""Coding 5: equally likely symbols as they are, beside the coder."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from fuzz import closed, little_memory, opened
from hypothesis import given, settings
from hypothesis import strategies as st
from models import bag
from read_with_numpy import Ans
from read_with_numpy import read as reference_read
from torch import Tensor

from psc_lightning.artifact import ArtifactError, ans, container, inspect, load, to_bytes
from psc_lightning.artifact.ans import Coded, Decoder, Encoder
from psc_lightning.artifact.codings import CODINGS, plain
from psc_lightning.artifact.directory import Entry, Kind
from psc_lightning.artifact.streams import SymbolReader, SymbolWriter

CODE = 5


def draw(number: int, size: int, seed: int = 0) -> Tensor:
    return torch.randint(size, (number,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def skewed(number: int, ones: float) -> Tensor:
    """Bits in no order that says anything, so many of them 1."""
    bits = (torch.arange(number) < round(ones * number)).to(torch.uint8)
    return bits[torch.randperm(number, generator=torch.Generator().manual_seed(0))]


def coding(symbols: Tensor, size: int, grid: Tensor | None = None) -> str:
    writer = SymbolWriter()
    writer.symbols(symbols, size, grid)
    return writer.streams[0].coding


def test_bytes_by_hand() -> None:
    """Three symbols of 3 bits are 101 000 11|1 and seven zeros; four bits of one are 1011 and four; a byte is a byte."""
    encoder = Encoder()
    encoder.put_plain(torch.tensor([5, 0, 7], dtype=torch.uint8), 3)
    encoder.put_plain(torch.tensor([1, 0, 1, 1], dtype=torch.uint8), 1)
    encoder.put_plain(torch.tensor([255, 3], dtype=torch.uint8), 8)
    assert encoder.bits == 9 + 4 + 16
    assert encoder.finish() == Coded(b"\1", bytes([0b10100011, 0b10000000, 0b10110000, 255, 3]))


@given(
    st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 8)), min_size=1, max_size=5),
    st.sampled_from([8, 64, 1 << 18]),
)
@settings(max_examples=100, deadline=None)
def test_all_widths_and_numbers_return(planes: list[tuple[int, int]], block: int) -> None:
    with mock.patch.object(ans, "_BLOCK", block):
        encoder = Encoder()
        for i, (number, width) in enumerate(planes):
            encoder.put_plain(draw(number, 1 << width, i), width)
            encoder.integer(i, "between")
        cost, stored = encoder.bits, encoder.finish()
        decoder, stranger = Decoder(stored), Ans(stored.stack, stored.plain)
        for i, (number, width) in enumerate(planes):
            expected = draw(number, 1 << width, i)
            packed = decoder.take_plain(number, width)
            table = torch.rand(1 << width, generator=torch.Generator().manual_seed(i))
            assert torch.equal(packed.symbols(), expected)
            assert torch.equal(packed.values(table), table[expected.int()])
            assert packed.histogram().tolist() == torch.bincount(expected, minlength=1 << width).tolist()
            assert stranger.packed(number, 1 << width, None) == expected.tolist()
            assert decoder.integer("between") == stranger.unsigned("between") == i
        decoder.finish()
    assert decoder.bits == pytest.approx(cost)
    assert len(stored.plain) == sum(-(-number * width // 8) for number, width in planes)
    assert stranger.plain == b""


@pytest.mark.parametrize("low", [0, 3])
@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64, 128, 253, 256])
def test_arrays_of_noise_are_read_by_both_readers(size: int, low: int) -> None:
    """After the smallest symbol is taken off, and only where the size is then a power of two."""
    number = (1 << 16) + 5
    symbols = draw(number, size).to(torch.int32) + low
    writer = SymbolWriter()
    writer.symbols(symbols, low + size)
    assert (writer.streams[-1].coding == "plain") == (size != 253)
    stored = writer.finish()
    assert bool(stored.plain) == (size != 253)
    reader = SymbolReader(stored)
    assert torch.equal(reader.symbols(number, low + size).to(torch.int32), symbols)
    reader.finish()
    assert reader.streams == writer.streams
    assert reader.bits == pytest.approx(writer.bits)
    if low + size <= 256:
        reader, table = SymbolReader(stored), torch.arange(low + size) / 8
        assert torch.equal(reader.values(number, table), symbols / 8)
        assert reader.streams == writer.streams
    assert writer.bits / 8 - 8 <= len(stored) <= 1.01 * writer.bits / 8 + 32
    assert Ans(stored.stack, stored.plain).array(number, low + size) == symbols.tolist()


def test_it_is_taken_for_enough_bits_unless_another_way_saves_a_thousandth() -> None:
    assert coding(draw((1 << 16) - 1, 2), 2) == "uniform"
    assert coding(draw(1 << 16, 2), 2) == "plain"
    assert coding(draw((1 << 13) - 1, 256), 256) == "uniform"
    assert coding(draw(1 << 13, 256), 256) == "plain"
    assert coding(draw(1 << 16, 3), 3) != "plain"
    # H(0.485) = 0.99935, H(0.48) = 0.99885.
    assert coding(skewed(1 << 20, 0.485), 2) == "plain"
    assert coding(skewed(1 << 20, 0.48), 2) == "adaptive"


def test_signs_that_keep_together_are_still_coded_by_their_places() -> None:
    columns = draw(300, 2).expand(300, 300)
    bits = torch.where(draw(90_000, 10, 1).reshape(300, 300) == 0, 1 - columns, columns).reshape(-1)
    assert coding(bits, 2, torch.ones(300, 300, dtype=torch.bool)) in ("lines", "diagonals")


def test_a_file_without_such_planes_has_no_such_section() -> None:
    assert set(container.unpack(to_bytes(bag({"a": draw(1000, 256)}))[0], frozenset(range(6)))) == {1, 3}


def model() -> dict[str, Tensor]:
    return {"bits": draw(65_537, 2) > 0, "bytes": draw(9000, 256)}


def test_damage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    data, report = to_bytes(bag(model()))
    entries, symbols = opened(data)
    assert sum(row.stored_bytes for row in report.tensors) + report.overhead_bytes == len(data)
    path.write_bytes(closed(entries, symbols))
    assert path.read_bytes() == data
    assert all(torch.equal(found, model()[name]) for name, found in load(path).items())
    assert all(np.array_equal(found, model()[name].numpy()) for name, found in reference_read(data).items())
    packed = symbols.plain
    filled = packed[:8192] + bytes([packed[8192] | 1]) + packed[8193:]
    for damaged, message in (
        (b"", "expected 8193 more bytes of plain symbols, found 0"),
        (packed[:-1], "expected 9000 more bytes of plain symbols, found 8999"),
        (packed + b"\0", "expected no more plain symbols, found 1 bytes"),
        (filled, "expected 7 zeros after plain symbols"),
    ):
        path.write_bytes(closed(entries, Coded(symbols.stack, damaged)))
        for read in (load, inspect):
            with pytest.raises(ArtifactError, match=message):
                read(path)


def claims(high: int) -> Coded:
    """A file's symbols that says: plain symbols up to `high` follow; and has none."""
    encoder = Encoder()
    for value, context in ((0, "low"), (255 - high, "high"), (CODE, "coding")):
        encoder.integer(value, context)
    return encoder.finish()


def test_a_small_file_that_claims_many_takes_no_memory(tmp_path: Path) -> None:
    many = 1 << 30
    (tmp_path / "f").write_bytes(closed([Entry("a", Kind.LEFTOVER, torch.uint8, (many,))], claims(255)))
    with little_memory(), pytest.raises(ArtifactError, match=f"expected {many} more bytes of plain symbols, found 0"):
        load(tmp_path / "f")


@pytest.mark.parametrize("high", [2, 4, 99, 254])
def test_sizes_that_are_no_powers_of_two_are_refused(high: int) -> None:
    with pytest.raises(
        ArtifactError, match=f"expected plain symbols below a power of two, found them below {high + 1}"
    ):
        SymbolReader(claims(high)).symbols(8, 256)


def test_it_is_coding_5() -> None:
    assert isinstance(CODINGS[CODE], plain.Plain)
