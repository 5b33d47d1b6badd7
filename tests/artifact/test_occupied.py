"""Coding 6: what is in the rows and columns that hold a 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from read_with_numpy import Ans

from psc_lightning.artifact.ans import Coded, Decoder, Encoder
from psc_lightning.artifact.codings import CODINGS, Plane
from psc_lightning.artifact.codings.planes import read
from psc_lightning.artifact.errors import ArtifactError
from psc_lightning.artifact.streams import SymbolReader, SymbolWriter

OCCUPIED = next(coding for coding in CODINGS if coding.name == "occupied")
NUMBER = next(code for code, coding in enumerate(CODINGS) if coding.name == "occupied")


def test_only_what_is_left_costs() -> None:
    """Half of the rows and of the columns are empty; the rest is noise, a bit each."""
    random = np.random.default_rng(0)
    bits = np.zeros((200, 300), np.uint8)
    rows, columns = random.permutation(200)[:100], random.permutation(300)[:150]
    bits[np.ix_(rows, columns)] = random.random((100, 150)) < 0.5
    writer = SymbolWriter()
    writer.symbols(torch.from_numpy(bits.reshape(-1)).int(), 2, torch.ones(200, 300, dtype=torch.bool))
    assert writer.streams[0].coding == "occupied"
    assert writer.bits < 100 * 150 + 200 + 300 + 60
    data = writer.finish()
    reader = SymbolReader(data)
    assert reader.symbols(60_000, 2, torch.ones(200, 300, dtype=torch.bool)).tolist() == bits.reshape(-1).tolist()
    reader.finish()
    assert reader.bits == pytest.approx(writer.bits)
    assert Ans(data.stack, data.plain).array(60_000, 2, np.ones((200, 300), bool)) == bits.reshape(-1).tolist()


@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 99), st.floats(0.1, 1), st.floats(0, 0.3))
@settings(max_examples=60, deadline=None)
def test_what_is_written_returns(rows: int, columns: int, seed: int, marked: float, share: float) -> None:
    random = np.random.default_rng(seed)
    grid = random.random((rows, columns)) < marked
    bits = (random.random((rows, columns)) < share) & grid
    plane = Plane(torch.from_numpy(bits[grid].view(np.uint8)), 2, grid)
    proposals = list(OCCUPIED.propose(plane, Encoder())) if bits.any() else []
    assert bool(proposals) == (bits.any() and not (bits.any(0).all() and bits.any(1).all()))
    for proposal in proposals:
        encoder = Encoder()
        proposal.write(encoder)
        data = encoder.finish()
        decoder = Decoder(data)
        assert OCCUPIED.read(decoder, int(grid.sum()), 2, (), grid).tolist() == bits[grid].tolist()
        decoder.finish()
        assert Ans(data.stack, data.plain).occupied(int(grid.sum()), 2, grid).tolist() == bits[grid].tolist()


def test_it_does_not_hold_itself() -> None:
    """However deep: a grid each would fill the memory."""
    encoder = Encoder()
    for context in ("low", "high", "coding"):  # the entries that are left are coded so again
        encoder.integer({"coding": NUMBER}.get(context, 0), context)
    for _ in range(2):  # all rows and all columns
        encoder.integer(1, "low")
        encoder.integer(0, "high")
    for context in ("low", "high", "coding"):
        encoder.integer({"coding": NUMBER}.get(context, 0), context)
    with pytest.raises(ArtifactError, match=f"below {NUMBER} .coding., found {NUMBER}"):
        read(Decoder(encoder.finish()), 20, 2, np.ones((4, 5), bool), CODINGS)


def test_symbols_without_places_are_refused() -> None:
    for size, grid in ((2, None), (3, np.ones((4, 5), bool))):
        with pytest.raises(ArtifactError, match="found others"):
            OCCUPIED.read(Decoder(Coded(b"\1", b"")), 20, size, (), grid)
