"""What a Parameter was when it was last written here: by that shows what others have written since."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from psc_lightning.sharding import local

__all__ = ["Mark", "total", "trace"]


@dataclass(frozen=True)
class Mark:
    """What a Parameter was when it was last written here."""

    pointer: int
    version: int
    total: int | Tensor  # of its bits, on a device left there: `parameter.data.mul_(…)` shows in nothing else

    @classmethod
    def of(cls, parameter: Tensor) -> Mark:
        """What it is now."""
        return cls(*trace(parameter), total(local(parameter)))


def trace(parameter: Tensor) -> tuple[int, int]:
    """Where a tensor is, and how often it was written to in ways that torch counts."""
    return local(parameter).data_ptr(), parameter._version


def total(data: Tensor) -> int | Tensor:
    """The sum of a tensor's bits, read as whole numbers."""
    found = _sum(data)
    return int(found) if data.device.type == "cpu" else found


def _sum(data: Tensor) -> Tensor:
    data = data.detach()
    try:
        flat = data.as_strided((data.numel(),), (1,)) if _dense(data) else data.reshape(-1)
        whole = data.numel() * data.element_size() // 8 * 8 // data.element_size()
        if flat.storage_offset() * data.element_size() % 8:
            flat = flat.clone()
        found = flat[:whole].view(torch.int64).sum()
        return found if whole == len(flat) else found + flat[whole:].view(torch.uint8).sum()
    except RuntimeError:  # a device without whole numbers of this width
        return (
            data.double().sum().view(torch.int64) if data.device.type == "cpu" else data.float().sum().view(torch.int32)
        )


def _dense(data: Tensor) -> bool:
    """Whether its entries fill one stretch of memory, in whatever order."""
    return data.untyped_storage().nbytes() - data.storage_offset() * data.element_size() >= data.nbytes and (
        data.is_contiguous()
        or (data.dim() == 4 and data.is_contiguous(memory_format=torch.channels_last))
        or (data.dim() == 5 and data.is_contiguous(memory_format=torch.channels_last_3d))
    )
