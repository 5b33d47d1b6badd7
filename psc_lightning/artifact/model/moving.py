"""Where tensors that were read are put: torch.load's `map_location`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["MapLocation", "moved"]

#: a device, devices by name, or what makes another storage of a storage on the CPU (None: leave it there)
MapLocation = str | torch.device | Mapping[str, str] | Callable[[torch.UntypedStorage, str], Any] | None


def moved(tensors: Mapping[str, Tensor], map_location: MapLocation) -> dict[str, Tensor]:
    """Tensors on the CPU, elsewhere; one under two names stays one.

    >>> weight = torch.zeros(2)
    >>> found = moved({"a": weight, "b": weight}, "meta")
    >>> found["a"] is found["b"], found["a"].device.type
    (True, 'meta')
    """
    once = {id(tensor): tensor for tensor in tensors.values()}
    once = {key: _moved(tensor, map_location) for key, tensor in once.items()}
    return {name: once[id(tensor)] for name, tensor in tensors.items()}


def _moved(tensor: Tensor, map_location: MapLocation) -> Tensor:
    if isinstance(map_location, Mapping):
        map_location = map_location.get("cpu")
    if map_location is None:
        return tensor
    if not callable(map_location):
        return tensor.to(map_location)
    storage = map_location(tensor.untyped_storage(), "cpu")
    if storage is None:
        return tensor
    there = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    return there.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
