"""Codebook levels: k trained centroids a group."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from psc_lightning.functional import (
    Group,
    group_counts,
    kmeans_1d,
    split,
    spread,
    straight_through,
)
from psc_lightning.levels.base import Levels, Shape, read_codes, read_group, read_values, write_codes, write_group
from psc_lightning.precision import power_of_two, read_numbers, write_numbers
from psc_lightning.symbols import Reader, Writer, pieces

__all__ = ["CodebookLevels"]


class CodebookLevels(Levels):
    """``x̂ = c[argmin_j |x - c_j|]``: the nearest of k centroids, found by k-means and then trained.

    Pseudo-gradient: ∂/∂x = g; ∂/∂c_j = Σ g over the entries of cluster j.
    Stored: a code of at most log2 k bits an entry, entropy-coded; k · 16 bits a group; one exponent.

    Args:
        k: 2 … 256 centroids.
        group: which entries share a codebook (default the tensor: a codebook a channel costs more than it gives).
        scales: what the centroids are stored as, and rounded to: `float32`, `float16` or `log8`.

    >>> levels = CodebookLevels((1, 4), k=2, group="tensor")
    >>> x = torch.tensor([[1.0, 2.0, -4.0, -6.0]], requires_grad=True)
    >>> keep = torch.ones(1, 4, dtype=torch.bool)
    >>> levels.begin(x, keep); levels.refresh(x, keep)
    >>> out = levels(x)
    >>> (out * torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    >>> out.tolist(), x.grad.tolist(), levels.centroids.grad.tolist()
    ([[1.5, 1.5, -5.0, -5.0]], [[1.0, 2.0, 3.0, 4.0]], [[7.0, 3.0]])

    Source: Han et al. 2016, "Deep Compression", §3, eq. 2-3; here the weights move too (straight-through) and may change
    their cluster at every refresh.
    """

    code_number = 6

    unit: Tensor
    codes: Tensor

    def __init__(self, shape: Shape, k: int = 16, group: Group = "tensor", scales: str = "float16") -> None:
        super().__init__(shape, group, scales)
        self.k = k
        count, _ = group_counts(shape, group)
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.int32))
        self.centroids = nn.Parameter(torch.zeros(count, k))

    @torch.no_grad()
    def begin(self, core: Tensor, keep: Tensor) -> None:
        """Place the centroids by k-means."""
        self.centroids.copy_(kmeans_1d(split(core, self.group), split(keep, self.group), self.k))
        self.unit.fill_(power_of_two(self.centroids))

    @torch.no_grad()
    def refresh(self, core: Tensor, keep: Tensor) -> None:
        """Put the centroids in order and find the nearest of each entry."""
        # A trained centroid may have passed its neighbour; the optimizer's state moves with neither: a swap is rare.
        self.centroids.copy_(self.centroids.sort(1).values)
        self.unit.clamp_(min=power_of_two(self.centroids))
        table = self.precision.round(self.centroids, self.unit, positive=False)
        middles = (table[:, 1:] + table[:, :-1]) / 2
        values = split(core, self.group).to(middles.dtype)
        nearest = torch.searchsorted(middles, values, out_int32=True)
        self.codes.copy_(nearest.reshape(-1)[: core.numel()].reshape(self.shape))

    def _table(self) -> Tensor:
        return straight_through(
            self.precision.round(self.centroids.detach(), self.unit, positive=False), self.centroids
        )

    def code(self, core: Tensor) -> Tensor:
        """The nearest centroid's index, as of the last refresh."""
        return self.codes

    def value(self, code: Tensor) -> Tensor:
        """The centroid of each index; differentiable in the centroids."""
        return self._gather(self._table(), code)

    def _gather(self, table: Tensor, code: Tensor) -> Tensor:
        table = table.reshape(-1)
        if table.numel() > self.k:
            first = torch.arange(0, table.numel(), self.k, dtype=torch.int32, device=code.device)
            code = code + spread(first, self.shape, self.group)
        # index_select, never table[index]: the latter's gradient differs from run to run
        return table.index_select(0, code.reshape(-1)).reshape(self.shape)

    def forward(self, core: Tensor) -> Tensor:
        """The centroids, with gradients to them and straight through to the core."""
        return straight_through(self.value(self.codes), core)

    @torch.no_grad()
    def rescale(self, code: Tensor, factor: Tensor) -> Tensor:
        """Multiply the centroids."""
        self._by_channel()
        self.centroids.mul_(factor[:, None])
        self.unit.fill_(power_of_two(self.centroids))
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
