"""Where two sets of tensors differ, bit for bit: `psc diff`, `psc verify --against`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from psc_lightning.report.numbers import Report
from psc_lightning.report.table import render

__all__ = ["Difference", "difference_dict", "difference_table", "differences"]

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 1 << 20  # entries compared at a time


@dataclass(frozen=True)
class Difference:
    """One name in two sets of tensors.

    Attributes:
        name: the tensor's name.
        shapes: its shape in each; None where it is missing.
        dtypes: its type in each, as in `float32`; None where it is missing.
        differing: how many entries have other bits (0.0 and -0.0 do); None where shapes or types differ.
        max_abs_difference: the largest absolute difference; None where shapes or types differ, or it is not a number.
    """

    name: str
    shapes: tuple[tuple[int, ...] | None, tuple[int, ...] | None]
    dtypes: tuple[str | None, str | None]
    differing: int | None = None
    max_abs_difference: float | None = None

    @property
    def equal(self) -> bool:
        """Both have the same type, shape and bits."""
        return self.differing == 0

    def text(self, first: str, second: str) -> str:
        """The difference in words.

        Args:
            first: what to call the first set.
            second: what to call the second.
        """
        if None in self.shapes:
            return f"{self.name} is only in {second if self.shapes[0] is None else first}"
        if self.differing is None:
            found = [f"{dtype} {list(shape or ())}" for dtype, shape in zip(self.dtypes, self.shapes)]
            return f"{self.name} is {found[0]} in {first}, {found[1]} in {second}"
        return f"{self.name} in {self.differing} entries, by up to {self.max_abs_difference}"


def differences(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> list[Difference]:
    """Compare two sets of tensors, name by name, in the order of the first; then those that only the second has.

    >>> a, b = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.5, 0.0]), "n": torch.tensor(1)}
    >>> [difference.text("A", "B") for difference in differences(a, b)]
    ['w in 1 entries, by up to 0.5', 'n is only in B']
    """
    once: dict[tuple[int, int], Difference] = {}  # tensors that have many names are compared once
    found = []
    for name in {**first, **second}:
        key = id(first.get(name)), id(second.get(name))
        if key not in once:
            once[key] = _compare(name, first.get(name), second.get(name))
        found.append(replace(once[key], name=name))
    return found


def difference_dict(found: Sequence[Difference], reports: tuple[Report, Report]) -> dict[str, Any]:
    """Differences and sizes as dictionaries, lists, numbers and strings: `psc diff --json`."""
    sizes = _sizes(reports)
    return {
        "equal": all(one.equal for one in found),
        "file_bytes": [report.file_bytes for report in reports],
        "sha256": [report.sha256 for report in reports],
        "tensors": [{**asdict(one), "stored_bytes": [size.get(one.name) for size in sizes]} for one in found],
    }


def difference_table(
    found: Sequence[Difference], reports: tuple[Report, Report], paths: tuple[str, str], all_tensors: bool = False
) -> str:
    """Differences and sizes as a table: `psc diff`.

    Args:
        found: what was compared.
        reports: of the two files.
        paths: what to call them, below the table.
        all_tensors: a row for each equal tensor too.
    """
    sizes = _sizes(reports)
    rows: list[tuple[str, ...]] = []
    equal = [one for one in found if one.equal]
    for one in found if all_tensors else (one for one in found if not one.equal):
        a, b = (
            "missing" if shape is None else f"{'x'.join(map(str, shape)) or '-'} {dtype}"
            for shape, dtype in zip(one.shapes, one.dtypes)
        )
        entries = math.prod(one.shapes[0] or ())
        share = "" if one.differing is None else f"{100 * one.differing / max(entries, 1):.1f}"
        largest = "" if one.max_abs_difference is None else f"{one.max_abs_difference:.3g}"
        in_bytes = [f"{size[one.name]:,}" if one.name in size else "" for size in sizes]
        rows.append((one.name, a, "" if a == b else b, share, largest, *in_bytes))
    if equal and not all_tensors:
        in_bytes = [f"{sum(size[one.name] for one in equal):,}" for size in sizes]
        rows.append((f"{len(equal)} equal", "", "", "", "", *in_bytes))
    overhead = [f"{report.overhead_bytes:,}" for report in reports]
    rows.append(("names, header, checksum", "", "", "", "", *overhead))
    columns = [("tensor", "file", "left"), ("A", "", "left"), ("B", "", "left")]
    columns += [("differing %", "", "right"), ("max |A - B|", "", "right")]
    columns += [(f"bytes {which}", f"{report.file_bytes:,}", "right") for which, report in zip("AB", reports)]
    return "\n".join((render(columns, rows), f"A {paths[0]}", f"B {paths[1]}"))


def _sizes(reports: tuple[Report, Report]) -> tuple[dict[str, int], dict[str, int]]:
    first, second = ({row.name: row.stored_bytes for row in report.tensors} for report in reports)
    return first, second


def _compare(name: str, first: Tensor | None, second: Tensor | None) -> Difference:
    both = (first, second)
    shapes = tuple(None if tensor is None else tuple(tensor.shape) for tensor in both)
    dtypes = tuple(None if tensor is None else str(tensor.dtype).removeprefix("torch.") for tensor in both)
    differing, largest = None, None
    if first is not None and second is not None and first.dtype == second.dtype and first.shape == second.shape:
        differing, largest = _by_entry(first, second)
    return Difference(name, (shapes[0], shapes[1]), (dtypes[0], dtypes[1]), differing, largest)


def _by_entry(first: Tensor, second: Tensor) -> tuple[int, float | None]:
    differing, largest = 0, 0.0
    both = [torch.view_as_real(one.resolve_conj()) if one.is_complex() else one for one in (first, second)]
    flat = [tensor.detach().cpu().contiguous().reshape(-1) for tensor in both]
    for a, b in zip(*(torch.split(tensor, _BLOCK) for tensor in flat), strict=True):
        words = _WORDS[a.dtype.itemsize]
        other = a.view(words) != b.view(words)
        if other.any():
            differing += int(other.sum())
            distance = (a[other].double() - b[other].double()).abs().max().item()
            largest = max(largest, distance) if distance == distance else distance
    return differing, largest if largest < float("inf") else None
