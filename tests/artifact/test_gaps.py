"""Coding 7: how far apart rare bits are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from read_with_numpy import Ans

from psc_lightning.artifact.ans import Decoder, Encoder
from psc_lightning.artifact.codings import Plane
from psc_lightning.artifact.codings.gaps import Gaps, geometric
from psc_lightning.artifact.errors import ArtifactError
from psc_lightning.artifact.streams import SymbolReader, SymbolWriter


def bits(number: int, places: list[int], rare: int = 1) -> torch.Tensor:
    out = torch.full((number,), 1 - rare, dtype=torch.uint8)
    out[torch.tensor(places)] = rare
    return out


def noise(number: int, share: float) -> torch.Tensor:
    return (torch.rand(number, generator=torch.Generator().manual_seed(0)) < share).to(torch.uint8)


def test_symbols_by_hand() -> None:
    """Ones at 2, 3 and 600: 2 zeros, none, 596 = 255 + 255 + 86."""
    data = bits(1 << 16, [2, 3, 600])
    (proposal,) = Gaps().propose(Plane(data, 2), Encoder())
    assert proposal.parameters == (1, 3, 5)
    encoder = Encoder()
    proposal.write(encoder)
    symbols, _ = Decoder(encoder.finish()).take(5, geometric(3))
    assert symbols.tolist() == [2, 0, 255, 255, 86]


def test_it_costs_what_the_bits_cost_and_is_taken() -> None:
    number = 1 << 20
    for share in (0.002, 0.02, 0.06):
        data = noise(number, share)
        p = float(data.double().mean())
        entropy = -number * (p * np.log2(p) + (1 - p) * np.log2(1 - p))
        (proposal,) = Gaps().propose(Plane(data, 2), Encoder())
        assert proposal.bits == pytest.approx(entropy, rel=1e-3)
        writer = SymbolWriter()
        writer.symbols(data, 2)
        assert writer.streams[0].coding == "gaps"


def test_it_is_offered_where_a_bit_is_rare_among_many() -> None:
    def offers(data: torch.Tensor, size: int = 2) -> bool:
        return any(True for _ in Gaps().propose(Plane(data, size), Encoder()))

    assert offers(bits(1 << 16, [5]))
    assert not offers(bits((1 << 16) - 1, [5]))
    assert offers(bits(1 << 16, list(range(1 << 12))))
    assert not offers(bits(1 << 16, list(range((1 << 12) + 1))))
    assert not offers(bits(1 << 16, [5]), size=3)


@given(
    st.integers(1 << 16, 1 << 17),
    st.sets(st.integers(0, (1 << 16) - 1), min_size=1, max_size=300),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_what_is_written_returns_to_both_readers(number: int, places: set[int], rare: bool, last: bool) -> None:
    data = bits(number, [*places, number - 1] if last else list(places), int(rare))
    (proposal,) = Gaps().propose(Plane(data, 2), Encoder())
    encoder = Encoder()
    for parameter in proposal.parameters:
        encoder.integer(parameter, "gaps")
    proposal.write(encoder)
    assert proposal.parameters[0] == int(rare)
    stored = encoder.finish()
    decoder = Decoder(stored)
    parameters = tuple(decoder.integer("gaps") for _ in Gaps.limits)
    assert torch.equal(Gaps().read(decoder, number, 2, parameters, None), data)
    decoder.finish()
    assert Ans(stored.stack).gaps(number, 2, None).tolist() == data.tolist()


def test_a_whole_array_returns_to_both_readers() -> None:
    data = noise(1 << 19, 0.03)
    writer = SymbolWriter()
    writer.symbols(1 - data, 2)
    assert writer.streams[0].coding == "gaps"
    stored = writer.finish()
    reader = SymbolReader(stored)
    assert torch.equal(reader.symbols(1 << 19, 2), 1 - data)
    reader.finish()
    assert reader.streams == writer.streams
    assert Ans(stored.stack).array(1 << 19, 2) == (1 - data).tolist()


def test_distances_that_lead_past_the_end_are_refused() -> None:
    encoder = Encoder()
    gaps = torch.tensor([50, 255, 7], dtype=torch.uint8)
    encoder.put(gaps, geometric(100), np.bincount(gaps, minlength=256))
    stored = encoder.finish()
    exact = Gaps().read(Decoder(stored), 51 + 255 + 8, 2, (1, 100, 3), None)
    assert exact.nonzero().flatten().tolist() == [50, 51 + 255 + 7]
    with pytest.raises(ArtifactError, match="expected 313 bits, found more"):
        Gaps().read(Decoder(stored), 51 + 255 + 7, 2, (1, 100, 3), None)
    for number, size, parameters in ((2, 2, (1, 100, 3)), (400, 3, (1, 100, 3)), (400, 2, (1, 0, 3))):
        with pytest.raises(ArtifactError, match="distances between bits"):
            Gaps().read(Decoder(stored), number, size, parameters, None)
