"""A core a strip at a time: a few groups, so small that they stay in the processor's cache.

A dozen steps over a strip cost one read and one write of memory; over a whole core each would cost its own. On other
devices than the CPU, where a step is a kernel to launch, a strip is as much as there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["STRIP", "Strip", "blank_", "strips", "survivors", "whole"]

#: entries for each thread: with their places and a scratch array they fit in a megabyte
STRIP = 1 << 16

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size


class Strip(NamedTuple):
    """Some entries of a core, as ``(groups, entries of each)``."""

    groups: slice  #: which groups these rows belong to
    values: Tensor  #: to read only: it may be the core itself
    keep: Tensor | None  #: which of them are kept; None: all
    place: Tensor | None  #: where to write: it is, or will be copied to, the same entries of `out`


def whole(core: Tensor, size: int) -> bool:
    """Whether groups of this size come in one strip each."""
    return size <= _longest(core)


def _longest(core: Tensor) -> int:
    """Entries of a strip."""
    return STRIP * torch.get_num_threads() if core.device.type == "cpu" else max(core.numel(), 1)


def _bounds(entries: int, size: int, longest: int) -> Iterator[tuple[int, int, int]]:
    """(first group, first entry, last entry) of strips of whole groups, or of pieces of one; the short one is alone."""
    step = max(longest // size, 1) * size
    full = entries // size * size
    for start in range(0, full, step):
        stop = min(start + step, full)
        pieces = range(start, stop, longest) if step == size else (start,)
        for piece in pieces:
            yield start // size, piece, min(piece + longest, stop) if step == size else stop
    for piece in range(full, entries, longest):
        yield full // size, piece, min(piece + longest, entries)


def strips(core: Tensor, size: int, keep: Tensor | None = None, out: Tensor | None = None) -> Iterator[Strip]:
    """Go through a core whose groups are `size` consecutive entries (the last may be shorter); use each before the next.

    A group longer than a strip comes in several. `out` has the core's shape, any strides and dtype, and no entry of the
    core; what has been written to a strip's place is in it when the next strip is asked for.

    >>> out = torch.empty(2, 3)
    >>> for groups, values, _, place in strips(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), 3, out=out):
    ...     _ = torch.mul(values, torch.tensor([[10.0], [100.0]])[groups], out=place)
    >>> out.tolist()
    [[10.0, 20.0, 30.0], [400.0, 500.0, 600.0]]
    """
    core = core.detach()
    entries, columns = core.numel(), core.numel() // max(len(core), 1) if core.dim() else 1
    if not entries:
        return
    tensors = [tensor for tensor in (core, keep, out) if tensor is not None]
    if all(tensor.is_contiguous() for tensor in tensors) or size not in (entries, columns):
        # Groups that cross rows have no other order than this; then the whole is copied once.
        flat, kept = core.reshape(-1), None if keep is None else keep.reshape(-1)
        direct = out is None or out.is_contiguous()
        target = (
            None
            if out is None
            else out.view(-1)
            if direct
            else torch.empty(entries, dtype=out.dtype, device=out.device)
        )
        for group, start, stop in _bounds(entries, size, _longest(flat)):
            count = max((stop - start) // size, 1)
            parts = [None if t is None else t[start:stop].view(count, -1) for t in (flat, kept, target)]
            assert parts[0] is not None
            yield Strip(slice(group, group + count), parts[0], parts[1], parts[2])
        if out is not None and target is not None and not direct:
            out.copy_(target.view(out.shape))
        return
    # Rows of any strides: a strip of them is copied to the cache on the way, and back.
    rows = max(_longest(core) // columns, 1)
    for row in range(0, len(core), rows):
        part = slice(row, row + rows)
        values = core[part].reshape(-1)
        shape = (-1, columns) if size == columns else (1, -1)
        kept = None if keep is None else keep[part].reshape(shape)
        place = None if out is None else torch.empty(len(values), dtype=out.dtype, device=out.device)
        groups = slice(row, row + len(values) // columns) if size == columns else slice(0, 1)
        yield Strip(groups, values.view(shape), kept, None if place is None else place.view(shape))
        if out is not None and place is not None:
            out[part].copy_(place.view(out[part].shape))


def blank_(values: Tensor, keep: Tensor | None) -> Tensor:
    """Set what is not kept to +0.0, whatever it is, in place.

    By its bits, times 1 or 0: `where` and `masked_fill` decide entry by entry, and take twenty times as long.

    >>> blank_(torch.tensor([[-1.0, float("inf"), 3.0]]), torch.tensor([[False, False, True]])).tolist()
    [[0.0, 0.0, 3.0]]
    """
    if keep is None:
        return values
    if not (values.is_contiguous() and keep.is_contiguous()):
        return values.masked_fill_(~keep, 0.0)
    bits, marks = values.view(-1).view(_BITS[values.element_size()]), keep.view(-1).view(torch.int8)
    step = _longest(values)
    for start in range(0, bits.numel(), step):
        bits[start : start + step].mul_(marks[start : start + step].to(bits.dtype))
    return values


def survivors(
    core: Tensor, keep: Tensor | None, size: int
) -> Iterator[tuple[slice, Tensor, Callable[[], Tensor], Tensor]]:
    """The strips of a core for sums over what is kept: (groups, values, how many are kept in each row, scratch).

    What is not kept is +0.0 among the values. They are to read only; the scratch array, of their shape, is the
    caller's. Half-precision cores come as float32.

    >>> [(values.tolist(), int(number())) for _, values, number, _ in
    ...  survivors(torch.tensor([[1.0, 2.0]]), torch.tensor([[False, True]]), 2)]
    [([[0.0, 2.0]], 1)]
    """
    wide = core.dtype if core.element_size() >= 4 else torch.float32
    scratch = torch.empty(0, dtype=wide, device=core.device), torch.empty(0, dtype=wide, device=core.device)
    for groups, part, kept, _ in strips(core, size, keep):
        values = part.to(wide)
        if scratch[0].shape != values.shape:
            for array in scratch:
                array.resize_(values.shape)
        if kept is None:
            yield groups, values, partial(torch.full, (1,), values.shape[1], device=core.device), scratch[0]
            continue
        marks = scratch[1].view(_BITS[values.element_size()]).copy_(kept.view(torch.int8))
        marks.mul_(values.view(marks.dtype))
        yield groups, scratch[1], partial(_count, kept), scratch[0]


def _count(keep: Tensor) -> Tensor:
    """How many are kept in each row. (A sum of eight-bit numbers takes ten times as long.)"""
    return keep.view(torch.int8).to(torch.int32).sum(1, dtype=torch.int32)
