"""What a general compressor makes of a dense network: the size that a file of ours is to be compared with."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["general_size"]

_LEVEL = {"zstd": 9, "zlib": 6}
_MOST = {"zstd": 1 << 27, "zlib": 1 << 25}  # bytes: about a second of one core


def general_size(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Compress the bytes of a state dict, with zstandard where it is installed, else with zlib.

    Args:
        state: the tensors; those that share memory count once.

    Returns:
        `name` of the compressor with its level, and `bytes`; None where it would take more than about a second.

    >>> general_size({"weight": torch.zeros(4096)})["bytes"] < 100
    True
    """
    try:
        import zstandard
    except ModuleNotFoundError:
        kind, machine = "zlib", zlib.compressobj(_LEVEL["zlib"])
    else:
        kind, machine = "zstd", zstandard.ZstdCompressor(level=_LEVEL["zstd"]).compressobj()
    tensors = {(one.data_ptr(), one.shape): one for one in state.values()}
    if sum(one.numel() * one.element_size() for one in tensors.values()) > _MOST[kind]:
        return None
    size = 0
    for one in tensors.values():
        data = one.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        size += len(machine.compress(data.numpy().tobytes()))
    return {"name": f"{kind} level {_LEVEL[kind]}", "bytes": size + len(machine.flush())}
