from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from read_with_numpy import Ans
from read_with_numpy import table as reference_table

from psc_lightning import symbols
from psc_lightning.artifact.ans import TOTAL, Coded, Decoder, Encoder, bits, count, table
from psc_lightning.artifact.errors import ArtifactError

weights = st.lists(st.integers(1, 2**30), min_size=1, max_size=256) | st.lists(
    st.sampled_from([1, 2, 2**30]), min_size=1, max_size=256
)


def coded(symbols: list[int], k: np.ndarray) -> tuple[Coded, float]:
    encoder = Encoder()
    tensor = torch.tensor(symbols, dtype=torch.uint8)
    encoder.put(tensor, k, count(tensor, len(k)))
    return encoder.finish(), encoder.bits


def test_one_symbol_by_hand() -> None:
    # From state 1 under two halves: (1 // 2^23) · 2^24 + 2^23 · symbol + 1 mod 2^23.
    half = table(np.array([1, 1]))
    assert half.tolist() == [1 << 23, 1 << 23]
    assert coded([1], half) == (Coded((2**23 + 1).to_bytes(3, "little")), 1.0)
    assert coded([0], half) == (Coded(b"\1"), 1.0)


@given(weights)
@settings(max_examples=100)
def test_tables_are_the_described_ones(values: list[int]) -> None:
    k = table(np.array(values, dtype=np.int64))
    assert [0, *np.cumsum(k).tolist()] == reference_table(values)
    assert k.sum() == TOTAL
    assert k.min() >= 1


def test_tables_of_rows_are_the_tables_of_each() -> None:
    rows = np.array([[1, 5, 5], [9, 1, 1]], dtype=np.int64)
    assert table(rows).tolist() == [table(row).tolist() for row in rows]


@given(weights, st.data())
@settings(max_examples=150, deadline=None)
def test_the_library_codes_with_exactly_these_tables(values: list[int], data: st.DataObject) -> None:
    """A decoder with integers only, after the format's description, reads what constriction wrote."""
    k = table(np.array(values, dtype=np.int64))
    symbols = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=40))
    if len(values) == 1:
        return  # nothing to code
    stored, cost = coded(symbols, k)
    reference = Ans(stored.stack or b"\1")
    assert [reference.symbol([0, *np.cumsum(k).tolist()]) for _ in symbols] == symbols
    assert (reference.state, reference.words) == (1, [])
    assert 8 * len(stored) <= cost + 32
    assert cost == pytest.approx(sum(24 - np.log2(k[s]) for s in symbols))


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1) | st.integers(0, 9), st.sampled_from("ab")), max_size=30))
@settings(max_examples=60, deadline=None)
def test_integers_return(values: list[tuple[int, str]]) -> None:
    encoder = Encoder()
    for value, context in values:
        encoder.integer(value, context)
    cost = encoder.bits
    stored = encoder.finish()
    decoder = Decoder(stored)
    assert [(decoder.integer(context), context) for _, context in values] == values
    decoder.finish()
    assert decoder.bits == pytest.approx(cost)
    assert 8 * len(stored) <= cost + 32


def test_runs_and_pieces_are_what_symbols_put_one_by_one_are(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [table(np.array(weights)) for weights in ([3, 1, 2], [1, 9, 1], [1, 1, 1])]
    values = torch.arange(100, dtype=torch.uint8) % 3
    alone, together = Encoder(), Encoder()
    for encoder in (alone, together):
        encoder.integer(70_000, "before")
    for start, number, k in ((0, 61, tables[0]), (61, 4, tables[1]), (65, 35, tables[2])):
        for symbol in values[start : start + number]:
            alone.put(symbol.reshape(1), k, count(symbol.reshape(1), 3))
    monkeypatch.setattr(symbols, "PIECE", 7)
    together.put(values[:61], tables[0], count(values[:61], 3))
    together.put_runs(values[61:].numpy(), [4, 35], tables[1:])
    stored = together.finish()
    assert alone.finish() == stored
    decoder = Decoder(stored)
    assert decoder.integer("before") == 70_000
    assert torch.equal(decoder.take(61, tables[0])[0], values[:61])
    assert decoder.take_runs([4, 35], tables[1:]).tolist() == values[61:].tolist()
    decoder.finish()


def test_an_integer_that_returns_gets_cheaper() -> None:
    encoder = Encoder()
    costs = []
    for _ in range(20):
        before = encoder.bits
        encoder.integer(5, "a")
        costs.append(encoder.bits - before)
    # Bit length 3 of weights 33 17 11 9 … (sum 184): log2(184 / 9) = 4.35, and two bits below the leading one.
    assert costs[0] == pytest.approx(np.log2(184 / 9) + 2, abs=1e-4)
    assert costs[19] == pytest.approx(np.log2((184 + 19 * 32) / (9 + 19 * 32)) + 2, abs=1e-4)


def test_price_is_what_it_costs() -> None:
    encoder = Encoder()
    encoder.integer(300, "a")
    expected = encoder.price((77,), "a")
    before = encoder.bits
    encoder.integer(77, "a")
    assert encoder.bits - before == pytest.approx(expected)


def test_bits_are_minus_log2_p() -> None:
    # 3 symbols at 1/2, 1 at 1/4, 2 at 1/4.
    assert bits(np.array([3, 1, 2]), np.array([1 << 23, 1 << 22, 1 << 22])) == 3 + 2 + 4


def test_data_that_goes_on_is_refused() -> None:
    stored, _ = coded([1, 0, 1], table(np.array([1, 1])))
    decoder = Decoder(stored)
    decoder.take(2, table(np.array([1, 1])))
    with pytest.raises(ArtifactError, match="damaged"):
        decoder.finish()


def test_data_that_ends_early_is_left_at_once() -> None:
    k = table(np.array([1, 3, 4]))
    decoder = Decoder(Coded(b""))
    with pytest.raises(ArtifactError, match="damaged"):
        decoder.take(100, k)
