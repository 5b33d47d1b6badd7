"""The fewest bytes from which standard ONNX operators rebuild a tensor of few values, bit for bit.

A tensor is *codes* (small whole numbers, 0 for the value 0), *where* the non-zero ones are, and what they *mean*: a
multiple of a scale, or a place in a table. All three are read off the values alone, so a model with views and a file
are packed alike: a scale times whole numbers has an exact greatest common divisor. Runtimes compute constant
expressions when a session starts, so what is packed costs time then and never again.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from psc_lightning.export.onnx.graph import Graph

__all__ = ["dequantized", "integer_constant", "multiples", "pack"]

Array = NDArray[Any]
Shape = tuple[int, ...]

_TOP = 127  # the largest code of a scale
_TABLE = 512  # the longest table: 8 bit logarithmic levels of all rows together may pass 256
_SHORTEST, _TRIED = 8, 32  # lengths of a group that is neither a row nor the tensor
_GAPS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
_BLOCKS = ((1, 1), (1, 2), (1, 3), (1, 4), (1, 5), (1, 7), (1, 8), (2, 1), (4, 1), (8, 1))


# ------------------------------------------------------------------------------------------------------- digits


def _words(base: int) -> tuple[np.dtype[Any], int]:
    """The word that holds numbers below `base` with the least waste, and how many of them.

    >>> _words(2), _words(3), _words(7), _words(255)
    ((dtype('uint8'), 8), (dtype('uint8'), 5), (dtype('int64'), 22), (dtype('uint8'), 1))
    """
    fits = {np.dtype(word): _digits(base, top) for word, top in (("uint8", 2**8), ("int64", 2**63))}
    return min(fits.items(), key=lambda fit: fit[0].itemsize / fit[1] if fit[1] else math.inf)


def _digits(base: int, top: int) -> int:
    count = 0
    while base ** (count + 1) <= top:
        count += 1
    return count


def _digit_bytes(count: int, base: int) -> int:
    word, digits = _words(base)
    return -(-count // digits) * word.itemsize


def _write_digits(graph: Graph, numbers: Array, base: int) -> str:
    """Numbers 0 … base-1, several a word: word = Σ number · base^place. They come back by division and remainder."""
    word, digits = _words(base)
    if digits == 1:
        return graph.constant(numbers.astype(word))
    padded = np.zeros(-(-len(numbers) // digits) * digits, np.int64)
    padded[: len(numbers)] = numbers
    powers = base ** np.arange(digits, dtype=np.int64)
    words = (padded.reshape(-1, digits) * powers).sum(1)
    shifted = graph.node("Div", graph.constant(words.astype(word)[:, None]), graph.constant(powers.astype(word)))
    digit = graph.shaped(graph.node("Mod", shifted, graph.constant(word.type(base))), -1)
    return digit if len(padded) == len(numbers) else graph.cut(digit, 0, len(numbers))


# ------------------------------------------------------------------------------------------------ what codes mean


@dataclass(frozen=True)
class _Coding:
    """Codes (or the values themselves, where `stored` names their type) and the way back.

    Attributes:
        codes: one an entry, flat; 0 for the value 0.
        nbytes: of scales and tables.
        element: ONNX type that the codes are cast to.
        finish: makes the values from the codes, in the shape asked for.
        stored: type of the values, where there are no codes.
        scales: one a group of equally many consecutive entries, where the values are multiples of them.
    """

    codes: Array
    nbytes: int
    element: int
    finish: Callable[[Graph, str, Shape], str]
    stored: str = ""
    scales: Array | None = None


def _multiples(values: Array, size: int) -> _Coding | None:
    """Groups of `size` entries as whole multiples of a scale each, if there are such with codes up to 127."""
    groups = -(-len(values) // size)
    padded = np.zeros(groups * size, np.float32)
    padded[: len(values)] = values
    mantissa, exponent = np.frexp(padded.reshape(groups, size))
    whole = (mantissa * 2**24).astype(np.int64)
    low = np.where(whole == 0, 1, whole & -whole)
    exponent = np.where(whole == 0, 1 << 20, exponent - 24 + np.log2(low).astype(np.int64))
    lowest = exponent.min(1, keepdims=True)
    shift = np.where(whole == 0, 0, exponent - lowest)
    if shift.max() > 30:
        return None
    whole = (whole // low) << shift
    divisor = np.gcd.reduce(whole, axis=1, keepdims=True)
    codes = whole // np.maximum(divisor, 1)
    if np.abs(codes).max() > _TOP:
        return None
    # A divisor may be a small multiple of the 11 significant bits that a float16 holds.
    times = np.ones_like(divisor)
    room = _TOP // np.maximum(np.abs(codes).max(1, keepdims=True), 1)
    for factor in range(3, _TOP + 1, 2):
        fits = (divisor // times >= 2**11) & (times == 1) & (divisor % factor == 0)
        times = np.where(fits & (divisor // factor < 2**11) & (factor <= room), factor, times)
    scales = np.ldexp((divisor // times).astype(np.float64), np.where(divisor == 0, 0, lowest))
    unit = np.exp2(np.ceil(np.log2(scales.max()))) if scales.max() else 1.0
    halves = (scales / unit).astype(np.float16)
    exact = bool((halves.astype(np.float64) * unit == scales).all())
    codes = codes * times if exact else codes
    if not exact:
        scales = np.ldexp(divisor.astype(np.float64), np.where(divisor == 0, 0, lowest))

    def finish(graph: Graph, codes: str, shape: Shape) -> str:
        lines = groups in (1, shape[0]) and groups * size == len(values)
        column = (groups, *(1,) * (len(shape) - 1)) if lines else (groups,)
        if exact:
            scale = graph.node("Cast", graph.constant(halves.reshape(column)), to=TensorProto.FLOAT)
            scale = graph.node("Mul", scale, graph.constant(np.float32(unit)))
        else:
            scale = graph.constant(scales.astype(np.float32).reshape(column))
        if not lines:
            every = graph.cut(graph.shaped(graph.repeated(scale, groups, size, 1), -1), 0, len(values))
            scale = graph.shaped(every, *shape)
        return graph.node("Mul", graph.shaped(codes, *shape), scale)

    return _Coding(
        codes.reshape(-1)[: len(values)], groups * (2 if exact else 4), TensorProto.FLOAT, finish, scales=scales
    )


def _grouped(values: Array) -> _Coding | None:
    """Groups of neither a row nor the tensor: the first one ends about where a common scale does."""
    longest = bisect_left(range(1, 1 + len(values)), True, key=lambda size: _multiples(values[:size], size) is None)
    for size in range(longest, max(longest - _TRIED, _SHORTEST) - 1, -1):
        found = _multiples(values, size)
        if found is not None:
            return found
    return None


def _table(rows: Array) -> _Coding | None:
    """Places in a table: one for each row of `rows`, with 0 first."""
    found = [np.unique(row[row != 0]) for row in rows]
    width = 1 + max(map(len, found))
    if width > _TABLE:
        return None
    table = np.zeros((len(rows), width), np.float32)
    codes = np.zeros(rows.shape, np.int64)
    for i, (row, values) in enumerate(zip(rows, found)):
        table[i, 1 : 1 + len(values)] = values
        codes[i] = np.where(row == 0, 0, 1 + np.searchsorted(values, row))

    def finish(graph: Graph, codes: str, shape: Shape) -> str:
        if len(table) == 1:
            return graph.node("Gather", graph.constant(table[0]), graph.shaped(codes, *shape))
        places = graph.shaped(codes, *rows.shape)
        return graph.shaped(graph.node("GatherElements", graph.constant(table), places, axis=1), *shape)

    return _Coding(codes.reshape(-1), table.nbytes, TensorProto.INT32, finish)


def _numbers(values: Array) -> _Coding:
    """The values themselves, in 16 bits where these hold them."""

    def finish(graph: Graph, values: str, shape: Shape) -> str:
        return graph.shaped(values, *shape)

    with np.errstate(over="ignore"):
        half = bool((values.astype(np.float16).astype(np.float32) == values).all())
    brain = not half and not (values.view(np.uint32) & 0xFFFF).any()
    stored = "float16" if half else "bfloat16" if brain else "float32"
    return _Coding(values, 0, TensorProto.FLOAT, finish, stored)


def _codings(core: Array) -> Iterator[_Coding]:
    values = core.reshape(-1)
    found = [_multiples(values, len(values)), _multiples(values, core.shape[1])]
    if not any(found):
        found += [_grouped(values), _table(core)]
    found.append(_table(values[None]))
    yield from filter(None, found)
    yield _numbers(values)


# ----------------------------------------------------------------------------------------------- where they are


@dataclass(frozen=True)
class _Place:
    """Which entries are stored (None: all), and how they are put in their places among zeros.

    Attributes:
        positions: of the stored entries, rising.
        nbytes: of what tells the positions.
        spread: makes flat codes of all entries from those of the stored ones.
    """

    positions: Array | None
    nbytes: int
    spread: Callable[[Graph, str, int], str]


def _everywhere() -> _Place:
    return _Place(None, 0, lambda graph, codes, element: codes)


def _bitmap(core: Array, rows: int, columns: int) -> _Place:
    """One bit a block of rows × columns; an entry's place is the count of the bits up to it."""
    across, down = -(-core.shape[1] // columns), -(-core.shape[0] // rows)
    padded = np.zeros((down * rows, across * columns), bool)
    padded[: core.shape[0], : core.shape[1]] = core != 0
    bits = padded.reshape(down, rows, across, columns).any((1, 3))
    kept = np.repeat(np.repeat(bits, rows, 0), columns, 1)[: core.shape[0], : core.shape[1]]

    def spread(graph: Graph, codes: str, element: int) -> str:
        bit = graph.node("Cast", _write_digits(graph, bits.reshape(-1), 2), to=TensorProto.INT32)
        if columns > 1:
            row = graph.shaped(graph.repeated(bit, bits.size, columns, 1), down, -1)
            bit = graph.shaped(graph.cut(row, 1, core.shape[1]), -1)
        if rows > 1:
            bit = graph.cut(graph.shaped(graph.repeated(bit, down, rows, core.shape[1]), -1), 0, core.size)
        counted = graph.node("CumSum", bit, graph.constant(np.int64(0)))
        zero = graph.constant(np.zeros(1, np.float32 if element == TensorProto.FLOAT else np.int32))
        return graph.node("Gather", graph.node("Concat", zero, codes, axis=0), graph.node("Mul", counted, bit))

    return _Place(kept.reshape(-1).nonzero()[0], _digit_bytes(bits.size, 2), spread)


def _gaps(core: Array, base: int) -> _Place:
    """The distance to the next stored entry, 1 … base; where it is farther, zeros are stored on the way."""
    there = core.reshape(-1).nonzero()[0]
    distance = np.diff(there, prepend=-1)
    stops = 1 + (distance - 1) // base  # the entry itself, and the zeros before it
    step = np.arange(stops.sum()) - np.repeat(stops.cumsum() - stops, stops) + 1
    positions = np.minimum(np.repeat(there - distance, stops) + base * step, np.repeat(there, stops))
    gaps = np.diff(positions, prepend=-1)

    def spread(graph: Graph, codes: str, element: int) -> str:
        gap = graph.node("Cast", _write_digits(graph, gaps - 1, base), to=TensorProto.INT32)
        ends = graph.node("CumSum", graph.node("Add", gap, graph.constant(np.int32(1))), graph.constant(np.int64(0)))
        places = graph.node("Add", ends, graph.constant(np.int32(-1)))
        zero = np.zeros(1, np.float32 if element == TensorProto.FLOAT else np.int32)
        zeros = graph.node("Expand", graph.constant(zero), graph.constant(np.array([core.size], np.int64)))
        return graph.node("ScatterElements", zeros, places, codes, axis=0)

    return _Place(positions, _digit_bytes(len(gaps), base), spread)


def _places(core: Array) -> Iterator[_Place]:
    yield _everywhere()
    stored = np.count_nonzero(core) / core.size
    if not 0 < stored < 0.9:
        return
    for rows, columns in (*_BLOCKS, (1, core.shape[1])):
        if rows <= core.shape[0] and columns <= core.shape[1]:
            yield _bitmap(core, rows, columns)
    if stored < 0.5:
        yield from (_gaps(core, base) for base in _GAPS)


# ---------------------------------------------------------------------------------------------------- both


@dataclass(frozen=True)
class _Fit:
    """Codes as ``step · n + first`` with n below `base`."""

    first: int
    step: int
    base: int

    @classmethod
    def of(cls, codes: Array) -> _Fit:
        there = np.flatnonzero(np.bincount(codes - codes.min()))
        step = int(np.gcd.reduce(there)) or 1
        return cls(int(codes.min()), step, max(2, int(there[-1]) // step + 1))


def _size(coding: _Coding, place: _Place) -> int:
    there = coding.codes if place.positions is None else coding.codes[place.positions]
    if coding.stored:
        return place.nbytes + len(there) * (4 if coding.stored == "float32" else 2)
    return place.nbytes + coding.nbytes + _digit_bytes(len(there), _Fit.of(there).base)


def _write(graph: Graph, codes: Array, coding: _Coding) -> str:
    """The codes of the stored entries, in the type that `coding` asks for."""
    if coding.stored == "bfloat16":
        words = (codes.view(np.uint32) >> 16).astype(np.uint16)
        return graph.node("Cast", graph.constant(words, bfloat16=True), to=TensorProto.FLOAT)
    if coding.stored:
        constant = graph.constant(codes.astype(coding.stored))
        return constant if coding.stored == "float32" else graph.node("Cast", constant, to=TensorProto.FLOAT)
    fit = _Fit.of(codes)
    if _words(fit.base) == (np.dtype("uint8"), 1) and fit.first >= -128 and int(codes.max()) < 128:
        return graph.node("Cast", graph.constant(codes.astype(np.int8)), to=coding.element)
    digits = _write_digits(graph, (codes - fit.first) // fit.step, fit.base)
    number = np.float32 if coding.element == TensorProto.FLOAT else np.int32
    value = graph.node("Cast", digits, to=coding.element)
    value = graph.node("Mul", value, graph.constant(number(fit.step))) if fit.step > 1 else value
    return graph.node("Add", value, graph.constant(number(fit.first))) if fit.first else value


def pack(graph: Graph, core: Array, shape: Shape) -> str:
    """Add to `graph` what rebuilds a tensor, and return its value's name.

    Args:
        graph: takes the constants and the nodes.
        core: the values, float32, a row an output.
        shape: of the rebuilt tensor; as many entries.
    """
    if not core.size:
        return graph.shaped(graph.constant(core), *shape)
    matrix = core.reshape(len(core), -1)
    choices = product(_codings(matrix), _places(matrix))
    coding, place = min(choices, key=lambda choice: _size(*choice))
    codes = coding.codes if place.positions is None else coding.codes[place.positions]
    return coding.finish(graph, place.spread(graph, _write(graph, codes, coding), coding.element), shape)


def multiples(core: Array) -> tuple[Array, Array] | None:
    """Codes of at most 127 and a scale a row, whose product a core is; None where it is no such product."""
    coding = _multiples(core.reshape(-1), core.size // len(core)) if core.size else None
    if coding is None or coding.scales is None:
        return None
    return coding.codes.reshape(core.shape), coding.scales.reshape(-1)


def integer_constant(graph: Graph, codes: Array) -> str:
    """Add whole numbers from -127 to 127 as int8; where there are few of them, several lie in a byte.

    >>> graph = Graph()
    >>> value = integer_constant(graph, np.array([[-1, 0], [1, 1]]))
    >>> [tensor.dims for tensor in graph.initializers][0]
    [1, 1]
    """

    def finish(graph: Graph, value: str, shape: Shape) -> str:
        return graph.shaped(graph.node("Cast", value, to=TensorProto.INT8), *shape)

    coding = _Coding(codes.reshape(-1), 0, TensorProto.INT32, finish)
    return finish(graph, _write(graph, coding.codes, coding), codes.shape)


def dequantized(graph: Graph, core: Array, shape: Shape) -> str | None:
    """Add a DequantizeLinear of 8 bit numbers, a scale a row; None where the values are no such multiples."""
    found = multiples(core)
    if found is None or len(found[1]) != shape[0]:
        return None
    numbers = graph.constant(found[0].astype(np.int8).reshape(shape))
    return graph.node("DequantizeLinear", numbers, graph.constant(found[1].astype(np.float32)), axis=0)
