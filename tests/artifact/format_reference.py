"""A second reader, written from the format's description alone: Python integers, no torch, no constriction."""

from __future__ import annotations

import zlib
from typing import Any

TOTAL = 1 << 24
TYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
WIDTHS = dict(zip(TYPES, (4, 2, 2, 8, 8, 4, 2, 1, 1, 1), strict=True))
MANTISSA = {"float32": 23, "float16": 10, "bfloat16": 7, "float64": 52}


def table(weights: list[int]) -> list[int]:
    k = [1 + w * (TOTAL - len(weights)) // sum(weights) for w in weights]
    k[weights.index(max(weights))] += TOTAL - sum(k)
    return k


class Ans:
    def __init__(self, data: bytes) -> None:
        data += bytes(-len(data) % 4)
        self.words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
        self.state = self.words.pop()
        if self.words:
            self.state = self.state << 32 | self.words.pop()
        self.lengths: dict[str, list[int]] = {}

    def symbol(self, k: list[int]) -> int:
        q, c, s = self.state % TOTAL, 0, 0
        while c + k[s] <= q:
            c, s = c + k[s], s + 1
        self.state = (self.state >> 24) * k[s] + q - c
        if self.state < 1 << 32 and self.words:
            self.state = self.state << 32 | self.words.pop()
        return s

    def bits(self, number: int) -> int:
        # What `symbol` does with 2^number equal parts.
        return self.symbol([TOTAL >> number] * (1 << number)) if number else 0

    def integer(self, context: str) -> int:
        weights = self.lengths.setdefault(context, [1 + 32 // (b + 1) for b in range(65)])
        length = self.symbol(table(weights))
        weights[length] += 32
        value, left = min(length, 1), max(length - 1, 0)
        while left:
            piece = min(16, left)
            value, left = value << piece | self.bits(piece), left - piece
        return value

    def signed(self) -> int:
        code = self.integer("integer")
        return -(code + 1) // 2 if code % 2 else code // 2

    def array(self, number: int, size: int) -> list[int]:
        if not number:
            return []
        if size > 256:
            high = self.array(number, ((size - 1) >> 8) + 1)
            return [256 * a + b for a, b in zip(high, self.array(number, 256), strict=True)]
        low = self.integer("low")
        top = size - 1 - self.integer("high")
        if low == top:
            return [low] * number
        size = top - low + 1
        if self.integer("coding") == 0:
            return [low + self.symbol(table([1] * size)) for _ in range(number)]
        prior, radius = (1, 4, 16, 64)[self.integer("adaptive")], (0, 1, 2, 4, 8, 16)[self.integer("adaptive")]
        out: list[int] = []
        while len(out) < number:
            block = min(number - len(out), max(8, len(out) // 4 if len(out) < 1 << 14 else len(out)))
            weights = []
            for s in range(size):
                near = range(max(s - radius, 0), min(s + radius, size - 1) + 1)
                weights.append(prior + 32 * sum(out.count(t) for t in near) // len(near))
            k = table(weights)
            out += [self.symbol(k) for _ in range(block)]
        return [low + s for s in out]


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def read(data: bytes, dictionary: bytes) -> dict[str, tuple[str, tuple[int, ...], list[int]]]:
    """Each tensor of a file without slots: its type, its shape, its entries' bits."""
    assert data[:4] == b"PSC\1"
    assert int.from_bytes(data[4:8], "little") == zlib.crc32(data[8:])
    sections, at = {}, 8
    while at < len(data):
        tag = data[at]
        length, at = varint(data, at + 1)
        sections[tag], at = data[at : at + length], at + length
    toc = sections[1] if 1 in sections else zlib.decompressobj(-15, dictionary).decompress(sections[2])
    number, at = varint(toc, 0)
    names: list[str] = []
    for _ in range(number):
        shared, at = varint(toc, at)
        end = toc.index(b"\n", at)
        names.append(".".join([*(names[-1].split(".") if names else [])[:shared], toc[at:end].decode()]))
        at = end + 1
    codes, at = toc[at : at + number], at + number
    shapes: list[Any] = []
    for code in codes:
        axes, at = varint(toc, at)
        if code >> 4 == 3:
            shapes.append(axes)
            continue
        shapes.append([])
        for _ in range(axes):
            axis, at = varint(toc, at)
            shapes[-1].append(axis)
    ans, out, groups = Ans(sections[3]), {}, {}
    for i, (name, code) in enumerate(zip(names, codes, strict=True)):
        size = 1
        for axis in shapes[i] if code >> 4 != 3 else ():
            size *= axis
        stored = "float16" if code >> 4 == 2 else TYPES[code % 16]
        if code >> 4 != 3:
            groups.setdefault((stored, name.split(".")[-1]) if size <= 4096 else i, []).append((i, size, stored))
    for group in groups.values():
        stored, total = group[0][2], sum(size for _, size, _ in group)
        words = [0] * total
        for _ in range(WIDTHS[stored]):
            plane = ans.array(total, 2 if stored == "bool" else 256)
            words = [w << 8 | b for w, b in zip(words, plane, strict=True)]
        values = [bits(word, stored) for word in words]
        for i, size, _ in group:
            out[i], values = values[:size], values[size:]
    assert ans.state == 1
    assert not ans.words
    result = {}
    for i, (name, code) in enumerate(zip(names, codes, strict=True)):
        j = shapes[i] if code >> 4 == 3 else i
        result[name] = ("float16" if codes[j] >> 4 == 2 else TYPES[codes[j] % 16], tuple(shapes[j]), out[j])
    return result


def bits(word: int, kind: str) -> int:
    """A word of the file to the bits that the entry has in memory."""
    width = 8 * WIDTHS[kind]
    if kind in MANTISSA:
        m = MANTISSA[kind]
        exponent, sign, fraction = word >> (m + 1), word >> m & 1, word & ((1 << m) - 1)
        return sign << (width - 1) | exponent << m | fraction
    if kind in ("uint8", "bool"):
        return word
    return (-(word + 1) // 2 if word % 2 else word // 2) % (1 << width)
