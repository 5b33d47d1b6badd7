"""Files as somebody would write them who knows the format and means ill: the project's own writer, told what to write.

Each function gives the bytes of one file whose checksum, sections and coding are right.
"""

from __future__ import annotations

from functools import cache
from unittest import mock

import numpy as np
import torch
from fuzz import closed, sealed

from psc_lightning.artifact import container, directory
from psc_lightning.artifact.ans import Coded, Encoder
from psc_lightning.artifact.codings import CODINGS, Plane, Proposal, diagonals, full, lines
from psc_lightning.artifact.codings.planes import Choice
from psc_lightning.artifact.container import varint
from psc_lightning.artifact.directory import Entry, Kind
from psc_lightning.symbols import zigzag

LINES, SPLIT, DIAGONALS, OCCUPIED = (
    next(i for i, one in enumerate(CODINGS) if one.name == name) for name in ("lines", "split", "diagonals", "occupied")
)


class Forge:
    """Collects entries, and what the symbols say of them."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.encoder = Encoder()

    def tensor(self, *shape: int, name: str = "", kind: Kind = Kind.SLOTS, dtype: torch.dtype = torch.float32) -> None:
        """One more in the table of contents."""
        self.entries.append(Entry(name or f"{len(self.entries)}", kind, dtype, shape))

    def integers(self, *values: int) -> None:
        """What a method stores."""
        for value in values:
            self.encoder.integer(zigzag(value), "integer")

    def constant(self, symbol: int, size: int) -> None:
        """A plane whose symbols are all known."""
        Choice(0.0, symbol, size - 1 - symbol).write(self.encoder)

    def start(self, size: int, code: int, *parameters: int) -> None:
        """A plane of all symbols of an alphabet in this coding; its content is to follow."""
        for value, context in ((0, "low"), (0, "high"), (code, "coding")):
            self.encoder.integer(value, context)
        for value in parameters:
            self.encoder.integer(value, CODINGS[code].name)

    def bits(self, code: int, bits: np.ndarray, grid: np.ndarray) -> None:
        """Bits of a matrix in a coding that the writer might not take."""
        Choice(0.0, 0, 0, code, CODINGS[code].name, proposal(code, bits, grid)).write(self.encoder)

    def file(self) -> bytes:
        """All of it."""
        return closed(self.entries, self.encoder.finish())


def proposal(code: int, bits: np.ndarray, grid: np.ndarray) -> Proposal:
    """What a coding would do, whether it promises anything or not."""
    plane = Plane(torch.from_numpy(bits.astype(np.uint8)), 2, grid)
    with (
        mock.patch.object(lines, "direction", return_value=0),
        mock.patch.object(diagonals, "promise", return_value=True),
        mock.patch.object(diagonals, "fit", return_value=diagonals.Formula(0, 0, 0, {})),
    ):
        (found,) = CODINGS[code].propose(plane, Encoder())
    return found


def masks(code: int, tensors: int, rows: int, columns: int = 1) -> bytes:
    """Tensors of which one mask each, a zero and then ones, is read line by line, or by diagonals."""
    forge, bits = Forge(), np.arange(rows * columns) > 0
    same = Choice(0.0, 0, 0, code, CODINGS[code].name, proposal(code, bits, full(rows, columns)))
    for _ in range(tensors):
        forge.tensor(rows, columns)
        forge.integers(0, 0, 1, 0, 1)  # layout, tying, mask, granularity, block
        same.write(forge.encoder)
        forge.integers(4, 0, 0)  # ternary, group, exponent
        forge.constant(60, 256)
        forge.constant(0, 256)
        forge.constant(1, 3)
    return forge.file()


@cache
def wide_splits(rows: int, columns: int, depth: int = 5) -> bytes:
    """One codebook tensor, split and split again, each bit of it by lines."""
    forge = Forge()
    forge.tensor(rows, columns)
    forge.integers(0, 0, 0, 6, 256, 0, 0)  # layout, tying, mask, codebook, k, group, exponent
    for _ in range(2):
        forge.constant(0, 256)
    number = rows * columns

    def split(size: int, deep: int, where: np.ndarray) -> None:
        half = size // 2
        forge.start(size, SPLIT, 1, half)
        grid = np.zeros(number, dtype=bool)
        grid[where] = True
        bits = np.arange(len(where)) % 2
        forge.bits(LINES, bits, grid.reshape(rows, columns))
        for part, its in ((where[bits == 0], half), (where[bits == 1], size - half)):
            if deep > 1 and its >= 3:
                split(its, deep - 1, part)
            else:
                forge.constant(0, its)

    split(256, depth, np.arange(number))
    return forge.file()


def codebook_tables(rows: int, columns: int) -> bytes:
    """256 centroids for each weight."""
    forge = Forge()
    forge.tensor(rows, columns)
    forge.integers(0, 0, 0, 6, 256, 2, 0)
    for _ in range(3):
        forge.constant(0, 256)
    return forge.file()


def scalars(number: int) -> bytes:
    """Numbers that share no name's last part, so that each is eight planes of one symbol."""
    forge = Forge()
    for i in range(number):
        forge.tensor(name=f"a{i}", kind=Kind.LEFTOVER, dtype=torch.float64)
        for _ in range(8):
            forge.constant(0, 256)
    return forge.file()


def single_entries(number: int) -> bytes:
    """Slot tensors of one entry."""
    forge = Forge()
    for _ in range(number):
        forge.tensor(1, 1)
        forge.integers(0, 0, 1, 0, 1)
        forge.constant(1, 2)
        forge.integers(4, 0, 0)
        forge.constant(60, 256)
        forge.constant(0, 256)
        forge.constant(1, 3)
    return forge.file()


def names(number: int) -> bytes:
    """A table of contents of very many short names, few bytes long: 1,000 of a module, the modules alike."""
    block = b"".join(b"\1" + f"n{i:x}".encode() + b"\n" for i in range(1000))
    whole = b"".join(b"\0" + f"{i:x}.".encode() + b"a\n" + block for i in range(number // 1000))
    count = len(range(number // 1000)) * 1001
    table = varint(count) + whole + bytes([Kind.LEFTOVER << 4]) * count + b"\1\0" * count
    return container.pack({directory.DEFLATED: directory._deflate(table, 0), 3: b"\1"})


def aliases(number: int, rows: int, columns: int) -> bytes:
    """One tensor under many names."""
    forge = Forge()
    forge.tensor(rows, columns, name="weight", kind=Kind.LEFTOVER)
    for _ in range(4):
        forge.constant(0, 256)
    for i in range(number):
        forge.entries.append(Entry(f"a{i}", Kind.ALIAS, torch.float32, (rows, columns), 0))
    return forge.file()


def unread(length: int) -> bytes:
    """Symbols that no tensor asks for."""
    return closed([], Coded(b"\1" * length))


def optional_sections(number: int) -> bytes:
    """Empty sections that a reader passes over."""
    return sealed(unread(1)[8:] + b"\xc8\0" * number)


def named(name: str) -> bytes:
    """A tensor of one zero of this name."""
    forge = Forge()
    forge.tensor(1, name=name, kind=Kind.LEFTOVER)
    for _ in range(4):
        forge.constant(0, 256)
    return forge.file()
