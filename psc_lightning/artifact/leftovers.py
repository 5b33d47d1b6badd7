"""Tensors outside the slots (biases, BatchNorm, whatever was not selected), several stored as if they were one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from psc_lightning.artifact.directory import Entry, Kind
from psc_lightning.numerics.bits import read_bits, write_bits
from psc_lightning.numerics.precision import PRECISIONS, power_of_two
from psc_lightning.symbols import Reader, Writer

__all__ = ["LEFTOVERS", "Precisions", "check", "decode", "encode", "groups", "kind_of", "stored_as"]

#: one for all, or globs over tensor names → one each: the first that matches counts, what none matches is float32
Precisions = str | Mapping[str, str]

LEFTOVERS = {"float32": Kind.LEFTOVER, "float16": Kind.HALF, "log8": Kind.LOG}

# Small leftovers are stored together: on its own, a bias of ten entries has nothing to learn a distribution from.
_SMALL = 4096
_LOG = PRECISIONS["log8"]
_HIGHEST: dict[torch.dtype | Kind, float] = {torch.float16: 65504.0, Kind.LOG: 2.0**100}
_NAMES: dict[torch.dtype | Kind, str] = {torch.float16: "float16", Kind.LOG: "log8"}


def check(precisions: Precisions, names: Sequence[str]) -> None:
    """See that all that is asked for exists.

    Raises:
        ValueError: an unknown precision, or a glob that matches none of these names.
    """
    given = [precisions] if isinstance(precisions, str) else list(precisions.values())
    for value in given:
        if value not in LEFTOVERS:
            raise ValueError(f"leftovers must be one of {', '.join(LEFTOVERS)}, got {value!r}")
    for pattern in () if isinstance(precisions, str) else precisions:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"leftovers: {pattern!r} matches none of the tensors outside the slots: {', '.join(names)}"
            )


def kind_of(name: str, dtype: torch.dtype, precisions: Precisions) -> Kind:
    """How a leftover is stored; what is no floating-point number, or no wider than asked for, as it is."""
    if not isinstance(precisions, str):
        precisions = next((value for glob, value in precisions.items() if fnmatchcase(name, glob)), "float32")
    kind = LEFTOVERS[precisions]
    return Kind.LEFTOVER if not dtype.is_floating_point or (kind is Kind.HALF and dtype == torch.float16) else kind


def groups(entries: Sequence[Entry]) -> Iterator[list[int]]:
    """What is stored together, in file order: small leftovers of one stored type and one last name; all else alone."""
    found: dict[object, list[int]] = {}
    for index, entry in enumerate(entries):
        if entry.kind is Kind.ALIAS:
            continue
        together = entry.kind is not Kind.SLOTS and entry.numel <= _SMALL
        key = (stored_as(entry), entry.name.rpartition(".")[2]) if together else index
        found.setdefault(key, []).append(index)
    return iter(found.values())


def stored_as(entry: Entry) -> torch.dtype | Kind:
    """The type of its numbers in the file: a float16 of the model's and a float32 rounded to it are the same there."""
    if entry.kind is Kind.LOG:
        return Kind.LOG
    return torch.float16 if entry.kind is Kind.HALF else entry.dtype


def encode(writer: Writer, tensors: Mapping[str, Tensor], stored: torch.dtype | Kind) -> None:
    """Store tensors as one type, one after the other; on the grid each has a unit of its own.

    Raises:
        ValueError: a number that the type cannot hold; its tensor is named.
    """
    parts = [tensor.detach().cpu().reshape(-1) for tensor in tensors.values()]
    rounded = [part.to(torch.float32 if isinstance(stored, Kind) else stored) for part in parts]
    for name, part, whole in zip(tensors, rounded, parts, strict=True):
        narrowed = stored in _HIGHEST and whole.dtype != stored and part.numel()
        if narrowed and not float(part.abs().max()) <= _HIGHEST[stored]:
            raise ValueError(
                f"{name}: expected numbers up to {_HIGHEST[stored]:g} for leftovers={_NAMES[stored]!r}, found "
                f"{float(whole.abs().max()):g}: use leftovers='float32'"
            )
    if isinstance(stored, Kind):
        units = [float(power_of_two(part)) for part in rounded]
        for unit in units:
            writer.integer(math.frexp(unit)[1] - 1)
        _LOG.write(writer, torch.cat([part / unit for part, unit in zip(rounded, units, strict=True)]), 1.0)
    else:
        write_bits(writer, torch.cat(rounded))


def decode(reader: Reader, entries: Sequence[Entry]) -> list[Tensor]:
    """Read what was stored together."""
    numbers, stored = [entry.numel for entry in entries], stored_as(entries[0])
    if isinstance(stored, Kind):
        units = [math.ldexp(1.0, reader.integer(-100, 100)) for _ in entries]
        joined = _LOG.read(reader, sum(numbers), 1.0)
        parts = [part * unit for part, unit in zip(torch.split(joined, numbers), units, strict=True)]
    else:
        parts = list(torch.split(read_bits(reader, sum(numbers), stored), numbers))
    # Own memory for each: a caller who keeps one bias should not keep all of them.
    return [part.reshape(entry.shape).to(entry.dtype, copy=True) for part, entry in zip(parts, entries, strict=True)]
