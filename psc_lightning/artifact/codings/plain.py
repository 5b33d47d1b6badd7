"""Equally likely symbols as they are, beside the coder: nothing is won by coding them, and copying is read at once."""

from __future__ import annotations

from collections.abc import Iterator

from psc_lightning.artifact.ans import Decoder, Encoder, Packed
from psc_lightning.artifact.codings.coding import Grid, Plane, Proposal
from psc_lightning.artifact.errors import ADVICE, ArtifactError

__all__ = ["Plain"]

_LEAST = 1 << 16  # bits: of fewer, a section and the coding's number would be more than the share below,
_SHARE = 1 / 1000  # of its bits, which a way that is read twenty times slower must save


class Plain:
    """log2(size) bits a symbol, packed, in a section of their own; for sizes that are powers of two.

    Stored: no parameters. The first bit of a symbol is its highest; a plane's last byte is filled up with zeros. The
    writer takes it for 2^16 bits or more, unless another way saves more than a thousandth of them.
    """

    name = "plain"
    limits: tuple[int, ...] = ()

    def propose(self, plane: Plane, encoder: Encoder) -> Iterator[Proposal]:
        """Offer the one way, where there are enough symbols."""
        width = _width(plane.size)
        bits = len(plane.symbols) * (width or 0)
        if width is None or bits < _LEAST:
            return

        def write(encoder: Encoder) -> None:
            encoder.put_plain(plane.symbols, width)

        yield Proposal(bits, (), write, toll=-_SHARE * bits)

    def read(self, decoder: Decoder, number: int, size: int, parameters: tuple[int, ...], grid: Grid | None) -> Packed:
        """Read `number` symbols."""
        width = _width(size)
        if width is None:
            raise ArtifactError(f"expected plain symbols below a power of two, found them below {size}: {ADVICE}")
        return decoder.take_plain(number, width)


def _width(size: int) -> int | None:
    """How many bits tell `size` symbols apart, if that is a whole number."""
    return None if size & (size - 1) else size.bit_length() - 1
