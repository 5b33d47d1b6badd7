"""The outer shell of a .psc file: magic, version, checksum, sections.

    3 bytes   "PSC"
    1 byte    version, 1
    4 bytes   CRC-32 of everything after it, little-endian
    sections  until the end of the file, each: tag (1 byte), length (varint), that many bytes

A varint is seven bits a byte, low bits first, the high bit set on all but the last byte. Tags from 128 on are optional:
a reader skips those it does not know and refuses other unknown ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

from psc_lightning.artifact.errors import ArtifactError
from psc_lightning.files import OversizeError, Source, read_bytes

__all__ = ["MAGIC", "VERSION", "Cursor", "pack", "read", "unpack", "varint"]

MAGIC = b"PSC"
VERSION = 1
_OPTIONAL = 128
_HEAD = len(MAGIC) + 1 + 4


def varint(value: int) -> bytes:
    """One non-negative integer in as few bytes as it needs.

    >>> varint(5), varint(300)
    (b'\\x05', b'\\xac\\x02')
    """
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


class Cursor:
    """Reads bytes from left to right and never past the end."""

    def __init__(self, data: bytes, what: str, start: int = 0) -> None:
        self._data = data
        self._at = start
        self._what = what

    @property
    def done(self) -> bool:
        """Nothing is left."""
        return self._at == len(self._data)

    def take(self, number: int) -> bytes:
        """The next `number` bytes.

        Raises:
            ArtifactError: so many are not there.
        """
        left = len(self._data) - self._at
        if number > left:
            raise ArtifactError(f"{self._what}: expected {number} more bytes, found {left}: {_ADVICE}")
        self._at += number
        return self._data[self._at - number : self._at]

    def line(self) -> bytes:
        """Everything up to the next newline, which is passed over.

        Raises:
            ArtifactError: there is none.
        """
        end = self._data.find(b"\n", self._at)
        if end < 0:
            raise ArtifactError(f"{self._what}: expected a newline, found none: {_ADVICE}")
        return self.take(end + 1 - self._at)[:-1]

    def varint(self) -> int:
        """The next varint (below 2^63).

        Raises:
            ArtifactError: it is longer, or the data ends.
        """
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ArtifactError(f"{self._what}: expected an integer of at most 9 bytes, found a longer one: {_ADVICE}")


def pack(sections: Mapping[int, bytes]) -> bytes:
    """Put sections (tag: bytes) into the bytes of a file.

    >>> pack({1: b"ab"}).hex(" ")
    '50 53 43 01 85 36 26 45 01 02 61 62'
    """
    parts = [part for tag, data in sections.items() for part in (bytes([tag]), varint(len(data)), data)]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return b"".join((MAGIC, bytes([VERSION]), checksum.to_bytes(4, "little"), *parts))


def unpack(data: bytes, known: frozenset[int]) -> dict[int, bytes]:
    """Take the bytes of a file apart: its sections, unknown optional ones left out.

    Args:
        data: the whole file.
        known: the tags that the caller understands.

    Raises:
        ArtifactError: not a .psc file, a newer version, damaged, or an unknown section.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise ArtifactError(
            f"expected a .psc file, which starts with {MAGIC!r}, found {data[: len(MAGIC)]!r}: "
            "check the path; files are written by psc_lightning.save"
        )
    if len(data) < _HEAD:
        raise ArtifactError(f"expected at least {_HEAD} bytes, found {len(data)}: {_ADVICE}")
    version = data[len(MAGIC)]
    if version != VERSION:
        raise ArtifactError(
            f"expected format version {VERSION}, found {version}: update psc_lightning to read this file"
        )
    stated, found = int.from_bytes(data[_HEAD - 4 : _HEAD], "little"), zlib.crc32(memoryview(data)[_HEAD:])
    if stated != found:
        raise ArtifactError(f"expected checksum {stated:08x}, found {found:08x}: {_ADVICE}")
    sections: dict[int, bytes] = {}
    tags: set[int] = set()
    cursor = Cursor(data, "sections", _HEAD)
    while not cursor.done:
        tag = cursor.take(1)[0]
        content = cursor.take(cursor.varint())
        if tag in tags:  # of those that are passed over, too: there may be millions
            raise ArtifactError(f"expected one section {tag}, found two: {_ADVICE}")
        tags.add(tag)
        if tag in known:
            sections[tag] = content
        elif tag < _OPTIONAL:
            raise ArtifactError(
                f"expected sections {sorted(known)}, found section {tag}: update psc_lightning to read this file"
            )
    return sections


def read(source: Source, max_bytes: int) -> bytes:
    """The bytes of a file, unless there are more than `max_bytes`.

    Raises:
        ArtifactError: it is longer.
        OSError, TypeError, ValueError: it cannot be opened; see `files.read_bytes`.
    """
    try:
        return read_bytes(source, max_bytes)
    except OversizeError as error:
        raise ArtifactError(
            f"expected a file of at most max_bytes = {max_bytes} bytes, found {error}: {_OVERSIZE}"
        ) from None


_ADVICE = "the file is truncated or damaged; get a fresh copy, or save the model again"
_OVERSIZE = "pass a larger max_bytes if you trust it"
