"""Any tensor as arrays of bytes, exactly: what no method has made few-valued.

An entry becomes one unsigned word of its own size, and the words become one array per byte, the highest first. So that
equal things meet in one array, a float's word holds exponent, sign, mantissa from the top (IEEE has the sign first, which
tears the exponent in two), and a signed integer's is its zigzag.
"""

from __future__ import annotations

import torch
from torch import Tensor

from psc_lightning.symbols import Reader, Writer, pieces, unzigzag, zigzag

__all__ = ["read_bits", "read_kept", "write_bits"]

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MANTISSA = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}


def _to_words(values: Tensor) -> Tensor:
    width = 8 * values.dtype.itemsize
    if values.dtype == torch.bool or values.dtype == torch.uint8:
        return values.view(torch.uint8)
    if not values.is_floating_point():
        values = values.to(torch.int16) if width == 8 else values
        return zigzag(values, 8 * values.dtype.itemsize)
    mantissa, bits = _MANTISSA[values.dtype], values.view(_WORDS[width // 8])
    fraction, exponent = (1 << mantissa) - 1, (1 << (width - 1)) - (1 << mantissa)
    return ((bits & exponent) << 1) | (((bits >> (width - 1)) & 1) << mantissa) | (bits & fraction)


def _from_words(words: Tensor, dtype: torch.dtype) -> Tensor:
    width = 8 * dtype.itemsize
    if dtype == torch.bool or dtype == torch.uint8:
        return words.view(dtype)
    if not dtype.is_floating_point:
        return unzigzag(words, 8 * words.dtype.itemsize).to(dtype)
    mantissa = _MANTISSA[dtype]
    fraction, exponent = (1 << mantissa) - 1, (1 << (width - 1)) - (1 << mantissa)
    bits = ((words >> 1) & exponent) | (((words >> mantissa) & 1) << (width - 1)) | (words & fraction)
    return bits.view(dtype)


def write_bits(writer: Writer, values: Tensor) -> None:
    """Store a tensor's entries in memory order, bit for bit; bool as one array of size 2, all else a byte an array.

    Of complex numbers first all real parts, then all imaginary ones.
    """
    values = values.detach().cpu().reshape(-1)
    if values.is_complex():
        for part in torch.view_as_real(values.resolve_conj()).unbind(1):
            write_bits(writer, part.contiguous())
        return
    if values.dtype == torch.bool:
        writer.symbols(values.view(torch.uint8), 2)
        return
    planes = torch.empty(values.dtype.itemsize, len(values), dtype=torch.uint8)
    for part, *out in pieces(values, *planes):
        words = _to_words(part)
        for byte, plane in enumerate(reversed(out)):
            plane.copy_(words >> 8 * byte & 255)
    for plane in planes:
        writer.symbols(plane, 256)


def read_bits(reader: Reader, count: int, dtype: torch.dtype) -> Tensor:
    """Read `count` entries of `dtype` that `write_bits` stored."""
    if dtype == torch.bool:
        return reader.symbols(count, 2).view(torch.bool)
    if dtype.is_complex:
        real, imaginary = (read_bits(reader, count, dtype.to_real()) for _ in range(2))
        return torch.complex(real, imaginary)
    planes = [reader.symbols(count, 256) for _ in range(dtype.itemsize)]
    out = torch.empty(count, dtype=dtype)
    for values, *parts in pieces(out, *planes):
        # A signed byte's word is kept in 16 bits, as in `_to_words`.
        words = torch.zeros(len(values), dtype=torch.int16 if dtype == torch.int8 else _WORDS[dtype.itemsize])
        for part in parts:
            words = words << 8 | part
        values.copy_(_from_words(words, dtype))
    return out


def read_kept(reader: Reader, keep: Tensor, stored: torch.dtype, dtype: torch.dtype) -> Tensor:
    """Read the entries that `keep` marks, stored as one type and wanted as another; +0.0 elsewhere."""
    number = int(keep.count_nonzero())
    entries = read_bits(reader, number, stored).to(dtype)
    if number == keep.numel():
        return entries.reshape(keep.shape)
    return torch.zeros(keep.shape, dtype=dtype).masked_scatter_(keep, entries)
