"""Read a .psc file with NumPy and the standard library alone, from the README's description of the format.

    python recipes/read_with_numpy.py model.psc            # names, shapes, types
    python recipes/read_with_numpy.py model.psc model.npz  # all tensors, for any other program
    python recipes/read_with_numpy.py model.psc model.npz 1000000000  # up to so many bytes of tensors; else 2^31

Its one limit is that size, of the file and of the shapes that it declares (1 KiB a tensor): it is for files that you trust,
for a stranger's may take any time within it.

Neither psc_lightning nor torch nor constriction is imported: this is the proof that a stranger can write a reader, in any
language. It goes symbol by symbol and is slow; `psc_lightning.load` is the fast one. NumPy has no bfloat16: such
tensors come as float32, which holds them exactly.
"""

from __future__ import annotations

import sys
import zlib
from bisect import bisect_right
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

TOTAL = 1 << 24
LARGEST = 1 << 31  # bytes of all tensors, unless more are asked for,
FREE = 1 << 15  # and so many names and objects
TYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
WIDTHS = dict(zip(TYPES, (4, 2, 2, 8, 8, 4, 2, 1, 1, 1)))
PARTS = {"complex64": "float32", "complex128": "float64"}
TYPES = (*TYPES, *PARTS)
MANTISSA = {"float32": 23, "float16": 10, "bfloat16": 7, "float64": 52}

# The names of section 2's preset dictionary: `_DICTIONARY` of psc_lightning/artifact/directory.py.
NORM = "weight bias running_mean running_var num_batches_tracked"
KNOWN = (
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
    ("bn1", NORM),
    ("layer1.0.downsample.0", "weight"),
    ("layer1.0.conv1", "weight bias"),
    ("layer1.0.bn1", NORM),
    ("layer1.0.conv2", "weight"),
    ("layer1.0.bn2", NORM),
    ("0", "weight bias"),
    ("2", "weight bias"),
    ("conv1", "weight bias"),
    ("conv2", "weight bias"),
    ("fc1", "weight bias"),
    ("fc2", "weight bias"),
    ("fc3", "weight bias"),
)


# ------------------------------------------------------------------------------------------------------ the coder


def table(weights: list[int]) -> list[int]:
    """Whole numbers ≥ 1 that sum to 2^24, from weights; given out as the sums before each, and the total."""
    k = [1 + w * (TOTAL - len(weights)) // sum(weights) for w in weights]
    k[weights.index(max(weights))] += TOTAL - sum(k)
    return [0, *accumulate(k)]


class Ans:
    """Section 3, a stack of words, and section 5, which plain symbols are in; and what is read from them."""

    def __init__(self, data: bytes, plain: bytes = b"") -> None:
        self.plain = plain
        data += bytes(-len(data) % 4)
        self.words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]
        self.state = self.words.pop()
        if self.words:
            self.state = self.state << 32 | self.words.pop()
        self.lengths: dict[str, list[int]] = {}

    def symbol(self, sums: list[int]) -> int:
        q = self.state % TOTAL
        s = bisect_right(sums, q) - 1
        self.state = (self.state >> 24) * (sums[s + 1] - sums[s]) + q - sums[s]
        if self.state < 1 << 32 and self.words:
            self.state = self.state << 32 | self.words.pop()
        return s

    def unsigned(self, context: str) -> int:
        weights = self.lengths.setdefault(context, [1 + 32 // (b + 1) for b in range(65)])
        length = self.symbol(table(weights))
        weights[length] += 32
        value, left = min(length, 1), max(length - 1, 0)
        while left:
            piece = min(16, left)
            value, left = value << piece | self.symbol(list(range(0, TOTAL + 1, TOTAL >> piece))), left - piece
        return value

    def integer(self, context: str = "integer") -> int:
        """What a method stores: 0, -1, 1, -2, … are 0, 1, 2, 3, …"""
        code = self.unsigned(context)
        return -(code + 1) // 2 if code % 2 else code // 2

    def array(self, number: int, size: int, grid: Any = None) -> list[int]:
        if not number:
            return []
        if size > 256:
            high = self.array(number, ((size - 1) >> 8) + 1)
            return [256 * a + b for a, b in zip(high, self.array(number, 256))]
        return self.plane(number, size, grid).tolist()

    def plane(self, number: int, size: int, grid: Any) -> np.ndarray[Any, Any]:
        if not number or size == 1:
            return np.zeros(number, np.int64)
        low = self.unsigned("low")
        top = size - 1 - self.unsigned("high")
        if low == top:
            return np.full(number, low)
        size = top - low + 1
        codings = (
            self.uniform,
            self.adaptive,
            self.lines,
            self.split,
            self.diagonals,
            self.packed,
            self.occupied,
            self.gaps,
        )
        coding = codings[self.unsigned("coding")]
        return low + np.array(coding(number, size, grid), np.int64)

    def uniform(self, number: int, size: int, grid: Any) -> list[int]:
        equal = table([1] * size)
        return [self.symbol(equal) for _ in range(number)]

    def adaptive(self, number: int, size: int, grid: Any) -> list[int]:
        prior, radius = (1, 4, 16, 64)[self.unsigned("adaptive")], (0, 1, 2, 4, 8, 16)[self.unsigned("adaptive")]
        out: list[int] = []
        while len(out) < number:
            block = min(number - len(out), max(8, len(out) // 4 if len(out) < 1 << 14 else len(out)))
            counts = [0, *accumulate(np.bincount(out, minlength=size).tolist() if out else [0] * size)]
            weights = []
            for s in range(size):
                first, last = max(s - radius, 0), min(s + radius, size - 1) + 1
                weights.append(prior + 32 * (counts[last] - counts[first]) // (last - first))
            sums = table(weights)
            out += [self.symbol(sums) for _ in range(block)]
        return out

    def lines(self, number: int, size: int, grid: Any) -> np.ndarray[Any, Any]:
        """Bits of a matrix line by line, each in the context of its line and its place."""
        by = self.unsigned("lines")
        bits = np.zeros(grid.shape, np.int64)
        length = grid.shape[1 - by]
        seen, ones, last, before = ([0] * length for _ in range(4))
        counts, due, tables = [[0, 0] for _ in range(196)], [8] * 196, [table([16, 16])] * 196
        f, e, lines = 1, 2, [(0, 0), (0, 0)]

        def rank(n: int, k: int) -> int:
            borders = ((1, 4), (1, 2), (3, 4), (4, 3), (2, 1), (4, 1))
            return sum(b * (n * e + 2 * f) >= a * (k + 2) * f for a, b in borders)

        for marked, line in zip(*((grid.T, bits.T) if by else (grid, bits))):
            here = np.flatnonzero(marked).tolist()
            if not here:
                continue
            start = 28 * rank(sum(n for n, _ in lines), sum(k for _, k in lines))
            contexts = [(start + 4 * rank(ones[x], seen[x]) + 2 * last[x] + before[x], x) for x in here]
            for c in range(start, start + 28):
                if sum(counts[c]) >= due[c]:
                    due[c] = sum(counts[c]) + max(8, sum(counts[c]) // 4)
                    tables[c] = table([16 + 32 * count for count in counts[c]])
            for c, x in sorted(contexts):
                line[x] = self.symbol(tables[c])
                counts[c][line[x]] += 1
            for x in here:
                seen[x], ones[x], before[x], last[x] = seen[x] + 1, ones[x] + int(line[x]), last[x], int(line[x])
            sum_here = int(line[here].sum())
            f, e, lines = f + sum_here, e + len(here), [lines[1], (sum_here, len(here))]
        return bits[grid]

    def split(self, number: int, size: int, grid: Any) -> np.ndarray[Any, Any]:
        """Questions that are planes of their own."""
        how, t = self.unsigned("split"), self.unsigned("split")
        first = self.plane(number, 2, grid).astype(bool)
        yes, no = grid.copy(), grid.copy()
        yes[grid], no[grid] = first, ~first
        out = np.full(number, t)
        if how == 0:
            sign = 2 * self.plane(int(first.sum()), 2, yes) - 1
            out[first] += sign * (1 + self.plane(int(first.sum()), max(t, size - 1 - t), yes))
        else:
            out[~first] = self.plane(int((~first).sum()), t, no)
            out[first] += self.plane(int(first.sum()), size - t, yes)
        return out

    def diagonals(self, number: int, size: int, grid: Any) -> np.ndarray[Any, Any]:
        """Bits of a matrix by diagonals, each at the odds that its row, its column and its neighbours make."""
        neighbours = self.unsigned("diagonals")
        bias, by_row, by_column = (self.integer("diagonals") for _ in range(3))
        beside = [
            (self.unsigned("diagonals"), self.unsigned("diagonals"), self.integer("diagonals"))
            for _ in range(neighbours)
        ]
        first = []
        for c in range(-24, 24):
            zero, one = 8 << max(0, -(c // 4)), (9 + 2 * (c % 4)) << max(0, c // 4)
            first.append([1 + 96 * zero // (zero + one), 1 + 96 * one // (zero + one)])
        counts, due, tables = [[0, 0] for _ in first], [8] * 48, [table(weights) for weights in first]
        bits: dict[tuple[int, int], int] = {}
        rows, columns = ([[0, 0] for _ in range(length)] for length in grid.shape)

        def log2(x: int) -> int:
            exponent = x.bit_length() - 1
            return 16 * exponent + (16 * x >> exponent) - 16

        def evidence(seen: list[int]) -> int:
            return log2(8 * seen[1] + 4) - log2(8 * seen[0] + 4)

        def context(i: int, j: int) -> int:
            odds = 16 * bias + by_row * evidence(rows[i]) + by_column * evidence(columns[j])
            for up, left, weight in beside:
                odds += 16 * weight * {None: 0, 0: -1, 1: 1}[bits.get((i - up, j - left))]
            return 24 + max(-24, min(23, odds // 64))

        diagonals: dict[int, list[tuple[int, int]]] = {}
        for i, j in np.argwhere(grid).tolist():
            diagonals.setdefault(i + j, []).append((i, j))
        for _, places in sorted(diagonals.items()):
            for c, count in enumerate(counts):
                if sum(count) >= due[c]:
                    due[c] = sum(count) + max(8, sum(count) // 4)
                    tables[c] = table([first[c][bit] + 32 * count[bit] for bit in (0, 1)])
            read = [(c, i, j, self.symbol(tables[c])) for c, i, j in sorted((context(i, j), i, j) for i, j in places)]
            for c, i, j, bit in read:
                bits[i, j] = bit
                for seen in (counts[c], rows[i], columns[j]):
                    seen[bit] += 1
        return np.array([bits[i, j] for i, j in np.argwhere(grid).tolist()], np.int64)

    def occupied(self, number: int, size: int, grid: Any) -> np.ndarray[Any, Any]:
        """Rows and columns that hold a 1, then what is in them."""
        rows, columns = (self.plane(length, 2, None).astype(bool) for length in grid.shape)
        left = grid & rows[:, None] & columns
        bits = np.zeros(grid.shape, np.int64)
        bits[left] = self.plane(int(left.sum()), 2, left)
        return bits[grid]

    def gaps(self, number: int, size: int, grid: Any) -> np.ndarray[Any, Any]:
        """How many others are before each rare bit."""
        rare, share, length = (self.unsigned("gaps") for _ in range(3))
        weights = [1 << 22]
        for _ in range(255):
            weights.append(weights[-1] * (65536 - share) >> 16)
        weights[255] = weights[255] * 65536 // share
        sums = table([max(w, 1) for w in weights])
        bits, at = np.full(number, 1 - rare), 0
        for _ in range(length):
            gap = self.symbol(sums)
            at += gap
            if gap < 255:
                bits[at] = rare
                at += 1
        return bits

    def packed(self, number: int, size: int, grid: Any) -> list[int]:
        """Bits of section 5, a symbol's highest first."""
        width = size.bit_length() - 1
        length = -(-number * width // 8)
        taken, self.plain = self.plain[:length], self.plain[length:]
        bits = np.unpackbits(np.frombuffer(taken, np.uint8))[: number * width].reshape(number, width)
        return (bits @ (1 << np.arange(width)[::-1])).tolist()  # type: ignore[no-any-return]

    def entries(self, number: int, kind: str) -> np.ndarray[Any, Any]:
        """Entries of a type, bit for bit: a byte of their words an array, the highest first."""
        if kind in PARTS:
            out = np.empty(number, kind)
            out.real, out.imag = (self.entries(number, PARTS[kind]) for _ in range(2))
            return out
        words = np.zeros(number, np.uint64)
        for _ in range(WIDTHS[kind]):
            words = words << np.uint64(8) | np.array(self.array(number, 2 if kind == "bool" else 256), np.uint64)
        return values(words, kind)

    def scales(self, number: int) -> np.ndarray[Any, Any]:
        """One a group: a float16 times 2^e, a step of the grid times 2^e, or a float32."""
        stored, e = divmod(self.integer() + 512, 1024)
        if stored == 2:
            return self.entries(number, "float32")
        unit = np.float32(2.0 ** (e - 512))
        if stored == 1:
            return self.grid(number) * unit
        return np.array(self.array(number, 65536), np.uint16).view(np.float16).astype(np.float32) * unit

    def grid(self, number: int) -> np.ndarray[Any, Any]:
        """0 or ±2^(j/8), j = -126 … 0."""
        code = np.array(self.array(number, 255), np.int64) - 127
        size = (2.0 ** ((np.abs(code) - 127) / 8)).astype(np.float32)
        return np.sign(code).astype(np.float32) * size + np.float32(0)


def values(words: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Words as a file has them to numbers."""
    width = 8 * WIDTHS[kind]
    unsigned = np.dtype(f"u{WIDTHS[kind]}")
    one = np.uint64(1)
    if kind in MANTISSA:
        m = np.uint64(MANTISSA[kind])
        fraction = words & ((one << m) - one)
        bits = (words >> m & one) << np.uint64(width - 1) | (words >> (m + one)) << m | fraction
        if kind == "bfloat16":
            return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return bits.astype(unsigned).view(kind)
    if kind in ("uint8", "bool"):
        return words.astype(kind)
    return (words >> one ^ (np.uint64(0) - (words & one))).astype(unsigned).view(kind)


# -------------------------------------------------------------------------------------------- a tensor with slots


def per_entry(number: int, group: int, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The group of each entry of a core; `number` tells how the core is cut: 0 tensor, 1 channel, else entries + 1."""
    at = np.arange(prod(shape))
    return at * 0 if number == 0 else at // group


def levels(ans: Ans, keep: np.ndarray[Any, Any], kind: str, work: Any) -> np.ndarray[Any, Any]:
    """One core: its kept entries' values, +0.0 elsewhere."""
    shape, number = keep.shape, int(keep.sum())
    grid = keep.reshape(shape[0], prod(shape[1:]))
    core = np.zeros(shape, work)
    method = ans.integer()
    if method in (0, 1, 7):
        core[keep] = ans.entries(number, {0: kind, 1: "float16", 7: "bfloat16"}[method]).astype(work)
        return core
    first = ans.integer()  # bits, form or k; of ternary and ttq the group
    root = 1 << ans.integer() if method == 5 else 1
    cut = first if method in (4, 8) else ans.integer()
    group = {0: prod(shape), 1: prod(shape[1:])}.get(cut, cut - 1)
    groups = {0: 1, 1: shape[0]}.get(cut, -(-prod(shape) // max(group, 1)))
    mine = per_entry(cut, group, shape)[keep.reshape(-1)]
    if method == 6:
        centroids = ans.scales(groups * first).reshape(groups, first)
        core[keep] = centroids[mine, ans.array(number, first, grid)]
        return core
    if method == 5:
        lowest = ans.integer()
        highest = lowest + np.array(ans.array(groups, 4096), np.int64)
        top = 2 ** (first - 1) - 1
        code = np.array(ans.array(number, 2 * top + 1, grid), np.int64) - top
        p = np.abs(code) - top + highest[mine]
        power = np.ldexp(np.float32(1), p // root) * (2.0 ** (p % root / root)).astype(np.float32)
        core[keep] = np.where(code, np.sign(code) * power, 0)
        return core
    if method == 8:
        n, p = ans.scales(2 * groups).reshape(groups, 2)[mine].T
        code = np.array(ans.array(number, 3, grid), np.int64) - 1
        core[keep] = np.where(code < 0, -n, np.where(code, p, 0))
        return core
    scale = ans.scales(groups)[mine].astype(work)
    if method == 3:
        offset = ans.scales(groups)[mine].astype(work) if first == 1 else None
        code = np.array(ans.array(number, 2, grid), work)
        core[keep] = (2 * code - 1) * scale if offset is None else offset + scale * code
        return core
    top = 1 if method == 4 else 2 ** (first - 1) - 1
    symbols = np.array(ans.array(number, 2 * top + 1 if top else 2, grid), work)
    code = symbols - top if top else 2 * symbols - 1  # uniform of one bit has no zero
    core[keep] = code * scale + work(0)
    return core


def mask(ans: Ans, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Which entries of a core are kept."""
    if not ans.integer():
        return np.ones(shape, bool)
    granularity, block = ans.integer(), ans.integer()
    rows, columns = shape[0], prod(shape[1:])
    units = {0: (rows, columns), 1: (rows, -(-columns // block)), 2: (-(-rows // block), columns), 3: (rows, 1)}
    size = units[granularity]
    kept = np.array(ans.array(prod(size), 2, np.ones(size, bool)), bool).reshape(size)
    if granularity == 1:
        kept = kept.repeat(block, 1)[:, :columns]
    elif granularity == 2:
        kept = kept.repeat(block, 0)[:rows]
    return np.broadcast_to(kept, (rows, columns)).reshape(shape)


def weight(ans: Ans, stored: tuple[int, ...], kind: str) -> np.ndarray[Any, Any]:
    """The effective weight of a tensor that went through slots."""
    groups = ans.integer()
    shape = stored if len(stored) > 1 else (1, prod(stored))
    if groups:
        shape = (stored[1] * groups, stored[0] // groups, *stored[2:])
    outs, ins, kernel = shape[0], shape[1], shape[2:]
    tying = ans.integer()
    n = ans.integer() if tying else 0
    shapes: dict[int, list[tuple[int, ...]]] = {
        0: [shape],
        1: [(outs, ins // max(n, 1), *kernel)],
        2: [(outs, -(-prod(shape[1:]) // max(n, 1)))],
        3: [(-(-outs // max(n, 1)), *shape[1:])],
        4: [(outs, ins, n), (ins, n, *kernel)],
        5: [(outs, n), (n, prod(shape[1:]))],
    }
    work = np.float64 if kind == "float64" and tying < 4 else np.float32
    cores = [levels(ans, mask(ans, size), kind, work) for size in shapes[tying]]
    matrix = cores[0]
    if tying == 1:
        matrix = np.concatenate([cores[0]] * n, 1)
    elif tying == 2:
        matrix = cores[0].repeat(n, 1)[:, : prod(shape[1:])]
    elif tying == 3:
        matrix = cores[0].repeat(n, 0)[:outs]
    elif tying:
        a, b = (core.astype(np.float64) for core in cores)
        product = a @ b if tying == 5 else np.einsum("oir,irk->oik", a, b.reshape(ins, n, -1))
        matrix = product.astype(np.float32) + np.float32(0)
    if groups:
        matrix = matrix.reshape(groups, stored[1], stored[0] // groups, *kernel).swapaxes(1, 2)
    return as_type(matrix.reshape(stored), kind)


def as_type(numbers: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Numbers rounded to a tensor's type."""
    if kind == "bfloat16":  # the upper half of a float32, rounded to the nearest, ties to even
        bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
        bits = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).astype(np.uint32)
        return bits.view(np.float32).reshape(numbers.shape)
    return numbers.astype(kind)


# ----------------------------------------------------------------------------------------------------------- file


def varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            return value, at


def shown(name: str) -> str:
    """A name without what would move a terminal's cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def contents(toc: bytes, largest: int = LARGEST) -> list[tuple[str, int, str, tuple[int, ...]]]:
    """Name, kind, type and shape of each tensor; an alias has the number of the tensor that it repeats."""
    number, at = varint(toc, 0)
    if 1024 * number > 1024 * FREE + largest:
        raise ValueError(f"expected at most {largest} bytes of tensors, found {number} tensors: pass a larger size")
    names: list[str] = []
    for _ in range(number):
        shared, at = varint(toc, at)
        end = toc.index(b"\n", at)
        names.append(".".join([*(names[-1].split(".") if names else [])[:shared], toc[at:end].decode()]))
        at = end + 1
    codes, at = toc[at : at + number], at + number
    found = []
    for name, code in zip(names, codes):
        axes, at = varint(toc, at)
        shape = [axes]
        if code >> 4 != 3:
            shape = []
            for _ in range(axes):
                axis, at = varint(toc, at)
                shape.append(axis)
        found.append((name, code >> 4, TYPES[code % 16], tuple(shape)))
    if at != len(toc):
        raise ValueError("damaged: bytes are left over after the table of contents")
    return found


def of_model(toc: bytes, model: list[tuple[str, str, tuple[int, ...]]]) -> list[tuple[str, int, str, tuple[int, ...]]]:
    """The same from section 4: what it leaves out, the reader knows."""
    kinds = [kind for byte in toc[4 : 4 + (len(model) + 1) // 2] for kind in (byte & 15, byte >> 4)]
    found, at = [], 4 + (len(model) + 1) // 2
    for (name, dtype, shape), kind in zip(model, kinds):
        if kind == 3:
            other, at = varint(toc, at)
            shape = (other,)
        found.append((name, kind, dtype, shape))
    if at != len(toc):
        raise ValueError("damaged: bytes are left over after the table of contents")
    return found


def read(
    data: bytes, model: list[tuple[str, str, tuple[int, ...]]] | None = None, largest: int = LARGEST
) -> dict[str, np.ndarray[Any, Any]]:
    """All tensors of a file, under their names, in their order.

    Args:
        data: the file.
        model: name, type and shape of each tensor, for a file without names.
        largest: bytes that all tensors may take.

    Raises:
        ValueError: it is not a file of this version, it is damaged, or larger.
    """
    if data[:4] != b"PSC\1" or int.from_bytes(data[4:8], "little") != zlib.crc32(data[8:]):
        raise ValueError("not a .psc file of version 1, or damaged: its first bytes or its checksum are wrong")
    sections, at = {}, 8
    while at < len(data):
        tag = data[at]
        length, at = varint(data, at + 1)
        sections[tag], at = data[at : at + length], at + length
    if 4 in sections:
        if model is None:
            raise ValueError("a file without names: say what names, types and shapes its model has")
        tensors = of_model(sections[4], model)
    else:
        tensors = contents(sections[1] if 1 in sections else inflated(sections[2]), largest)
    size = sum(prod(max(axis, 1) for axis in shape) * width(dtype) for _, kind, dtype, shape in tensors if kind != 3)
    if size > largest:
        raise ValueError(
            f"expected at most {largest} bytes of tensors, found {size}: pass a larger size if you trust the file"
        )
    ans = Ans(sections[3], sections.get(5, b""))
    together: dict[Any, list[int]] = {}
    for i, (name, kind, dtype, shape) in enumerate(tensors):
        if kind in (1, 2, 4):
            stored = {2: "float16", 4: "grid"}.get(kind, dtype)
            key = (stored, name.split(".")[-1]) if prod(shape) <= 4096 else i
        else:
            key = i
        if kind != 3:
            together.setdefault(key, []).append(i)
    out: dict[int, np.ndarray[Any, Any]] = {}
    for members in together.values():
        _, kind, dtype, shape = tensors[members[0]]
        if kind == 0:
            out[members[0]] = weight(ans, shape, dtype)
            continue
        units = [np.float32(2.0 ** ans.integer()) if kind == 4 else None for _ in members]
        number = sum(prod(tensors[i][3]) for i in members)
        flat = ans.grid(number) if kind == 4 else ans.entries(number, "float16" if kind == 2 else dtype)
        for i, unit in zip(members, units):
            size = prod(tensors[i][3])
            out[i], flat = flat[:size].reshape(tensors[i][3]), flat[size:]
            out[i] = as_type(out[i] if unit is None else out[i] * unit, tensors[i][2])
    if ans.state != 1 or ans.words or ans.plain:
        raise ValueError("damaged: symbols are left over")
    return {name: out[shape[0] if kind == 3 else i] for i, (name, kind, _, shape) in enumerate(tensors)}


def width(dtype: str) -> int:
    """Bytes of a number."""
    return WIDTHS[dtype] if dtype in WIDTHS else 2 * WIDTHS[PARTS[dtype]]


def inflated(section: bytes) -> bytes:
    """A table of contents as section 1 would have it: at most 2^24 bytes."""
    unpacker = zlib.decompressobj(-15, dictionary())
    toc = unpacker.decompress(section, 1 << 24)
    if not unpacker.eof or unpacker.unused_data:
        raise ValueError("damaged: the table of contents is longer than 2^24 bytes, or goes on")
    return toc


def dictionary() -> bytes:
    """The preset dictionary: the known names, in the notation of a table of contents."""
    text, before = "", [""]
    for name in (f"{module}.{leaf}" for module, leaves in KNOWN for leaf in leaves.split()):
        parts = name.split(".")
        shared = next((i for i, (a, b) in enumerate(zip(before, parts)) if a != b), min(len(before), len(parts)))
        text += chr(shared) + ".".join(parts[shared:]) + "\n"
        before = parts
    return text.encode()


def main(arguments: list[str]) -> None:
    path, largest = Path(arguments[0]), int(arguments[2]) if len(arguments) > 2 else LARGEST
    if not path.is_file() or path.stat().st_size > largest + (1 << 20):
        raise SystemExit(f"{path}: expected a file of at most {largest} bytes of tensors")
    tensors = read(path.read_bytes(), largest=largest)
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names may be beyond its encoding
    if len(arguments) > 1:
        np.savez(arguments[1], **tensors)  # type: ignore[arg-type]
    for name, tensor in tensors.items():
        print(f"{shown(name)}  {tuple(tensor.shape)}  {tensor.dtype}")


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4:
        raise SystemExit(__doc__)
    main(sys.argv[1:])
