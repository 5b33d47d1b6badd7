"""What many tests use: a file in memory, and equality of bit patterns."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from psc_lightning.symbols import look_up

# One thread: the same numbers on every machine, and tests that do not fight for cores.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


# Their fixtures train or build for long: they come first, so that no other process takes half of such a module at the end.
FIRST = {"test_fsdp", "test_ddp", "test_spawn", "test_wheel", "test_zoo", "test_recipes"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in FIRST)


class Tape:
    """A Writer and a Reader that hold both sides to the letter of `psc_lightning.symbols`."""

    def __init__(self) -> None:
        self.items: list[int | tuple[Tensor, int]] = []
        self.at = 0

    def integer(self, *value_or_bounds: int) -> int:
        if len(value_or_bounds) == 1:
            (value,) = value_or_bounds
            assert type(value) is int
            self.items.append(value)
            return value
        low, high = value_or_bounds
        value = self.items[self.at]
        self.at += 1
        assert isinstance(value, int)
        if not low <= value <= high:
            raise ValueError(f"{value} is not in {low} … {high}")
        return value

    def symbols(self, values: Tensor | int, size: int, grid: Tensor | None = None) -> Tensor:
        assert 1 <= size <= 65536
        if isinstance(values, Tensor):
            assert values.dtype == (torch.uint8 if size <= 256 else torch.int32)
            assert values.dim() == 1
            assert values.numel() == 0 or 0 <= int(values.min()) <= int(values.max()) < size
            self.items.append((values.clone(), size))
            return values
        item = self.items[self.at]
        self.at += 1
        assert isinstance(item, tuple)
        assert (len(item[0]), item[1]) == (values, size)
        return item[0].clone()

    def values(self, count: int, table: Tensor, grid: Tensor | None = None) -> Tensor:
        return look_up(table.numpy(), self.symbols(count, len(table), grid).numpy())

    @property
    def finished(self) -> bool:
        return self.at == len(self.items)


def _same(a: Tensor, b: Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    left, right = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(left, right)


@pytest.fixture(scope="session")
def tape() -> type[Tape]:
    return Tape


@pytest.fixture(scope="session")
def same_bits() -> Callable[[Tensor, Tensor], bool]:
    """Same type, shape and bit pattern: `torch.equal` takes -0.0 for 0.0."""
    return _same
