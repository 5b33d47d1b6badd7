"""What every levels method is: a core's entries take few distinct values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from psc_lightning.numerics.asking import Question, answer
from psc_lightning.numerics.functional import Group, group_counts, split, spread
from psc_lightning.numerics.precision import PRECISIONS, Rounding
from psc_lightning.numerics.strips import Survivors, blank_, strips, survivors, whole
from psc_lightning.options import grouping, one_of
from psc_lightning.symbols import Reader, Writer, look_up, pieces

__all__ = ["Grouping", "Levels", "Scales"]

#: how the options that several methods have are given
Grouping = Annotated[Group, grouping]
Scales = Annotated[str, partial(one_of, allowed=PRECISIONS)]

Shape = tuple[int, ...]


class Levels(nn.Module):
    """The third slot: ``value(code(x))``; the codes and the tables behind `value` are what is stored.

    `refresh` computes scales and tables between steps, over the entries that the mask keeps, and rounds them to what
    the file holds; `code` and `value` then only divide, round, multiply and gather, so that the forward pass and the
    reader of a file do the same few exact operations.

    A method whose tables follow from statistics of each group says these (`_sums`, `_found`), names its tables
    (`tables`) and how they index a strip into levels (`_snap`); then all are done strip by strip.

    Args:
        shape: the core's shape.
        group: which entries share a scale: `tensor`, `channel`, or n consecutive entries.
        scales: what scales and centroids are rounded to: `float32`, `float16` or `log8`.

    Shapes:
        cores, codes and values: `shape`; tables: ``(groups,)``, or ``(groups, K)`` where a group has K levels of its own.
    """

    code_number: ClassVar[int]
    #: whether the gradient passes to the core unchanged and nothing is trained: a hard weight may then stand for its core
    straight: bool = True
    #: whether zero is one of the values, so that a mask's zeros cost no more than other entries
    zero: ClassVar[bool] = True
    #: how many passes over a group its tables take, and how the sums of its parts are joined
    passes: int = 0
    #: whether a pass writes nothing: two of them over all of a core are then faster than strips
    reads_only: bool = False
    _join: Callable[..., Tensor] = staticmethod(torch.add)
    #: the types whose strips `_snap` can take
    _snaps: ClassVar[tuple[torch.dtype, ...]] = ()

    def __init__(self, shape: Shape, group: Group = "channel", scales: str = "float16") -> None:
        super().__init__()
        self.scales, self.precision = scales, PRECISIONS[scales]
        # A group of more entries than there are is all of them; a file names no larger one.
        self.shape, self.group = shape, min(group, max(1, prod(shape))) if isinstance(group, int) else group
        self.count, self.size = group_counts(shape, self.group)
        #: the buffers that `_snap` needs, a number a group; those that are rounded with the buffer of their power of two
        self.tables: dict[str, str | None] = {}

    @classmethod
    def trains(cls, options: Mapping[str, Any]) -> bool:
        """Whether, with these options, something is trained beside the weight."""
        return False

    @classmethod
    def calibrates(cls, options: Mapping[str, Any]) -> bool:
        """Whether, with these options, labels are seen before they begin: no method does so far."""
        return False

    # ----------------------------------------------------------------------------------------------- tables

    def begin(self, core: Tensor, keep: Tensor | None = None) -> None:
        """Called once when the levels start: set what is trained from here on (steps, centroids)."""

    def refresh(self, core: Tensor, keep: Tensor | None = None) -> None:
        """Recompute scales and tables from the entries that `keep` marks; None: all."""
        answer(self.refreshing(core, keep))

    def refreshing(self, core: Tensor, keep: Tensor | None = None) -> Question[None]:
        """`refresh`, which may have to ask."""
        yield from self._take(self._measured(core, keep))

    def _measured(self, core: Tensor, keep: Tensor | None) -> Sequence[Tensor]:
        """The tables, not yet rounded; none where they are trained."""
        if not self.passes or not core.numel():
            return []
        if whole(core, self.size):
            each = [self._tables_of(strip) for strip in survivors(core, keep, self.size, self.reads_only)]
            return [torch.cat(parts) for parts in zip(*each)] if len(each) > 1 else each[0]
        found: list[Tensor] = []
        for index in range(self.passes):
            totals: list[Tensor] = []
            for strip in survivors(core, keep, self.size):
                sums = self._sums(index, strip, *(table[strip.groups] for table in found))
                totals = totals or [torch.zeros(self.count, dtype=part.dtype, device=part.device) for part in sums]
                for total, part in zip(totals, sums, strict=True):
                    total[strip.groups] = self._join(total[strip.groups], part)
            found += self._found(index, *totals)
        return found

    def _tables_of(self, strip: Survivors) -> list[Tensor]:
        """All tables, not yet rounded, of the groups that lie whole in a strip."""
        found: list[Tensor] = []
        for index in range(self.passes):
            found += self._found(index, *self._sums(index, strip, *found))
        return found

    def _sums(self, index: int, strip: Survivors, *found: Tensor) -> tuple[Tensor, ...]:
        """What a pass sums up in each row of a strip, given the tables found before: zero or above, 0 for no entries."""
        raise NotImplementedError

    def _found(self, index: int, *sums: Tensor) -> tuple[Tensor, ...]:
        """The tables of groups of these sums, in the order of `tables`, not yet rounded."""
        raise NotImplementedError

    def _take(self, found: Sequence[Tensor]) -> Question[None]:
        """Keep tables, rounded to what a file holds."""
        for (name, unit), table in zip(self.tables.items(), found):
            if unit is None:
                getattr(self, name).copy_(table)
            else:
                yield self._rounding(table, name, unit)

    def _rounding(self, values: Tensor, into: str, unit: str) -> Rounding:
        return Rounding(values, self.precision, getattr(self, into), getattr(self, unit), positive=into != "offset")

    def _settle(self, values: Tensor, into: str = "scale", unit: str = "unit") -> None:
        """Round values to what the file holds, and keep them and their power of two in the tensors of these names."""
        self._rounding(values, into, unit).do()

    # ----------------------------------------------------------------------------------------------- making

    def code(self, core: Tensor) -> Tensor:
        """Which level each entry takes: a tensor of the core's shape that holds whole numbers."""
        raise NotImplementedError

    def value(self, code: Tensor) -> Tensor:
        """The level of each code; never -0.0."""
        raise NotImplementedError

    @torch.no_grad()
    def hard(self, core: Tensor, out: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """``value(code(core))``, bit for bit, and +0.0 where `keep` is false: what is stored, as of the last refresh.

        Args:
            core: of any strides.
            out: where to write it: the core's shape and dtype, any strides, no entry of the core; None: a new tensor.
            keep: which entries the mask keeps; None: all.
        """
        if out is None:
            out = torch.empty_like(core)
        if core.dtype not in self._snaps:
            return blank_(out.copy_(self.value(self.code(core))), keep)
        tables = self._tables()
        for groups, values, kept, (place,) in strips(core, self.size, keep, out):
            self._snap(values, place, *(table[groups, None] for table in tables))
            blank_(place, kept)
        return out

    def _tables(self) -> list[Tensor]:
        """What `_snap` needs, a number a group."""
        return [getattr(self, name) for name in self.tables]

    def _snap(self, values: Tensor, place: Tensor, *tables: Tensor) -> None:
        """Write the levels of a strip of groups to `place`; both are ``(groups, entries of each)``, tables a column."""
        raise NotImplementedError

    def rescale(self, code: Tensor, factor: Tensor) -> Tensor:
        """Multiply the scales, a positive factor an output channel; the values that these codes stand for now.

        Raises:
            ValueError: the scales are no such.
        """
        raise ValueError(f"{type(self).__name__} cannot take a factor for each output channel")

    def _by_channel(self) -> None:
        if self.group != "channel":
            raise ValueError(
                f"with group={self.group!r} an output channel has no scale of its own; group='channel' gives it one"
            )

    # -------------------------------------------------------------------------------------------- gradients

    def pull(self, core: Tensor, gradient: Tensor, keep: Tensor | None = None, strength: float = 1.0) -> Tensor:
        """The core's gradient from that of its levels; what is trained gets its own, in `grad`.

        Args:
            core: what the levels were made of.
            gradient: of their values; only read.
            keep: which entries the mask keeps; None: all. Where it drops, the gradient passes unchanged.
            strength: how hard they acted, 0 … 1.
        """
        return gradient

    # ----------------------------------------------------------------------------------------------- ladder

    @property
    def rungs(self) -> int:
        """How many sizes there are beside zero; 0: the method has no zero that a weight could be drawn to."""
        return 0

    def ladder(self, core: Tensor) -> tuple[Tensor, Tensor]:
        """Where entries stand among their levels: 0 at the level zero, ±1, ±2, … at the next ones; and its slope in x.

        A position that is rounded is the rung that `code` gives, up to ties.

        Raises:
            ValueError: the method has no zero.
        """
        raise ValueError(f"{type(self).__name__} has no zero that a weight could be drawn to")

    @property
    def value_bits(self) -> float:
        """Of an entry, where there is no zero: one of two values."""
        return 1.0

    @property
    def follows_scale(self) -> bool:
        """Whether a group that is multiplied by a number keeps its codes: then no price of codes can change its size."""
        return True

    @torch.no_grad()
    def unscaled(self, core: Tensor, gradient: Tensor) -> Tensor:
        """A price's gradient without what would shrink groups as wholes: ``g - sign(x) · Σ g·x / Σ |x|``: Σ g·x is 0."""
        if not self.follows_scale:
            return gradient
        sizes, along = split(core.abs(), self.group).sum(1), split(gradient * core, self.group).sum(1)
        return gradient - core.sign() * spread(
            along / sizes.clamp_min(torch.finfo(sizes.dtype).tiny), self.shape, self.group
        )

    # ---------------------------------------------------------------------------------------------- storing

    def encode(self, writer: Writer, core: Tensor, keep: Tensor) -> None:
        """Store the options, the tables, and the codes of the kept entries in memory order."""
        raise NotImplementedError

    @classmethod
    def decode(cls, reader: Reader, keep: Tensor, dtype: torch.dtype) -> Tensor:
        """Read them: the core's values, anything where `keep` is false."""
        raise NotImplementedError


def largest(strip: Survivors) -> Tensor:
    """The largest |x| of each row, by passes that write nothing."""
    if strip.values.device.type != "cpu":
        found: Tensor = torch.linalg.vector_norm(strip.values, math.inf, 1)  # one kernel; the CPU is slower at it
        return found
    return torch.maximum(strip.values.amax(1), -strip.values.amin(1))


def write_codes(writer: Writer, codes: Tensor, keep: Tensor, lowest: int, size: int) -> None:
    """Store the codes of the kept entries, counted from `lowest`."""
    parts = pieces(codes.detach().cpu().reshape(-1), keep.cpu().reshape(-1))
    # NumPy picks without a list of places, and twice as fast.
    kept = [(part - lowest).to(torch.uint8).numpy()[marks.numpy()] for part, marks in parts]
    writer.symbols(torch.from_numpy(np.concatenate(kept)), size, keep)


def read_codes(reader: Reader, keep: Tensor, lowest: int, size: int, dtype: torch.dtype) -> Tensor:
    """Read them into the core's shape, `lowest` elsewhere."""
    number = int(np.count_nonzero(keep.numpy()))
    symbols = reader.symbols(number, size, keep)
    if number < keep.numel():
        symbols = torch.zeros(keep.numel(), dtype=torch.uint8).masked_scatter_(keep.reshape(-1), symbols)
    codes = symbols.reshape(keep.shape).to(dtype)
    return codes.add_(lowest) if lowest else codes


def read_values(reader: Reader, keep: Tensor, table: Tensor) -> Tensor:
    """Read them as what a table has for each, into the core's shape; its first entry where `keep` is false."""
    if bool(keep.all()):
        return reader.values(keep.numel(), table, keep).reshape(keep.shape)
    codes = read_codes(reader, keep, 0, len(table), torch.uint8)  # a byte an entry: it waits while the values are made
    return look_up(table.numpy(), codes.reshape(-1).numpy()).reshape(keep.shape)


def write_group(writer: Writer, group: Group) -> None:
    """Store which entries share a scale: 0 tensor, 1 channel, else n + 1."""
    writer.integer({"tensor": 0, "channel": 1}.get(str(group), 1 + int(group) if isinstance(group, int) else 0))


def read_group(reader: Reader, keep: Tensor) -> Group:
    """Read it."""
    number = reader.integer(0, max(2, keep.numel() + 1))
    return ("tensor", "channel")[number] if number < 2 else number - 1
