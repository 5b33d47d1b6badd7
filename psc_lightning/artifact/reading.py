"""The bytes of a .psc file to tensors, within what its allowance lets it take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from psc_lightning.artifact import container, directory, leftovers
from psc_lightning.artifact.allowance import TENSOR, Allowance
from psc_lightning.artifact.ans import Coded
from psc_lightning.artifact.directory import Entry, Kind
from psc_lightning.artifact.errors import ADVICE, ArtifactError
from psc_lightning.artifact.model.snapshots import finite, plain_state
from psc_lightning.artifact.streams import Stream, SymbolReader
from psc_lightning.files import Source
from psc_lightning.slots.stored import Stored, decode
from psc_lightning.slots.tape import Item, Recorder

__all__ = [
    "KNOWN",
    "PARTIAL",
    "PLAIN",
    "SLACK",
    "SYMBOLS",
    "Content",
    "declared",
    "decoded",
    "opened",
    "read",
    "read_for",
    "share",
]

SYMBOLS, PLAIN = 3, 5
PARTIAL = 128  # empty; says that a model has more than the file holds
_CONTENTS = (directory.PLAIN, directory.DEFLATED, directory.NAMELESS)
KNOWN = frozenset({*_CONTENTS, SYMBOLS, PLAIN, PARTIAL})
SLACK = 1 << 20  # a file may be this much longer than the tensors in it: names, and weights that do not compress
_SHOWN = 6  # differences that a message names


@dataclass(frozen=True)
class Content:
    """A file, read."""

    entries: list[Entry]
    tensors: dict[str, Tensor]
    stored: dict[str, Stored]
    tapes: dict[str, list[Item]]
    bits: list[float]
    streams: list[Stream]


def opened(
    data: bytes, max_bytes: int | None = None, model: Sequence[Entry] | None = None
) -> tuple[list[Entry], Coded, bool]:
    """The table of contents, the symbols, and whether the file is a part of its model.

    Args:
        data: the whole file.
        max_bytes: that tensors may take; None: not looked at.
        model: what the reader's model has, for a file without names.

    Raises:
        ArtifactError: it is damaged, or of another model.
    """
    sections = container.unpack(data, KNOWN)
    contents = [tag for tag in _CONTENTS if tag in sections]
    if len(contents) != 1 or SYMBOLS not in sections:
        raise ArtifactError(
            f"expected a table of contents and the symbols, found sections {sorted(sections)}: {ADVICE}"
        )
    entries = directory.decode(contents[0], sections[contents[0]], model, max_bytes)
    return entries, Coded(sections[SYMBOLS], sections.get(PLAIN, b"")), PARTIAL in sections


def read(path: Source, max_bytes: int, keep: bool = False) -> Content:
    """All of a file.

    Args:
        path: see `load`.
        max_bytes: that its tensors may take.
        keep: also what is kept of compressed tensors: how they are stored.

    Raises:
        ArtifactError: as `load`.
    """
    entries, coded, _ = opened(container.read(path, max_bytes + SLACK), max_bytes)
    return decoded(entries, coded, max_bytes, keep)


def read_for(model: nn.Module, path: Source, max_bytes: int | None = None, keep: bool = False) -> Content:
    """Read a file that must go into a model, which says what one without names leaves out.

    Raises:
        ArtifactError: as `load_into`.
    """
    state = plain_state(model)
    expected = {name: tuple(value.shape) for name, value in state.items()}
    # The file's types may be wider than the model's, but no more than eight bytes an entry.
    limit = 8 * sum(map(room, expected.values()))
    limit = limit if max_bytes is None else min(limit, max_bytes)
    like = [Entry(name, Kind.SLOTS, value.dtype, tuple(value.shape)) for name, value in state.items()]
    entries, coded, part = opened(container.read(path, limit + SLACK + TENSOR * len(like)), limit, like)
    found = {entry.name: entry.shape for entry in entries}
    if part:
        expected = {name: shape for name, shape in expected.items() if name in found}
    _compare(found, expected)
    return decoded(entries, coded, limit, keep)


def decoded(entries: Sequence[Entry], coded: Coded, max_bytes: int, keep: bool = False) -> Content:
    """The tensors of these entries.

    Raises:
        ArtifactError: they would be larger than `max_bytes`, take more than the file's allowance, or are damaged.
    """
    needed = declared(entries)
    if needed > max_bytes:
        raise ArtifactError(
            f"expected tensors of at most max_bytes = {max_bytes} bytes, found {needed}: "
            "pass a larger max_bytes if you trust the file"
        )
    reader = SymbolReader(coded, Allowance(needed, len(entries), len(coded)))
    tensors: dict[int, Tensor] = {}
    stored: dict[str, Stored] = {}
    tapes: dict[str, list[Item]] = {}
    bits = [0.0] * len(entries)
    for group in leftovers.groups(entries):
        before = reader.bits
        entry = entries[group[0]]
        with _refusing(entry.name):
            if entry.kind is Kind.SLOTS:
                recorder = Recorder(reader)
                one = decode(recorder if keep else reader, entry.shape, entry.dtype)
                tensors[group[0]] = one.weight
                if keep:
                    stored[entry.name], tapes[entry.name] = one, recorder.items
            else:
                parts = leftovers.decode(reader, [entries[i] for i in group])
                tensors.update(zip(group, parts, strict=True))
        for i in group:
            if not finite(tensors[i]):
                raise ArtifactError(f"{entries[i].name}: expected finite numbers, found NaN or infinity: {ADVICE}")
        share(bits, entries, group, reader.bits - before)
    reader.finish()
    named = {entry.name: tensors[i if entry.alias is None else entry.alias] for i, entry in enumerate(entries)}
    return Content(list(entries), named, stored, tapes, bits, reader.streams)


def declared(entries: Sequence[Entry]) -> int:
    """Bytes that a table of contents says its tensors take."""
    return sum(room(entry.shape) * entry.dtype.itemsize for entry in entries if entry.alias is None)


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Whatever torch says of numbers that were each in its range and make no tensor together is damage.

    Raises:
        MemoryError: the machine has none left, which torch says by a RuntimeError, too.
    """
    try:
        yield
    except ArtifactError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
        if "allocate" in str(error):
            raise MemoryError(f"{name}: {error}") from error
        raise ArtifactError(f"{name}: {error}") from error


def room(shape: Sequence[int]) -> int:
    """Number of entries, axes of length 0 taken as 1: a shape must be small even where it holds nothing."""
    return math.prod(max(length, 1) for length in shape)


def share(bits: list[float], entries: Sequence[Entry], group: Sequence[int], total: float) -> None:
    """Give each tensor of a group its share of their bits, by its entries."""
    entries_in_all = sum(entries[i].numel for i in group)
    for i in group:
        bits[i] = total * entries[i].numel / entries_in_all if entries_in_all else total / len(group)


def _compare(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    differences = [f"{name} is missing in the file" for name in expected if name not in found]
    differences += [f"{name} is not in the model" for name in found if name not in expected]
    differences += [
        f"{name} has shape {list(found[name])} in the file, {list(shape)} in the model"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if differences:
        shown = "; ".join(differences[:_SHOWN]) + f"; and {len(differences) - _SHOWN} more" * (
            len(differences) > _SHOWN
        )
        raise ArtifactError(
            f"expected the tensors of the model, found {len(differences)} differences: {shown}: "
            "build the model that was saved"
        )
