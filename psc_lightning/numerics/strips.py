"""A core a strip at a time: a few groups, so small that they stay in the processor's cache.

A dozen steps over a strip cost one read and one write of memory; over a whole core each would cost its own. On other
devices than the CPU, where a step is a kernel to launch, a strip is as much as there is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["STRIP", "Strip", "blank_", "strips", "survivors", "whole"]

#: entries for each thread: with their places they fit in a megabyte
STRIP = 1 << 17

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size


class Strip(NamedTuple):
    """Some entries of a core, as ``(groups, entries of each)``."""

    groups: slice  #: which groups these rows belong to
    values: Tensor  #: to read only: it may be the core itself
    keep: Tensor | None  #: which of them are kept; None: all
    places: tuple[Tensor, ...]  #: where to write: each is, or will be copied to, the same entries of one of `outs`


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


def strips(core: Tensor, size: int, keep: Tensor | None = None, *outs: Tensor) -> Iterator[Strip]:
    """Go through a core whose groups are `size` consecutive entries (the last may be shorter); use each before the next.

    A group longer than a strip comes in several. `outs` have the core's shape, any strides and dtype, and no entry of the
    core; what has been written to a strip's places is in them when the next strip is asked for.

    >>> out = torch.empty(2, 3)
    >>> for groups, values, _, (place,) in strips(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), 3, None, out):
    ...     _ = torch.mul(values, torch.tensor([[10.0], [100.0]])[groups], out=place)
    >>> out.tolist()
    [[10.0, 20.0, 30.0], [400.0, 500.0, 600.0]]
    """
    core = core.detach()
    entries, columns = core.numel(), core.numel() // max(len(core), 1) if core.dim() else 1
    if not entries:
        return
    tensors = [core, *outs] if keep is None else [core, keep, *outs]
    if all(tensor.is_contiguous() for tensor in tensors) or size not in (entries, columns):
        # Groups that cross rows have no other order than this; then the whole is copied once.
        flat, kept = core.reshape(-1), None if keep is None else keep.reshape(-1)
        targets = [
            out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype, device=out.device) for out in outs
        ]
        lines = [target.view(-1) for target in targets]
        for group, start, stop in _bounds(entries, size, _longest(flat)):
            shape = (max((stop - start) // size, 1), -1)
            yield Strip(
                slice(group, group + shape[0]),
                flat[start:stop].view(shape),
                None if kept is None else kept[start:stop].view(shape),
                tuple(line[start:stop].view(shape) for line in lines),
            )
        for out, target in zip(outs, targets):
            if target is not out:
                out.copy_(target)
        return
    # Rows of any strides: a strip of them is copied to the cache on the way, and back.
    rows = max(_longest(core) // columns, 1)
    for row in range(0, len(core), rows):
        part = slice(row, row + rows)
        values = core[part].reshape(-1)
        shape = (-1, columns) if size == columns else (1, -1)
        places = [torch.empty(len(values), dtype=out.dtype, device=out.device).view(shape) for out in outs]
        groups = slice(row, row + len(values) // columns) if size == columns else slice(0, 1)
        yield Strip(groups, values.view(shape), None if keep is None else keep[part].reshape(shape), tuple(places))
        for out, place in zip(outs, places):
            out[part].copy_(place.view(out[part].shape))


def blank_(values: Tensor, keep: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Set what is not kept to +0.0, whatever it is, in place, or write that to `out`.

    By its bits, times 1 or 0: `where` and `masked_fill` decide entry by entry, and take twenty times as long.

    >>> blank_(torch.tensor([[-1.0, float("inf"), 3.0]]), torch.tensor([[False, False, True]])).tolist()
    [[0.0, 0.0, 3.0]]
    """
    if out is None:
        out = values
    if keep is None:
        return out if out is values else out.copy_(values)
    if not (values.is_contiguous() and keep.is_contiguous() and out.is_contiguous()):
        return (out if out is values else out.copy_(values)).masked_fill_(~keep, 0.0)
    kind = _BITS[values.element_size()]
    bits, target, marks = values.view(-1).view(kind), out.view(-1).view(kind), keep.view(-1).view(torch.int8)
    step = max(_longest(values) // 2, 1) if values.device.type == "cpu" else max(len(bits), 1)
    for start in range(0, bits.numel(), step):
        part = slice(start, start + step)
        torch.mul(bits[part], marks[part].to(kind), out=target[part])
    return out


class Survivors(NamedTuple):
    """A strip for sums over what is kept."""

    groups: slice  #: which groups these rows belong to
    values: Tensor  #: to read only; what is not kept is +0.0; half-precision ones come as float32
    keep: Tensor | None
    scratch: list[Tensor]

    def number(self) -> Tensor:
        """How many are kept in each row."""
        if self.keep is None:
            return torch.full((1,), self.values.shape[1], device=self.values.device)
        # A sum of eight-bit numbers takes ten times as long.
        return self.keep.view(torch.int8).to(torch.int32).sum(1, dtype=torch.int32)

    def spare(self, which: int = 0) -> Tensor:
        """A scratch array of the values' shape, and another one; each strip's is the same."""
        if self.scratch[which].shape != self.values.shape:
            self.scratch[which].resize_(self.values.shape)
        return self.scratch[which]


def survivors(core: Tensor, keep: Tensor | None, size: int, at_once: bool = False) -> Iterator[Survivors]:
    """The strips of a core (see `strips`) for sums over what is kept; one for all, `at_once`, where nothing is written.

    >>> [(strip.values.tolist(), int(strip.number())) for strip in
    ...  survivors(torch.tensor([[1.0, 2.0]]), torch.tensor([[False, True]]), 2)]
    [([[0.0, 2.0]], 1)]
    """
    wide = core.dtype if core.element_size() >= 4 else torch.float32
    scratch = [torch.empty(0, dtype=wide, device=core.device) for _ in range(3)]
    whole_groups = size and core.numel() % size == 0
    if at_once and keep is None and core.dtype == wide and core.numel() and core.is_contiguous() and whole_groups:
        yield Survivors(slice(0, core.numel() // size), core.detach().view(-1, size), None, scratch)
        return
    for groups, part, kept, _ in strips(core, size, keep):
        strip = Survivors(groups, part.to(wide), kept, scratch)
        if kept is not None:
            values = strip.spare(2)
            marks = values.view(_BITS[values.element_size()]).copy_(kept.view(torch.int8))
            marks.mul_(strip.values.view(marks.dtype))
            strip = strip._replace(values=values)
        yield strip
