"""Codebook levels: k trained centroids a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from psc_lightning.levels.base import (
    Grouping,
    Levels,
    Scales,
    Shape,
    read_codes,
    read_group,
    read_values,
    write_codes,
    write_group,
)
from psc_lightning.numerics.clustering import optimal_centroids
from psc_lightning.numerics.functional import give_gradient, group_counts, split, spread
from psc_lightning.numerics.precision import power_of_two, read_numbers, write_numbers
from psc_lightning.numerics.strips import blank_, strips
from psc_lightning.options import whole
from psc_lightning.symbols import Reader, Writer, pieces

__all__ = ["CodebookLevels"]

_AT_ONCE = 1 << 22  # terms of clusters that a graphics processor sums at once
_COUNT = 32  # centroids: up to here counting middles is faster than halving


def _assign(values: Tensor, middles: Tensor, codes: Tensor) -> None:
    """How many of a row's sorted middles are smaller than each value, all ``(groups, …)``; codes are uint8."""
    if values.device.type != "cpu":
        codes.copy_(torch.searchsorted(middles.contiguous(), values.contiguous()))
        return
    # NumPy compares into bytes, and gathers, several times as fast as torch; nothing leaves the processor's cache.
    x, m, found = values.numpy(), middles.numpy(), codes.numpy()
    rows, k = len(m), m.shape[1] + 1
    if k <= _COUNT:
        above = np.empty(x.shape, dtype=bool)
        np.greater(x, m[:, :1], out=found.view(bool))
        for j in range(1, k - 1):
            np.greater(x, m[:, j : j + 1], out=above)
            np.add(found, above.view(np.uint8), out=found)
        return
    # Halving, without a branch: the table is filled up to a power of two that nothing exceeds.
    width = 1 << (k - 1).bit_length()
    table = np.full((rows, width), np.inf, dtype=m.dtype)
    table[:, : k - 1] = m
    row = torch.arange(0, rows * width, width, dtype=torch.int32)[:, None]
    place, at, other = row.expand(x.shape).contiguous(), torch.empty(x.shape, dtype=torch.int32), torch.empty(x.shape)
    less, all_middles = np.empty(x.shape, dtype=bool), torch.from_numpy(table).view(-1)
    step = width // 2
    while step:
        torch.add(place, step - 1, out=at)
        torch.index_select(all_middles, 0, at.view(-1), out=other.view(-1))
        np.less(other.numpy(), x, out=less)
        place.add_(torch.from_numpy(less.view(np.int8)), alpha=step)
        step //= 2
    codes.copy_(place.sub_(row))


def _joined(rows: Tensor, shape: Shape) -> Tensor:
    """The inverse of `split`."""
    return rows.reshape(-1)[: prod(shape)].reshape(shape)


class CodebookLevels(Levels):
    """``x̂ = c[argmin_j |x - c_j|]``: the nearest of k centroids, placed by optimal clustering and then trained.

    Pseudo-gradient: ∂/∂x = g; ∂/∂c_j = Σ g over the entries of cluster j.
    Stored: a code of at most log2 k bits an entry, entropy-coded; k · 16 bits a group; one exponent.

    Args:
        k: 2 … 256 centroids.
        group: which entries share a codebook (default the tensor: a codebook a channel costs more than it gives).
        scales: what the centroids are stored as, and rounded to: `float32`, `float16` or `log8`.

    Shapes: see `Levels`.

    >>> levels = CodebookLevels((1, 4), k=2, group="tensor")
    >>> x = torch.tensor([[1.0, 2.0, -4.0, -6.0]])
    >>> levels.begin(x); levels.refresh(x)
    >>> levels.hard(x).tolist()
    [[1.5, 1.5, -5.0, -5.0]]
    >>> _ = levels.pull(x, torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    >>> levels.centroids.grad.tolist()
    [[7.0, 3.0]]

    Source: Han et al. 2016, "Deep Compression", §3, eq. 2-3; here the weights move too (straight-through) and may change
    their cluster at every refresh. Wang and Song 2011, "Ckmeans.1d.dp" (the start).
    """

    code_number = 6
    straight = False

    unit: Tensor
    codes: Tensor

    def __init__(
        self,
        shape: Shape,
        k: Annotated[int, partial(whole, low=2, high=256)] = 16,
        group: Grouping = "tensor",
        scales: Scales = "float16",
    ) -> None:
        super().__init__(shape, group, scales)
        self.k = k
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.uint8))
        self.centroids = nn.Parameter(torch.zeros(self.count, k))

    @classmethod
    def trains(cls, options: Mapping[str, Any]) -> bool:
        """The centroids."""
        return True

    @torch.no_grad()
    def begin(self, core: Tensor, keep: Tensor | None = None) -> None:
        """Place the centroids where their squared error is least."""
        if keep is None and self.count * self.size > core.numel():
            keep = torch.ones_like(core, dtype=torch.bool)  # what fills up the last group must not count
        kept = None if keep is None else split(keep, self.group)
        self.centroids.copy_(optimal_centroids(split(core, self.group), kept, self.k))
        self._place_unit()

    def _place_unit(self) -> None:
        """Take the power of two above the centroids, and above what they are rounded to."""
        self.unit.copy_(power_of_two(self.centroids, self.precision.up))

    def _measured(self, core: Tensor, keep: Tensor | None) -> Sequence[Tensor]:
        # The centroids in order: a trained one may have passed its neighbour; the optimizer's state moves with neither: a
        # swap is rare. Then the nearest of each entry.
        self.centroids.copy_(self.centroids.sort(1).values)
        self.unit.clamp_(min=power_of_two(self.centroids))
        table = self._table()
        middles = (table[:, 1:] + table[:, :-1]) / 2
        for groups, values, _, (codes,) in strips(core, self.size, None, self.codes):
            _assign(values.to(middles.dtype), middles[groups], codes)
        return []

    def _table(self) -> Tensor:
        return self.precision.round(self.centroids.detach(), self.unit, positive=False)

    def code(self, core: Tensor) -> Tensor:
        """The nearest centroid's index, as of the last refresh."""
        return self.codes

    def value(self, code: Tensor) -> Tensor:
        """The centroid of each index."""
        return self._gather(self._table(), code)

    def _gather(self, table: Tensor, code: Tensor) -> Tensor:
        table, code = table.reshape(-1), code.to(torch.int32)
        if table.numel() > self.k:
            first = torch.arange(0, table.numel(), self.k, dtype=torch.int32, device=code.device)
            code = code + spread(first, self.shape, self.group)
        return table.index_select(0, code.reshape(-1)).reshape(self.shape)

    @torch.no_grad()
    def hard(self, core: Tensor, out: Tensor | None = None, keep: Tensor | None = None) -> Tensor:
        """The centroids of the last refresh's codes, and +0.0 where `keep` is false; see `Levels.hard`."""
        if out is None:
            out = torch.empty_like(core)
        table = self._table().reshape(-1).to(out.dtype)
        first = torch.arange(0, table.numel(), self.k, dtype=torch.int32, device=core.device)[:, None]
        for groups, codes, kept, (place,) in strips(self.codes, self.size, keep, out):
            places = codes.to(torch.int32)
            if len(first) > 1:
                places += first[groups]
            torch.index_select(table, 0, places.view(-1), out=place.view(-1))
            blank_(place, kept)
        return out

    @torch.no_grad()
    def centroid_gradient(self, gradient: Tensor, keep: Tensor | None = None) -> Tensor:
        """Σ of the weight's gradient over the kept entries of each cluster: ``(groups, k)`` float32, the same every time.

        Args:
            gradient: of the core's shape.
            keep: which entries the mask keeps; None: all.

        >>> levels = CodebookLevels((1, 4), k=2)
        >>> x = torch.tensor([[1.0, 2.0, -4.0, -6.0]])
        >>> levels.begin(x); levels.refresh(x)
        >>> levels.centroid_gradient(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist()
        [[7.0, 3.0]]
        """
        if gradient.device.type != "cpu":
            # Sums of a fixed order; a histogram with weights has none on a graphics processor.
            kept = gradient if keep is None else torch.where(keep, gradient, 0.0)
            codes, terms = split(self.codes, self.group)[:, None], split(kept, self.group)[:, None]
            several = max(_AT_ONCE // max(terms.numel(), 1), 1)  # clusters, where that takes little memory
            parts = torch.split(torch.arange(self.k, dtype=torch.uint8, device=codes.device)[:, None], several)
            return torch.cat([torch.where(codes == part, terms, 0.0).sum(2, dtype=torch.float32) for part in parts], 1)
        total = torch.zeros(self.count, self.k, dtype=torch.float64)
        # Where all lie alike, the strips of both are those of the same entries.
        gradient, keep = gradient.contiguous(), None if keep is None else keep.contiguous()
        for strip, here in zip(strips(gradient, self.size, keep), strips(self.codes.contiguous(), self.size)):
            terms, places = blank_(strip.values.to(torch.float64, copy=True), strip.keep), here.values
            rows = len(places)
            if rows > 1:
                places = places + torch.arange(0, rows * self.k, self.k, dtype=torch.int32)[:, None]
            sums = torch.bincount(places.reshape(-1), terms.view(-1), minlength=rows * self.k)
            total[strip.groups].add_(sums.view(rows, self.k))
        return total.float()

    @torch.no_grad()
    def pull(self, core: Tensor, gradient: Tensor, keep: Tensor | None = None, strength: float = 1.0) -> Tensor:
        """The gradient itself; the centroids get theirs."""
        give_gradient(self.centroids, strength * self.centroid_gradient(gradient, keep))
        return gradient

    @property
    def rungs(self) -> int:
        """As many as there may be on one side of the centroid nearest to zero, which counts as zero."""
        return self.k - 1

    @property
    def follows_scale(self) -> bool:
        """No: centroids are trained."""
        return False

    def ladder(self, core: Tensor) -> tuple[Tensor, Tensor]:
        """How many centroids x lies away from the one nearest to zero, in between linearly; 1/distance of its neighbours."""
        table = self._table().to(core.dtype)
        zero = table.abs().argmin(1)
        codes, rows = split(self.codes, self.group).long(), split(core, self.group)
        here = table.gather(1, codes)
        # Between two centroids the distance is theirs; beyond the last one that to the one before it.
        other = (codes + torch.where(rows < here, -1, 1)).clamp_(0, self.k - 1)
        other = torch.where(other == codes, codes + torch.where(codes == 0, 1, -1), other)
        slope = (table.gather(1, other) - here).abs_().clamp_min_(torch.finfo(torch.float16).tiny).reciprocal_()
        place = (codes - zero[:, None]) + ((rows - here) * slope).clamp_(-0.49, 0.49)
        return _joined(place, self.shape), _joined(slope, self.shape)

    @torch.no_grad()
    def rescale(self, code: Tensor, factor: Tensor) -> Tensor:
        """Multiply the centroids."""
        self._by_channel()
        self.centroids.mul_(factor[:, None])
        self._place_unit()
        return self.value(code)

    def encode(self, writer: Writer, core: Tensor, keep: Tensor) -> None:
        """Store k, group, centroids, indices."""
        writer.integer(self.k)
        write_group(writer, self.group)
        write_numbers(writer, self.scales, self._table().detach(), self.unit)
        write_codes(writer, self.codes, keep, 0, self.k)

    @classmethod
    def decode(cls, reader: Reader, keep: Tensor, dtype: torch.dtype) -> Tensor:
        """Read them: the core's values."""
        k, group = reader.integer(2, 256), read_group(reader, keep)
        # The reader refuses a table that is too large, before there is room for one.
        count, entries = group_counts(tuple(keep.shape), group)
        table = read_numbers(reader, count * k).to(dtype)
        if count == 1:
            return read_values(reader, keep, table)
        codes = read_codes(reader, keep, 0, k, torch.uint8)
        out, start = torch.empty(keep.shape, dtype=dtype), 0
        for part, values in pieces(codes.reshape(-1), out.reshape(-1)):
            place = torch.arange(start, start + len(part)) // entries * k + part
            torch.index_select(table, 0, place, out=values)
            start += len(part)
        return out
