from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from read_with_numpy import Ans

from psc_lightning.artifact import codings
from psc_lightning.artifact.allowance import Allowance
from psc_lightning.artifact.ans import Coded, Decoder, Encoder
from psc_lightning.artifact.codings import CODINGS, Plane, full
from psc_lightning.artifact.codings.adaptive import spans
from psc_lightning.artifact.codings.lines import Places
from psc_lightning.artifact.codings.planes import Found, find
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
        assert found.dtype == (torch.uint8 if size <= 256 else torch.int32)
        assert torch.equal(found.to(torch.int32), symbols)
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
    stored = writer.finish()
    reference = Ans(stored.stack, stored.plain)
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
    assert Ans(writer.finish().stack).array(40_000, 3) == symbols.tolist()


@pytest.mark.parametrize("code", range(len(CODINGS)))
@pytest.mark.parametrize("size", [2, 5, 16, 100, 256])
@pytest.mark.parametrize("number", [1, 8, 9, 40, 1000, 40_000])
def test_each_proposal_of_each_coding_returns_at_its_price(code: int, size: int, number: int) -> None:
    coding = CODINGS[code]
    symbols = draw(number, size, "bell", number).to(torch.uint8)
    grid = None
    if number % 40 == 0:
        grid = full(number // 40, 40)
        symbols[torch.arange(number) % 40 < 20] = 0  # so that places say something
    plane = Plane(symbols, size, grid, size // 2, around=size % 2 == 1)
    proposals = list(coding.propose(plane, Encoder()))
    expected = {"adaptive": number > 8, "lines": size == 2 and number >= 1000, "split": size > 2 and number >= 1000}
    expected["plain"] = number == 40_000 and size in (16, 256)
    expected["occupied"] = size == 2 and grid is not None
    expected["gaps"] = False  # not among so few
    if coding.name != "diagonals":  # which knows columns no better than lines do; it has tests of its own
        assert bool(proposals) == expected.get(coding.name, True)
    for proposal in proposals[:: 1 if number < 1000 else 7]:
        assert len(proposal.parameters) == len(coding.limits)
        assert all(0 <= p < limit for p, limit in zip(proposal.parameters, coding.limits, strict=True))
        encoder = Encoder()
        proposal.write(encoder)
        # Integers of their own get cheaper, or dearer, as others of them come.
        own = {"split": 99, "diagonals": 9, "occupied": 99}
        assert encoder.bits == pytest.approx(proposal.bits, abs=own.get(coding.name, 1e-6))
        decoder = Decoder(encoder.finish())
        found = Found(number, 3, coding.read(decoder, number, size, proposal.parameters, grid), coding.name)
        for _ in range(2 if size < 254 else 0):  # and reading leaves it as it is
            assert torch.equal(found.symbols(torch.uint8), symbols + 3)
            assert found.histogram(size + 3).tolist() == [0, 0, 0, *plane.histogram.tolist()]
            assert torch.equal(found.values(table := torch.rand(size + 3)), table[symbols.int() + 3])
        assert torch.equal(replace(found, low=0).symbols(torch.uint8), symbols)
        assert decoder.bits == pytest.approx(encoder.bits)
        decoder.finish()


def matrix(rows: int, columns: int, seed: int = 0, transposed: bool = False, size: int = 2) -> torch.Tensor:
    """The middle for the most part; each column has a share of its own, and the side of the row before often stays."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(columns, generator=generator) ** 3
    drawn = torch.rand(rows, columns, generator=generator) < share
    side = torch.rand(rows, columns, generator=generator) < 0.5
    stays = torch.rand(rows, columns, generator=generator) < 0.6
    for row in range(1, rows):
        drawn[row] = torch.where(stays[row], drawn[row - 1], drawn[row])
        side[row] = torch.where(stays[row], side[row - 1], side[row])
    if size == 2:
        return (drawn.T if transposed else drawn).contiguous().int()
    far = torch.randint(1, size // 2 + 1, drawn.shape, generator=generator)
    found = (size // 2 + drawn * far * (1 - 2 * side.int())).clamp(0, size - 1)
    return (found.T if transposed else found).contiguous().int()


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("size", [2, 3, 16, 33])
@pytest.mark.parametrize("shape", [(200, 40), (3, 700), (300, 7)])
def test_places_say_something_and_the_described_reader_reads_it(
    shape: tuple[int, int], size: int, transposed: bool, holes: bool
) -> None:
    symbols = matrix(*shape, transposed=transposed, size=size)
    grid = torch.ones_like(symbols, dtype=torch.bool)
    if holes:
        grid[::3] = False
        grid[:, ::5] = False
    values = symbols[grid]
    writer, other = SymbolWriter(), SymbolWriter()
    writer.symbols(values, size, grid)
    other.symbols(values, size)
    if shape == (200, 40) and not holes:
        assert [stream.coding for stream in writer.streams] == ["diagonals" if size == 2 else "split"]
        assert writer.bits < 0.95 * other.bits
    assert writer.bits <= other.bits + 99
    data = writer.finish()
    assert Ans(data.stack, data.plain).array(len(values), size, grid.numpy()) == values.tolist()
    reader = SymbolReader(data)
    assert torch.equal(reader.symbols(len(values), size, grid), values)
    reader.finish()


def test_contexts_by_hand() -> None:
    """Four places in three lines; the second line has no entry at the third place."""
    places, everywhere = Places(4), np.arange(4)
    contexts, line = places.next(everywhere)
    # f = 1, e = 2: each place and line is as marked as all are, 2 · 1 · 1 of 2 · 1: class 3.
    assert (contexts.tolist(), line) == ([4 * 3] * 4, 28 * 3)
    cost = places.learn(everywhere, np.array([1, 0, 0, 0], np.uint8), contexts, line)
    here = np.array([0, 1, 3])
    contexts, line = places.next(here)
    # f = 2, e = 6. Place 0: (1 · 6 + 4) / (3 · 2) = 1.67, class 4; others 4 / 6, class 2. Line: 1 of 4: 10 / 12, class 3.
    assert (contexts.tolist(), line) == ([4 * 4 + 2, 4 * 2, 4 * 2], 28 * 3)
    cost += places.learn(here, np.array([1, 1, 0], np.uint8), contexts, line)
    assert cost == 4 + 3  # no table was made yet: a bit each
    contexts, line = places.next(everywhere)
    # f = 4, e = 9. Marks 2, 1, 0, 0 of 2, 2, 1, 2: 26/16, 17/16, 8/12, 8/16: classes 4, 3, 2, 2. Line: 3 of 7: 35/36.
    assert (contexts.tolist(), line) == ([4 * 4 + 3, 4 * 3 + 2, 4 * 2, 4 * 2], 28 * 3)


def read_all(stored: Coded, grid: torch.Tensor) -> torch.Tensor:
    reader = SymbolReader(stored)
    symbols = reader.symbols(int(grid.sum()), 2, grid)
    reader.finish()
    return symbols


def test_a_matrix_of_another_shape_is_refused() -> None:
    """The shape comes from elsewhere in a file; a reader takes no file's word for it."""
    symbols = matrix(200, 40)
    writer = SymbolWriter()
    writer.symbols(symbols.reshape(-1), 2, torch.ones(200, 40, dtype=torch.bool))
    stored = writer.finish()
    for shape in ((40, 200), (8000, 1), (1, 8000), (80, 100)):
        with pytest.raises(ArtifactError):
            read_all(stored, torch.ones(shape, dtype=torch.bool))


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
    best = min(CODINGS[1].propose(Plane(symbols.to(torch.uint8), 256), Encoder()), key=lambda p: p.bits)
    plain = min(
        p.bits for p in CODINGS[1].propose(Plane(symbols.to(torch.uint8), 256), Encoder()) if p.parameters[1] == 0
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
    def once() -> Coded:
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
    few = Allowance(0, 0, 0)
    with pytest.raises(ArtifactError, match=f"at most {few.most_bytes} bytes of tables and symbols"):
        SymbolReader(stored, few).symbols(few.most_bytes // 2 + 1, 10)


def test_a_grid_of_other_places_than_symbols_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        SymbolWriter().symbols(torch.tensor([0, 1, 0]), 2, torch.ones(2, 2, dtype=torch.bool))


def nested(levels: int, size: int) -> Encoder:
    """Split in 1 and more, again and again: in each, all bits are ones; then all symbols are 0."""
    encoder = Encoder()
    for _ in range(levels):
        for value, context in ((0, "low"), (0, "high"), (3, "coding"), (1, "split"), (1, "split")):
            encoder.integer(value, context)
        encoder.integer(1, "low")
        encoder.integer(0, "high")
    encoder.integer(0, "low")
    encoder.integer(size - levels - 1, "high")
    return encoder


def test_splits_within_splits_come_to_an_end() -> None:
    """A file of a few hundred bytes took hundreds of times the memory of its tensors."""
    grid = full(20, 30)
    decoder = Decoder(nested(5, 200).finish())
    assert find(decoder, 600, 200, grid, CODINGS).symbols(torch.uint8).tolist() == [5] * 600
    decoder.finish()
    for levels in (6, 197):
        with pytest.raises(ArtifactError, match="at most 5 splits within one another"):
            find(Decoder(nested(levels, 200).finish()), 600, 200, grid, CODINGS)


def test_codings_keep_their_numbers() -> None:
    names = ["uniform", "adaptive", "lines", "split", "diagonals", "plain", "occupied", "gaps"]
    assert [coding.name for coding in codings.CODINGS][: len(names)] == names
