"""Tensors outside the slots (biases, BatchNorm, whatever was not selected), several stored as if they were one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from psc_lightning.bits import read_bits, write_bits
from psc_lightning.symbols import Reader, Writer

__all__ = ["decode", "encode"]


def encode(writer: Writer, tensors: Sequence[Tensor]) -> None:
    """Store tensors of one dtype, one after the other."""
    write_bits(writer, torch.cat([tensor.detach().cpu().reshape(-1) for tensor in tensors]))


def decode(reader: Reader, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Read tensors of these shapes, stored together."""
    numbers = [torch.Size(shape).numel() for shape in shapes]
    parts = torch.split(read_bits(reader, sum(numbers), dtype), numbers)
    # Own memory for each: a caller who keeps one bias should not keep all of them.
    return [part.reshape(shape).clone() for part, shape in zip(parts, shapes, strict=True)]
