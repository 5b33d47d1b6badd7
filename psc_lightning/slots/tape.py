"""What a file says of a tensor, kept as it was read: to write it again, or to read it once more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from psc_lightning.slots.stored import Stored, decode
from psc_lightning.symbols import Reader, Writer, look_up

__all__ = ["Recorder", "Tape"]

#: an integer; or symbols, their size, and which places of a matrix they take. Nothing of ours: it is pickled with a model.
Item = int | tuple[Tensor, int, Tensor | None]


@dataclass(frozen=True, eq=False)
class Tape:
    """A tensor as a file holds it: a byte an entry in memory, or two."""

    items: list[Item]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def stored(self, latent: Tensor) -> Stored:
        """Read it once more."""
        return decode(_Player(self.items), self.shape, self.dtype)

    def encode(self, writer: Writer, latent: Tensor) -> None:
        """Write it again."""
        for item in self.items:
            if isinstance(item, int):
                writer.integer(item)
            else:
                writer.symbols(*item)


class Recorder:
    """A `psc_lightning.symbols.Reader` that keeps what it reads."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.items: list[Item] = []

    def integer(self, low: int, high: int) -> int:
        """Read one."""
        self.items.append(self.reader.integer(low, high))
        return self.items[-1]  # type: ignore[return-value]  # just appended

    def symbols(self, count: int, size: int, grid: Tensor | None = None) -> Tensor:
        """Read some; a grid that marks all takes no memory."""
        found = self.reader.symbols(count, size, grid)
        if grid is not None and bool(grid.all()):
            grid = grid.new_ones(()).expand(grid.shape)
        self.items.append((found, size, grid))
        return found

    def values(self, count: int, table: Tensor, grid: Tensor | None = None) -> Tensor:
        """Read some, and look them up."""
        return look_up(table.numpy(), self.symbols(count, len(table), grid).numpy())


class _Player:
    """A `psc_lightning.symbols.Reader` of what was kept."""

    def __init__(self, items: list[Item]) -> None:
        self._items = iter(items)

    def integer(self, low: int, high: int) -> int:
        """Give the next."""
        item = next(self._items)
        assert isinstance(item, int)
        return item

    def symbols(self, count: int, size: int, grid: Tensor | None = None) -> Tensor:
        """Give the next."""
        item = next(self._items)
        assert not isinstance(item, int)
        return item[0]

    def values(self, count: int, table: Tensor, grid: Tensor | None = None) -> Tensor:
        """Give the next, looked up."""
        return look_up(table.numpy(), self.symbols(count, len(table), grid).numpy())
