"""The entropy coder: integer probability tables in front of constriction's ANS stack.

Everything a file stores goes through one `Encoder` and comes back out of one `Decoder`, so the coder's overhead is a
few bytes per file; what is equally likely may go past the stack, packed. A *table* is an int64 array k of at most 256
entries, each at least 1, with sum 2^24: symbol s costs exactly -log2(k[s] / 2^24) bits. Reading needs no floating point:
constriction's `perfect=True` reproduces such a table exactly (there is a test with an independent decoder); the sums of
bits below serve the writer's choices and the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import constriction
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from psc_lightning.artifact.allowance import Allowance
from psc_lightning.artifact.errors import ADVICE, ArtifactError
from psc_lightning.symbols import look_up, pieces

__all__ = ["PRECISION", "TOTAL", "Coded", "Decoder", "Encoder", "Nesting", "Packed", "bits", "count", "table"]

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

PRECISION = 24
TOTAL = 1 << PRECISION

# Bit lengths 0 … 64 of an integer after zigzag, and how likely each is before the file has said anything.
CLASSES = 65
_FRESH = np.array([1 + 32 // (c + 1) for c in range(CLASSES)], dtype=np.int64)
_LEARN = 32  # what one integer seen adds to the weight of its class
_READY = 1024  # models
_BLOCK = 1 << 18  # plain symbols packed at a time: they fill whole bytes, and stay in the processor's cache
_CHUNK = 16  # bits below the leading one, coded at most so many at a time

_DAMAGED = f"the entropy-coded data does not end where the last tensor ends: {ADVICE}"


def table(weights: Ints) -> Ints:
    """Turn positive integer weights (last axis: symbols; sum below 2^39) into tables with sum 2^24.

    k = 1 + floor(w · (2^24 - K) / sum(w)); what is left over goes to the first largest weight.

    >>> table(np.array([1, 2, 1])).tolist()
    [4194304, 8388608, 4194304]
    >>> table(np.array([1, 1, 1])).tolist()
    [5592406, 5592405, 5592405]
    """
    rows = weights.reshape(-1, weights.shape[-1])
    k: Ints = 1 + rows * (TOTAL - rows.shape[1]) // rows.sum(1, keepdims=True)
    k[np.arange(len(k)), rows.argmax(1)] += TOTAL - k.sum(1)
    return k.reshape(weights.shape)


def count(symbols: Tensor, size: int) -> Ints:
    """Histogram of 1-D symbols below `size`."""
    if size == 2:  # twenty times as fast
        ones = np.count_nonzero(symbols.numpy())
        return np.array([len(symbols) - ones, ones])
    histogram: Ints = torch.bincount(symbols, minlength=size).numpy()
    return histogram


def bits(histogram: Ints, tables: Ints) -> float:
    """Exact cost of symbols with this histogram under these tables: the sum of -log2(k / 2^24).

    >>> bits(np.array([2, 1, 0]), np.array([4194304, 8388608, 4194304]))
    5.0
    """
    return float((histogram * (PRECISION - np.log2(tables))).sum())


@dataclass(frozen=True)
class Coded:
    """What an `Encoder` makes of all it took.

    Attributes:
        stack: the ANS stack, little-endian words without the last one's trailing zero bytes.
        plain: the symbols that went past it, packed.
    """

    stack: bytes
    plain: bytes = b""

    def __len__(self) -> int:
        """How many bytes that is."""
        return len(self.stack) + len(self.plain)


def _starts(symbols: Tensor) -> range:
    return range(0, len(symbols), _BLOCK)


def _pack(symbols: Bytes, width: int) -> Bytes:
    """Symbols of `width` (1 … 8) bits without gaps, the highest bit first, zeros at the end.

    >>> _pack(np.array([5, 0, 7], dtype=np.uint8), 3).tolist()
    [163, 128]
    """
    if width == 8:
        return symbols
    bits = symbols if width == 1 else np.unpackbits(symbols).reshape(-1, 8)[:, 8 - width :]
    return np.packbits(bits)


def _unpack(packed: Bytes, width: int, out: Bytes) -> None:
    """The inverse, into an array of as many symbols as are wanted.

    >>> out = np.empty(3, dtype=np.uint8)
    >>> _unpack(np.array([163, 128], dtype=np.uint8), 3, out); out.tolist()
    [5, 0, 7]
    """
    if width == 8:
        out[:] = packed
    elif width == 1:
        out[:] = np.unpackbits(packed, count=len(out))
    else:
        # Eight symbols are `width` bytes: one number, of which each is a shift away.
        eights = -(-len(out) // 8)
        numbers = np.zeros((eights, 8), dtype=np.uint8)
        numbers[:, 8 - width :] = np.pad(packed, (0, eights * width - len(packed))).reshape(-1, width)
        joined, mask = numbers.view(">u8")[:, 0].astype(np.uint64), np.uint64((1 << width) - 1)
        for i in range(8):
            symbols = out[i::8]
            symbols[:] = (joined >> np.uint64((7 - i) * width) & mask)[: len(symbols)]


@dataclass(frozen=True)
class Packed:
    """Symbols of `width` bits as they lie in a file, without gaps.

    Where bytes hold whole symbols (1, 2, 4, 8 bits), each is looked up once for all of them, and once for their histogram.

    Attributes:
        data: the bytes.
        number: how many symbols.
        width: 1 … 8 bits each.
    """

    data: Bytes
    number: int
    width: int

    def symbols(self) -> Tensor:
        """The symbols, as a uint8 tensor."""
        symbols = torch.from_numpy(np.empty(self.number, dtype=np.uint8))
        for start in _starts(symbols):
            block = symbols[start : start + _BLOCK].numpy()
            _unpack(self.data[start * self.width // 8 :][: -(-len(block) * self.width // 8)], self.width, block)
        return symbols

    def values(self, table: Tensor) -> Tensor:
        """The entry of a table for each symbol."""
        if 8 % self.width:
            return look_up(table.numpy(), self.symbols().numpy())
        return look_up(table.numpy()[self._bytes()], self.data).reshape(-1)[: self.number]

    def histogram(self) -> Ints:
        """How often each symbol is there."""
        if 8 % self.width:
            return count(self.symbols(), 1 << self.width)
        histogram = np.zeros(1 << self.width, dtype=np.int64)
        np.add.at(histogram, self._bytes(), count(torch.from_numpy(self.data), 256)[:, None])
        histogram[0] -= len(self.data) * 8 // self.width - self.number  # what fills the last byte
        return histogram

    def _bytes(self) -> Bytes:
        """The symbols in each of the 256 bytes, a row each."""
        rows = np.empty((256, 8 // self.width), dtype=np.uint8)
        _unpack(np.arange(256, dtype=np.uint8), self.width, rows.reshape(-1))
        return rows


def _pieces(width: int) -> list[int]:
    """How `width` bits are cut into chunks, high bits first."""
    return [min(_CHUNK, width - at) for at in range(0, width, _CHUNK)]


def _flat(width: int) -> constriction.stream.model.Uniform:
    """All numbers of `width` (1 … 16) bits equally likely: exactly `width` bits each."""
    return constriction.stream.model.Uniform(1 << width)


def _model(k: Ints | int) -> constriction.stream.model.Model:
    if isinstance(k, int):
        return _flat(k)
    if k.min() == k.max():
        # Equal parts of 2^24 are a power of two in number; this class codes them to the same bits, three times as fast.
        return constriction.stream.model.Uniform(len(k))
    return _categorical(k)


def _categorical(k: Ints) -> constriction.stream.model.Model:
    # k / 2^24 is exact in float64, and perfect=True keeps exact multiples of 2^-24 as they are.
    return constriction.stream.model.Categorical(k / TOTAL, perfect=True)


class _Contexts:
    """Adaptive models of the integers' bit lengths, one per context; the same on both sides."""

    def __init__(self) -> None:
        self._weights: dict[str, Ints] = {}
        self._sums: dict[str, int] = {}
        self._tables: dict[str, Ints] = {}

    def table(self, context: str) -> Ints:
        if context not in self._tables:
            weights = self._weights.setdefault(context, _FRESH.copy())
            # As `table`, in a third of the time: it is most of what a small tensor takes.
            k = 1 + weights * (TOTAL - CLASSES) // self._sums.setdefault(context, int(_FRESH.sum()))
            k[weights.argmax()] += TOTAL - int(k.sum())
            self._tables[context] = k
        return self._tables[context]

    def learn(self, context: str, length: int) -> None:
        self._weights[context][length] += _LEARN
        self._sums[context] += _LEARN
        del self._tables[context]


class _Models:
    """Tables as the coder wants them, kept ready: the runs of a matrix share few."""

    def __init__(self) -> None:
        # With its table, for an id is a table's only while it lives.
        self._known: dict[int, tuple[Ints | int, constriction.stream.model.Model]] = {}

    def of(self, k: Ints | int) -> constriction.stream.model.Model:
        known = self._known.get(id(k))
        if known is None:
            if len(self._known) >= _READY:
                self._known.clear()
            known = self._known[id(k)] = k, _model(k)
        return known[1]


class Nesting:
    """How many planes a plane lies within: a coding that holds others counts them, to stop somewhere.

    Args:
        allowance: what reading may take; None: as much as it likes.
    """

    depth = 0

    def __init__(self, allowance: Allowance | None = None) -> None:
        self.allowance = allowance or Allowance.unlimited()

    @contextmanager
    def deeper(self) -> Iterator[None]:
        """Within it, planes lie one deeper."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


class Encoder(Nesting):
    """Collects symbols with their tables; `finish` turns them into bytes (ANS works from the last symbol to the first).

    Args:
        allowance: what reading may take, of a file without a length: what was written so far has one.

    Attributes:
        bits: exact cost so far, the sum of -log2(k / 2^24).
        steps: that reading will take, so far.
    """

    def __init__(self, allowance: Allowance | None = None) -> None:
        super().__init__(allowance)
        self.bits, self.steps = 0.0, 0
        self._chosen = 0
        self._contexts = _Contexts()
        # Runs of symbols, how long each is, and its table (of an integer's chunk: its width). They wait as bytes, not as
        # int32, and in pieces: a big model must not be held once more.
        self._parts: list[tuple[Bytes | npt.NDArray[np.int32], Sequence[int], Sequence[Ints | int]]] = []
        self._plain: list[memoryview] = []

    def affords(self, steps: int) -> bool:
        """Whether a way that takes so many steps may be taken, where there are others."""
        return steps <= self.allowance.spare(self.bits / 8) - self._chosen

    def choose(self, steps: int) -> None:
        """Take it."""
        self._chosen += steps
        self.steps += steps

    def put(self, symbols: Tensor, k: Ints, histogram: Ints) -> None:
        """Code a uint8 tensor under one table; `histogram` is that of the symbols."""
        self.bits += bits(histogram, k)
        self._parts += [(piece.numpy(), (len(piece),), (k,)) for (piece,) in pieces(symbols)]

    def put_runs(self, symbols: Bytes, numbers: Sequence[int], tables: Sequence[Ints]) -> None:
        """Code runs of symbols, each under a table of its own; the caller adds to `bits`."""
        self._parts.append((symbols, numbers, tables))

    def put_plain(self, symbols: Tensor, width: int) -> None:
        """Take a uint8 tensor of symbols of `width` (1 … 8) bits past the stack."""
        self.bits += width * len(symbols)
        self._plain += [_pack(symbols[start : start + _BLOCK].numpy(), width).data for start in _starts(symbols)]

    def integer(self, value: int, context: str) -> None:
        """Code one integer below 2^64: its bit length (adaptive per context), then the bits below the leading one."""
        self.steps += 1
        length = value.bit_length()
        k = self._contexts.table(context)
        self._contexts.learn(context, length)
        self.bits += PRECISION - float(np.log2(k[length])) + max(length - 1, 0)
        self._number(length, k)
        left = max(length - 1, 0)
        for width in _pieces(left):
            left -= width
            self._number((value >> left) & ((1 << width) - 1), width)

    def _number(self, symbol: int, k: Ints | int) -> None:
        self._parts.append((np.array([symbol], dtype=np.int32), (1,), (k,)))

    def price(self, values: Sequence[int], context: str) -> float:
        """Bits these integers would cost in this context now (the first exactly, the next to a fraction of a bit)."""
        k = self._contexts.table(context)
        return sum(PRECISION - float(np.log2(k[v.bit_length()])) + max(v.bit_length() - 1, 0) for v in values)

    def finish(self) -> Coded:
        """Everything put so far; the encoder is empty then."""
        plain = b"".join(self._plain)
        self._plain.clear()
        # The state starts at 1: a reader ends at exactly 1 again, or the data is damaged.
        coder = constriction.stream.stack.AnsCoder(np.array([1], dtype=np.uint32))
        models = _Models()
        while self._parts:
            symbols, numbers, tables = self._parts.pop()
            wide, stop = symbols.astype(np.int32), len(symbols)
            for number, k in zip(reversed(numbers), reversed(tables), strict=True):
                coder.encode_reverse(wide[stop - number : stop], models.of(k))
                stop -= number
        words: npt.NDArray[np.uint32] = coder.get_compressed().astype("<u4", copy=False)
        del coder
        zeros = (32 - int(words[-1]).bit_length()) // 8  # never a whole word of them
        return Coded(words.view(np.uint8)[: 4 * len(words) - zeros].tobytes(), plain)


class Decoder(Nesting):
    """Gives back what an `Encoder` took, in the same order.

    Args:
        data: that.
        allowance: what reading may take; None: as much as it likes.

    Attributes:
        bits: exact cost of what was read so far.
    """

    def __init__(self, data: Coded, allowance: Allowance | None = None) -> None:
        super().__init__(allowance)
        self.bits = 0.0
        self._contexts = _Contexts()
        self._plain = np.frombuffer(bytearray(data.plain), dtype=np.uint8)  # a copy: torch wants to be able to write
        length = len(data.stack.rstrip(b"\0"))
        words = np.zeros(-(-length // 4), dtype="<u4")
        words.view(np.uint8)[:length] = np.frombuffer(data.stack, dtype=np.uint8, count=length)
        self._coder = constriction.stream.stack.AnsCoder(words.astype(np.uint32, copy=False))
        self._models = _Models()

    def take(self, number: int, k: Ints) -> tuple[Tensor, Ints]:
        """Read symbols coded under one table as a uint8 tensor; their histogram comes with them."""
        symbols, model = torch.empty(number, dtype=torch.uint8), _model(k)
        for (piece,) in pieces(symbols):
            piece.copy_(torch.from_numpy(self._coder.decode(model, len(piece))))
            if self._coder.is_empty():
                # A whole file never reaches state 0, so a damaged one is left here and not after minutes of zeros.
                raise ArtifactError(_DAMAGED)
        histogram = count(symbols, len(k))
        self.bits += bits(histogram, k)
        return symbols, histogram

    def take_runs(self, numbers: Sequence[int], tables: Sequence[Ints]) -> npt.NDArray[np.int32]:
        """Read runs of symbols, each under a table of its own; the caller adds to `bits`."""
        runs = [self._coder.decode(self._models.of(k), number) for number, k in zip(numbers, tables, strict=True)]
        if self._coder.is_empty():
            raise ArtifactError(_DAMAGED)
        return np.concatenate(runs)

    def take_plain(self, number: int, width: int) -> Packed:
        """Read symbols of `width` bits that went past the stack, as they are there."""
        needed, left = -(-number * width // 8), len(self._plain)
        if needed > left:  # before memory is taken
            raise ArtifactError(f"expected {needed} more bytes of plain symbols, found {left}: {ADVICE}")
        packed, self._plain = self._plain[:needed], self._plain[needed:]
        filling = 8 * needed - number * width
        if packed[-1] & ((1 << filling) - 1):
            raise ArtifactError(f"expected {filling} zeros after plain symbols, found others: {ADVICE}")
        self.bits += width * number
        return Packed(packed, number, width)

    def integer(self, context: str) -> int:
        """Read one integer."""
        self.allowance.step()
        k = self._contexts.table(context)
        length = int(self._coder.decode(_categorical(k)))
        if self._coder.is_empty():
            raise ArtifactError(_DAMAGED)
        self._contexts.learn(context, length)
        self.bits += PRECISION - math.log2(int(k[length])) + max(length - 1, 0)
        if length == 0:
            return 0
        value = 1
        for width in _pieces(length - 1):
            value = value << width | int(self._coder.decode(_flat(width)))
        return value

    def finish(self) -> None:
        """Check that everything was read and nothing more."""
        # Not all that is left as a list of numbers: there may be a whole file of it.
        if self._coder.num_words() != 1 or self._coder.get_compressed().tolist() != [1]:
            raise ArtifactError(_DAMAGED)
        if len(self._plain):
            raise ArtifactError(f"expected no more plain symbols, found {len(self._plain)} bytes of them: {ADVICE}")
