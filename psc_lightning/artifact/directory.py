"""The table of contents of a .psc file: names, kinds, types and shapes of its tensors.

    varint    how many tensors
    names     each: how many leading parts (between dots) it shares with the name before it (varint), the rest, newline
    bytes     each tensor's kind · 16 + type
    shapes    each: varint for the number of axes, one varint an axis; an alias: one varint, the tensor it repeats

Stored as it is (section 1) or raw-deflated with a preset dictionary, the names below in the same notation (section 2),
whichever is shorter. Where the reader has the model (section 4), only:

    4 bytes   CRC-32 of what section 1 would say with all kinds 0 and no aliases, little-endian
    bytes     kinds, two a byte, the first in the low half
    varints   each alias: the tensor it repeats
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import torch

from psc_lightning.artifact.allowance import most_tensors
from psc_lightning.artifact.container import Cursor, varint
from psc_lightning.artifact.errors import ADVICE, ArtifactError, NamelessError

__all__ = [
    "DEFLATED",
    "DTYPES",
    "EXTRA_STATE",
    "MOST_AXES",
    "NAMELESS",
    "PLAIN",
    "Entry",
    "Kind",
    "decode",
    "encode",
    "encode_nameless",
]

PLAIN, DEFLATED, NAMELESS = 1, 2, 4  # 3 and 5 are the symbols

# The position is the number in the file.
DTYPES: tuple[torch.dtype, ...] = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)
MOST_AXES = 32
_INFLATED = 1 << 24
_LONGEST = 1 << 12  # characters of one name
_ALL_NAMES = 1 << 24  # characters of all names
#: the last part of a name under which a module's own bytes would come, which many modules unpickle
EXTRA_STATE = "_extra_state"
_SHOWN = 60  # characters of a name that a message shows


class Kind(IntEnum):
    """How a tensor is stored."""

    SLOTS = 0
    LEFTOVER = 1
    HALF = 2  # a leftover, rounded to float16
    ALIAS = 3
    LOG = 4  # a leftover, rounded to 8 bits on a logarithmic grid


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        name: its key in the plain state dict.
        kind: how it is stored.
        dtype: its type after reading.
        shape: its shape after reading.
        alias: for `Kind.ALIAS`, which earlier entry it repeats.
    """

    name: str
    kind: Kind
    dtype: torch.dtype
    shape: tuple[int, ...]
    alias: int | None = None

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.numel * self.dtype.itemsize


def encode(entries: Sequence[Entry]) -> tuple[int, bytes]:
    """A section: its tag and its content.

    Raises:
        ValueError: a name that cannot be stored.
    """
    out = _plain(entries)
    # Short texts go better with fixed Huffman codes, long ones with their own.
    packed = min((_deflate(out, strategy) for strategy in (zlib.Z_FIXED, zlib.Z_DEFAULT_STRATEGY)), key=len)
    # The names of very many tensors may be so alike that a reader would not believe it.
    packs = len(packed) < len(out) <= _INFLATED and len(entries) <= most_tensors(len(packed))
    return (DEFLATED, packed) if packs else (PLAIN, out)


def encode_nameless(entries: Sequence[Entry]) -> tuple[int, bytes]:
    """A section for readers who have the model: its tag and its content.

    Raises:
        ValueError: a name that cannot be stored.
    """
    kinds = [int(entry.kind) for entry in entries] + [0]
    out = _fingerprint(entries) + bytes(low | high << 4 for low, high in zip(kinds[:-1:2], kinds[1::2], strict=True))
    return NAMELESS, out + b"".join(varint(entry.alias) for entry in entries if entry.alias is not None)


def _fingerprint(entries: Sequence[Entry]) -> bytes:
    """Of names, types and shapes."""
    same = [replace(entry, kind=Kind.SLOTS, alias=None) for entry in entries]
    return zlib.crc32(_plain(same)).to_bytes(4, "little")


def _plain(entries: Sequence[Entry]) -> bytes:
    if sum(len(entry.name) for entry in entries) > _ALL_NAMES:
        raise ValueError(f"the tensors' names must not have more than {_ALL_NAMES} characters in all: shorten them")
    out = varint(len(entries)) + _names([entry.name for entry in entries])
    out += bytes(entry.kind << 4 | DTYPES.index(entry.dtype) for entry in entries)
    for entry in entries:
        if entry.alias is not None:
            out += varint(entry.alias)
        else:
            out += b"".join(map(varint, (len(entry.shape), *entry.shape)))
    return out


def _decode_nameless(data: bytes, model: Sequence[Entry] | None) -> list[Entry]:
    if model is None:
        raise NamelessError(
            "expected names and shapes, found a file that was saved without (names=False): "
            "psc_lightning.load_into(model, path) reads it"
        )
    cursor = Cursor(data, "table of contents")
    if cursor.take(4) != _fingerprint(model):
        raise ArtifactError(
            "expected the model that was saved, found one of other names, types or shapes (the file, saved with names=False, "
            "cannot say which): build the model that was saved"
        )
    codes = [kind for byte in cursor.take((len(model) + 1) // 2) for kind in (byte & 15, byte >> 4)]
    entries: list[Entry] = []
    for entry, code in zip(model, codes, strict=False):  # a last half byte may be left
        if code >= len(Kind):
            raise _damaged("a known kind of tensor", code)
        alias = None
        if code == Kind.ALIAS:
            alias = _earlier(cursor, entry.dtype, entries)
            if entries[alias].shape != entry.shape:
                raise _damaged("an alias of the same shape", alias)
        entries.append(replace(entry, kind=Kind(code), alias=alias))
    if not cursor.done or any(codes[len(model) :]):
        raise _damaged("the end", "more bytes")
    return _checked(entries)


def decode(tag: int, data: bytes, model: Sequence[Entry] | None = None, max_bytes: int | None = None) -> list[Entry]:
    """The entries of a section.

    Args:
        tag: which.
        data: its content.
        model: names, types and shapes as the reader's model has them.
        max_bytes: what all tensors may take; None: not looked at.

    Raises:
        ArtifactError: it is damaged, or needs another model.
    """
    if tag == NAMELESS:
        return _decode_nameless(data, model)
    cursor = Cursor(_inflate(data) if tag == DEFLATED else data, "table of contents")
    number = cursor.varint()
    if number > (most := max(most_tensors(len(data), max_bytes), len(model or ()))):
        raise _damaged(f"at most {most} tensors for a table of this length and max_bytes", number)
    names: dict[str, None] = {}
    before: list[str] = []
    room = _ALL_NAMES
    while len(names) < number:
        shared, rest = cursor.varint(), cursor.line()
        if shared > len(before):
            raise _damaged(f"a name that shares at most {len(before)} parts with the one before", shared)
        try:
            name = ".".join([*before[:shared], rest.decode()])
        except UnicodeDecodeError as error:
            raise _damaged("names in UTF-8", rest[:_SHOWN]) from error
        # Few bytes may repeat a name, or the parts of a long one, without end: seen here, not when memory is gone.
        room -= len(name)
        if name in names or room < 0 or len(name) > _LONGEST:
            raise _damaged(f"{number} different names of at most {_LONGEST} characters", name[:_SHOWN])
        names[name] = None
        before = name.split(".")
    codes = cursor.take(number)
    entries: list[Entry] = []
    for name, code in zip(names, codes, strict=True):
        kind, dtype = code >> 4, code & 15
        if kind >= len(Kind) or dtype >= len(DTYPES):
            raise _damaged("a known kind and type of tensor", code)
        entries.append(_shape(cursor, name, Kind(kind), DTYPES[dtype], entries))
    if not cursor.done:
        raise _damaged("the end", "more bytes")
    return _checked(entries)


def _checked(entries: list[Entry]) -> list[Entry]:
    for entry in entries:
        if entry.name.rpartition(".")[2] == EXTRA_STATE:
            raise _damaged("tensors of a model", f"{entry.name[-_SHOWN:]}, which modules unpickle")
        if entry.kind in (Kind.LEFTOVER, Kind.ALIAS):
            continue
        if not entry.dtype.is_floating_point or (entry.kind is Kind.HALF and entry.dtype == torch.float16):
            raise _damaged(
                f"{entry.name[:_SHOWN]} of {entry.dtype} as it is", f"it as {entry.kind.name}, as no writer stores it"
            )
    return entries


def _shape(cursor: Cursor, name: str, kind: Kind, dtype: torch.dtype, before: Sequence[Entry]) -> Entry:
    if kind is Kind.ALIAS:
        index = _earlier(cursor, dtype, before)
        return Entry(name, kind, dtype, before[index].shape, index)
    axes = cursor.varint()
    if axes > MOST_AXES:
        raise _damaged(f"at most {MOST_AXES} axes", axes)
    return Entry(name, kind, dtype, tuple(cursor.varint() for _ in range(axes)))


def _earlier(cursor: Cursor, dtype: torch.dtype, before: Sequence[Entry]) -> int:
    index = cursor.varint()
    if index >= len(before) or before[index].alias is not None or before[index].dtype != dtype:
        raise _damaged("an alias of an earlier tensor", index)
    return index


def _names(names: Iterable[str]) -> bytes:
    out = b""
    before: list[str] = []
    for name in names:
        if "\n" in name or len(name) > _LONGEST or (not name.isascii() and _unpaired(name)):
            raise ValueError(
                f"a tensor's name must not hold a newline, half a surrogate pair, nor more than {_LONGEST} characters, got "
                f"{name[:_SHOWN]!r}: rename the module"
            )
        parts = name.split(".")
        shared = 0
        while shared < min(len(parts) - 1, len(before)) and parts[shared] == before[shared]:
            shared += 1
        out += varint(shared) + ".".join(parts[shared:]).encode() + b"\n"
        before = parts
    return out


def _unpaired(name: str) -> bool:
    """Whether a name is no Unicode that can be written."""
    return any("\ud800" <= character <= "\udfff" for character in name)


def _deflate(data: bytes, strategy: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy, _DICTIONARY)
    return packer.compress(data) + packer.flush()


def _inflate(data: bytes) -> bytes:
    unpacker = zlib.decompressobj(-15, _DICTIONARY)
    try:
        out = unpacker.decompress(data, _INFLATED)
    except zlib.error as error:
        raise _damaged("deflated data", str(error)) from error
    if not unpacker.eof or unpacker.unused_data:
        raise _damaged(f"deflated data of at most {_INFLATED} bytes", "more, or an open end")
    return out


def _damaged(expected: object, found: object) -> ArtifactError:
    return ArtifactError(f"table of contents: expected {expected}, found {found}: {ADVICE}")


_NORM = "weight bias running_mean running_var num_batches_tracked"
# Names that models often have, the most common last (deflate prefers what is near). Part of the format: never changed.
_DICTIONARY = _names(
    f"{module}.{leaf}"
    for module, leaves in (
        ("encoder.layers.0.self_attn", "in_proj_weight in_proj_bias out_proj.weight out_proj.bias"),
        ("encoder.layers.0.linear1", "weight bias"),
        ("encoder.layers.0.norm1", "weight bias"),
        ("lstm", "weight_ih_l0 weight_hh_l0 bias_ih_l0 bias_hh_l0"),
        ("embeddings.word_embeddings", "weight"),
        ("embeddings.position_embeddings", "weight"),
        ("embeddings.token_type_embeddings", "weight"),
        ("embeddings.LayerNorm", "weight bias"),
        ("encoder.layer.0.attention.self.query", "weight bias"),
        ("encoder.layer.0.attention.self.key", "weight bias"),
        ("encoder.layer.0.attention.self.value", "weight bias"),
        ("encoder.layer.0.attention.output.dense", "weight bias"),
        ("encoder.layer.0.attention.output.LayerNorm", "weight bias"),
        ("encoder.layer.0.intermediate.dense", "weight bias"),
        ("encoder.layer.0.output.dense", "weight bias"),
        ("encoder.layer.0.output.LayerNorm", "weight bias"),
        ("pooler.dense", "weight bias"),
        ("model.features.0", "weight bias"),
        ("classifier", "weight bias"),
        ("head", "weight bias"),
        ("linear", "weight bias"),
        ("bn1", _NORM),
        ("layer1.0.downsample.0", "weight"),
        ("layer1.0.conv1", "weight bias"),
        ("layer1.0.bn1", _NORM),
        ("layer1.0.conv2", "weight"),
        ("layer1.0.bn2", _NORM),
        ("0", "weight bias"),
        ("2", "weight bias"),
        ("conv1", "weight bias"),
        ("conv2", "weight bias"),
        ("fc1", "weight bias"),
        ("fc2", "weight bias"),
        ("fc3", "weight bias"),
    )
    for leaf in leaves.split()
)
