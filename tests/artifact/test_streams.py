from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from read_with_numpy import Ans

from psc_lightning.artifact import codings
from psc_lightning.artifact.ans import Decoder, Encoder, count
from psc_lightning.artifact.codings import CODINGS
from psc_lightning.artifact.codings.adaptive import spans
from psc_lightning.artifact.codings.lines import Places
from psc_lightning.artifact.errors import ArtifactError
from psc_lightning.artifact.streams import SymbolReader, SymbolWriter

sizes = st.sampled_from([1, 2, 3, 7, 8, 9, 16, 100, 255, 256, 257, 300, 65535, 65536])


def draw(number: int, size: int, kind: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind == "noise":
        values = torch.randint(0, size, (number,), generator=generator)
    elif kind == "bell":
        values = (torch.randn(number, generator=generator) * size / 20 + size / 2).round().clamp(0, size - 1)
    elif kind == "rare":
        values = torch.where(torch.rand(number, generator=generator) < 0.02, size - 1, 0)
    else:
        values = torch.full((number,), size // 2)
    return values.to(torch.int32)


@given(
    st.lists(
        st.tuples(st.integers(0, 3000), sizes, st.sampled_from(["noise", "bell", "rare", "one"]), st.integers(0, 99)),
        max_size=4,
    ),
    st.integers(-(2**63), 2**63 - 1),
)
@settings(max_examples=40, deadline=None)
def test_what_is_written_returns(arrays: list[tuple[int, int, str, int]], integer: int) -> None:
    writer = SymbolWriter()
    values = [draw(*array) for array in arrays]
    for (_, size, _, _), symbols in zip(arrays, values, strict=True):
        writer.symbols(symbols, size)
        writer.integer(integer)
    cost, streams = writer.bits, writer.streams
    stored = writer.finish()
    reader = SymbolReader(stored)
    for (number, size, _, _), symbols in zip(arrays, values, strict=True):
        found = reader.symbols(number, size)
        assert found.dtype == torch.int32
        assert torch.equal(found, symbols)
        assert reader.integer(integer, integer) == integer
    reader.finish()
    # The cost is the same on both sides, and it is what the file takes.
    assert reader.bits == pytest.approx(cost, abs=1e-6)
    assert reader.streams == streams
    # A single message may be lucky by up to the coder's state, eight bytes.
    assert cost / 8 - 8 <= len(stored) <= 1.01 * cost / 8 + 32


@pytest.mark.parametrize("seed", range(6))
def test_the_described_reader_reads_it(seed: int) -> None:
    choice = random.Random(seed)
    arrays = [
        (
            choice.randrange(1, 400),
            choice.choice([2, 3, 16, 200, 256, 3000]),
            choice.choice(["noise", "bell", "rare"]),
            seed,
        )
        for _ in range(6)
    ]
    integers = [choice.randrange(-(10**6), 10**6) for _ in arrays]
    writer = SymbolWriter()
    for array, integer in zip(arrays, integers, strict=True):
        writer.integer(integer)
        writer.symbols(draw(*array), array[1])
    assert {"uniform", "adaptive"} <= {stream.coding for stream in writer.streams}
    reference = Ans(writer.finish())
    for array, integer in zip(arrays, integers, strict=True):
        assert reference.integer() == integer
        assert reference.array(array[0], array[1]) == draw(*array).tolist()
    assert (reference.state, reference.words) == (1, [])


def test_the_described_reader_reads_a_long_array() -> None:
    """Beyond 2^14 symbols the blocks double."""
    symbols = draw(40_000, 3, "rare", 0)
    writer = SymbolWriter()
    writer.symbols(symbols, 3)
    assert writer.streams[0].coding == "adaptive"
    assert Ans(writer.finish()).array(40_000, 3) == symbols.tolist()


@pytest.mark.parametrize("code", range(len(CODINGS)))
@pytest.mark.parametrize("size", [2, 5, 16, 100, 256])
@pytest.mark.parametrize("number", [1, 8, 9, 40, 1000, 40_000])
def test_each_proposal_of_each_coding_returns_at_its_price(code: int, size: int, number: int) -> None:
    coding = CODINGS[code]
    symbols = draw(number, size, "bell", number).to(torch.uint8)
    columns = 40 if number % 40 == 0 else 1
    if size <= 16 and columns > 1:  # so that places say something
        symbols[torch.arange(number) % columns < 20] = 0
    proposals = list(coding.propose(symbols, count(symbols, size), columns))
    expected = {"adaptive": number > 8, "lines": size <= 16 and number >= 1000}
    assert bool(proposals) == expected.get(coding.name, True)
    for proposal in proposals[:: 1 if number < 1000 else 7]:
        assert len(proposal.parameters) == len(coding.limits)
        assert all(0 <= p < limit for p, limit in zip(proposal.parameters, coding.limits, strict=True))
        encoder = Encoder()
        proposal.write(encoder)
        assert encoder.bits == pytest.approx(proposal.bits)
        decoder = Decoder(encoder.finish())
        read = coding.read(decoder, number, size, proposal.parameters, columns)
        assert torch.equal(read, symbols.to(torch.int32))
        assert decoder.bits == pytest.approx(proposal.bits)
        decoder.finish()


def matrix(rows: int, columns: int, seed: int = 0, transposed: bool = False, size: int = 2) -> torch.Tensor:
    """Zeros for the most part; each column has a share of its own, and what was there in the row before often stays."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(columns, generator=generator) ** 3
    drawn = torch.rand(rows, columns, generator=generator) < share
    stays = torch.rand(rows, columns, generator=generator) < 0.3
    for row in range(1, rows):
        drawn[row] = torch.where(stays[row], drawn[row - 1], drawn[row])
    found = drawn.int() * torch.randint(1, size, drawn.shape, generator=generator, dtype=torch.int32)
    return (found.T if transposed else found).contiguous()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [2, 3, 16])
@pytest.mark.parametrize("shape", [(400, 40), (3, 700), (300, 7)])
def test_places_say_something_and_the_described_reader_reads_it(
    shape: tuple[int, int], size: int, transposed: bool
) -> None:
    symbols = matrix(*shape, transposed=transposed, size=size)
    writer, other = SymbolWriter(), SymbolWriter()
    writer.symbols(symbols.reshape(-1), size, symbols.shape[1])
    other.symbols(symbols.reshape(-1), size)
    if shape == (400, 40):
        assert [stream.coding for stream in writer.streams] == ["lines"]
        assert writer.bits < 0.95 * other.bits
    assert writer.bits <= other.bits
    data = writer.finish()
    assert Ans(data).array(symbols.numel(), size, symbols.shape[1]) == symbols.reshape(-1).tolist()
    reader = SymbolReader(data)
    assert torch.equal(reader.symbols(symbols.numel(), size, symbols.shape[1]), symbols.reshape(-1))
    reader.finish()


def test_contexts_by_hand() -> None:
    """Four places in three lines; after them f = 6, e = 14, and a place is in class 0 … 6 by its marks."""
    places = Places(4, size=2, common=0)
    assert places.next()[0].tolist() == [4 * 3] * 4  # nothing seen: each place is as marked as all are
    lines = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    cost = 0.0
    for line in lines:
        symbols = np.array(line, dtype=np.uint8)
        cost += places.learn(symbols, places.next()[0])
    assert cost == pytest.approx(12)  # no table was made yet: a bit each
    # Marks 3, 2, 0, 0: (14 N + 12) / (5 · 6) = 1.8, 1.33, 0.4, 0.4 of the average, so classes 4, 4, 1, 1.
    assert places.next()[0].tolist() == [4 * 4 + 3, 4 * 4 + 3, 4, 4]


def read_all(stored: bytes, number: int, columns: int) -> torch.Tensor:
    reader = SymbolReader(stored)
    symbols = reader.symbols(number, 2, columns)
    reader.finish()
    return symbols


def test_a_matrix_of_other_shape_is_refused() -> None:
    """The shape comes from elsewhere in a file; a reader takes no file's word for it."""
    symbols = matrix(50, 40)
    writer = SymbolWriter()
    writer.symbols(symbols.reshape(-1), 2, 40)
    stored = writer.finish()
    for columns in (7, 1):
        with pytest.raises(ArtifactError):
            read_all(stored, 2000, columns)


def test_the_cheapest_coding_is_taken() -> None:
    generator = torch.Generator().manual_seed(0)
    cases = {
        "constant": torch.full((1000,), 3),
        "uniform": torch.randint(0, 256, (1000,), generator=generator),
        "adaptive": (torch.randn(1000, generator=generator) * 5 + 100).round().clamp(0, 255).int(),
    }
    for name, symbols in cases.items():
        writer = SymbolWriter()
        writer.symbols(symbols, 256)
        assert writer.streams[0].coding == name
    # A constant costs a few bits, whatever its length; noise costs 8 bits a symbol.
    writer = SymbolWriter()
    writer.symbols(cases["constant"], 256)
    assert writer.bits < 20
    writer.symbols(cases["uniform"], 256)
    assert 8000 < writer.bits < 8040


def test_bits_near_their_entropy() -> None:
    """10,000 bits with one in ten set: H = 0.469 bits each; learning that share costs about 7 bits."""
    symbols = (torch.arange(10_000) * 7919 % 10 == 0).int()
    writer = SymbolWriter()
    writer.symbols(symbols, 2)
    stream = writer.streams[0]
    assert stream.number == 10_000
    assert stream.distinct == 2
    assert stream.entropy == pytest.approx(10_000 * -(0.1 * np.log2(0.1) + 0.9 * np.log2(0.9)))
    assert stream.entropy < writer.bits < stream.entropy + 30


def test_smoothing_pays_where_near_numbers_mean_near_values() -> None:
    symbols = draw(400, 256, "bell", 0)
    best = min(CODINGS[1].propose(symbols.to(torch.uint8), count(symbols, 256), 1), key=lambda p: p.bits)
    plain = min(
        p.bits for p in CODINGS[1].propose(symbols.to(torch.uint8), count(symbols, 256), 1) if p.parameters[1] == 0
    )
    assert best.parameters[1] > 0
    assert best.bits < 0.95 * plain


def test_blocks_cover_a_stream_once() -> None:
    for number in (0, 1, 8, 9, 100, 16_383, 16_384, 16_385, 1_000_000):
        cuts = list(spans(number))
        assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts)][: len(cuts)]
        assert sum(stop - start for start, stop in cuts) == number
    assert len(list(spans(200_000_000))) < 60


def test_same_symbols_same_bytes() -> None:
    def once() -> bytes:
        writer = SymbolWriter()
        writer.symbols(draw(5000, 300, "bell", 1), 300)
        return writer.finish()

    assert once() == once()


def test_a_method_that_writes_nonsense_is_told() -> None:
    writer = SymbolWriter()
    with pytest.raises(ValueError, match=r"0 … 3, got 0 … 4"):
        writer.symbols(torch.arange(5), 4)
    with pytest.raises(ValueError, match=r"0 … 3, got -1 … 2"):
        writer.symbols(torch.tensor([-1, 2]), 4)
    with pytest.raises(ValueError, match="1-D"):
        writer.symbols(torch.zeros(2, 2, dtype=torch.int32), 4)
    for size in (0, 65537):
        with pytest.raises(ValueError, match="size"):
            writer.symbols(torch.zeros(2, dtype=torch.int32), size)
    for value in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match="64 bits"):
            writer.integer(value)


def test_a_reader_trusts_no_range() -> None:
    writer = SymbolWriter()
    writer.integer(7)
    stored = writer.finish()
    with pytest.raises(ArtifactError, match="expected an integer in 0 … 6, found 7"):
        SymbolReader(stored).integer(0, 6)
    writer = SymbolWriter()
    writer.symbols(torch.tensor([300, 1]), 301)
    stored = writer.finish()
    with pytest.raises(ArtifactError, match="below 300, found 300"):
        SymbolReader(stored).symbols(2, 300)
    writer = SymbolWriter()
    writer.symbols(torch.tensor([9, 3]), 10)
    stored = writer.finish()
    with pytest.raises(ArtifactError, match="damaged"):
        SymbolReader(stored).symbols(2, 2)
    with pytest.raises(ArtifactError, match="at most 10 symbols"):
        SymbolReader(stored, limit=10).symbols(11, 10)


def test_codings_keep_their_numbers() -> None:
    assert [coding.name for coding in codings.CODINGS][:3] == ["uniform", "adaptive", "lines"]
