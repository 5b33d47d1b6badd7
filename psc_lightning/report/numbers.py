"""What a .psc file holds and what it costs: the numbers of `report.json` and the table on the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from psc_lightning.files import Place, write_atomic
from psc_lightning.report.table import render
from psc_lightning.strict_json import json_text

__all__ = ["Report", "TensorReport"]

_MANY = 8  # more plain tensors than this share one row of the table


@dataclass(frozen=True)
class TensorReport:
    """One tensor of the file.

    Attributes:
        name: its key in the plain state dict.
        layer_type: class of the layer that owns it; empty where only the file is known.
        shape: its shape.
        core_shape: shape of what is stored after tying (output axis first); for several factors one shape each.
        method: the filled slots, as in `cross_channel+magnitude+uniform`; `plain` without any; `shared` for a tensor
            that is an earlier one under another name.
        dense_bytes: its size in memory; 0 if shared.
        stored_bytes: its part of the file; small plain tensors that are stored together share by number of entries.
        sparsity: share of zeros among the stored entries (those of the cores, where there is a tying), 0 … 1.
        levels: the largest number of distinct values, zero included, in one row of a core; None if plain.
    """

    name: str
    layer_type: str
    shape: tuple[int, ...]
    core_shape: tuple[int, ...] | tuple[tuple[int, ...], ...]
    method: str
    dense_bytes: int
    stored_bytes: int
    sparsity: float
    levels: int | None


@dataclass
class Report:
    """A file and its tensors; the attributes are the keys of `report.json`, and `str(report)` is a table.

    Attributes:
        dense_bytes: elements × element size over the plain state dict, shared tensors once.
        file_bytes: length of the file: the tensors' `stored_bytes` and `overhead_bytes`, nothing else.
        compression_ratio: dense_bytes / file_bytes.
        entropy_bytes: order-0 entropy of all stored symbols, without names and header; a coding with contexts may stay
            below it, one that has to learn a distribution is above.
        overhead_bytes: header, names, shapes, checksum, and the last bits of the entropy coder.
        sha256: of the file, 64 hexadecimal digits; None in a report of earlier versions.
        batchnorm_batches: training batches from which BatchNorm's statistics were taken anew, of the weights as they are
            stored; 0: they are running averages of training; None: there is no BatchNorm, or only the file is known.
        stored_as: how what is outside the slots is stored, and why, where that was chosen; else empty.
        notes: what whoever made the report has to say of it, a sentence each: that something went wrong, and what to try.
        metrics: what the caller measured, as in `{"dense": {"accuracy": 0.97}, "compressed": {…}}`.
        tensors: one entry a tensor, in plain order.
    """

    dense_bytes: int
    file_bytes: int
    compression_ratio: float
    entropy_bytes: int
    overhead_bytes: int
    sha256: str | None = field(default=None, kw_only=True)
    metrics: dict[str, Any] = field(default_factory=dict)
    batchnorm_batches: int | None = field(default=None, kw_only=True)
    stored_as: str = field(default="", kw_only=True)
    notes: list[str] = field(default_factory=list, kw_only=True)
    tensors: list[TensorReport] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The content of `report.json`: dictionaries, lists, numbers, strings and None (a number that is not finite) only."""
        plain: dict[str, Any] = json.loads(json_text(asdict(self)))
        return plain

    def save(self, path: Place) -> None:
        """Write `report.json`, as a whole or not at all."""
        write_atomic(path, f"{json_text(asdict(self))}\n".encode())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The report with this `to_dict`."""

        def deep(value: Any) -> Any:
            return tuple(map(deep, value)) if isinstance(value, list) else value

        tensors = [TensorReport(**{key: deep(value) for key, value in row.items()}) for row in values["tensors"]]
        return cls(**{**values, "tensors": tensors})

    def __str__(self) -> str:
        return self.table()

    def table(self, all_tensors: bool = False, width: int = 160) -> str:
        """The report as text.

        Args:
            all_tensors: a row for each plain tensor too, where there are many.
            width: columns available, at least 80.
        """
        smaller = f"{self.compression_ratio:.2f}x smaller"
        columns = [("#", "", "right"), ("tensor", "file", "left"), ("layer", "", "left"), ("shape", "", "left")]
        columns += [
            ("core", "", "left"),
            ("method", smaller, "left"),
            ("zeros %", "", "right"),
            ("levels", "", "right"),
        ]
        columns += [
            ("dense bytes", f"{self.dense_bytes:,}", "right"),
            ("stored bytes", f"{self.file_bytes:,}", "right"),
        ]
        rows: list[tuple[str, ...]] = []
        plain = [row for row in self.tensors if row.method == "plain"]
        grouped = not all_tensors and len(plain) > _MANY
        for index, row in enumerate(self.tensors):
            if grouped and row.method == "plain":
                continue
            cells = (row.name, row.layer_type, _shape(row.shape))
            core = "" if row.core_shape == row.shape else _shape(row.core_shape)
            levels = "" if row.levels is None else str(row.levels)
            sizes = (f"{row.dense_bytes:,}", f"{row.stored_bytes:,}")
            rows.append((str(index), *cells, core, row.method, f"{100 * row.sparsity:.1f}", levels, *sizes))
        if grouped:
            dense, stored = sum(row.dense_bytes for row in plain), sum(row.stored_bytes for row in plain)
            rows.append(("", f"{len(plain)} others", "", "", "", "plain", "", "", f"{dense:,}", f"{stored:,}"))
        rows.append(("", "names, header, checksum", "", "", "", "", "", "", "", f"{self.overhead_bytes:,}"))
        metrics = [
            f"{stage}: "
            + ", ".join(f"{name} {math.nan if value is None else value:.4g}" for name, value in values.items())
            for stage, values in self.metrics.items()
        ]
        taken = self.batchnorm_batches
        source = "running averages of training" if taken == 0 else f"taken anew from {taken} training batches"
        norms = [] if taken is None else [f"BatchNorm's statistics: {source}"]
        told = [*norms, *([f"outside the slots: {self.stored_as}"] if self.stored_as else [])]
        return "\n".join([render(columns, rows, width), *metrics, *told, *(f"note: {note}" for note in self.notes)])


def _shape(shape: tuple[int, ...] | tuple[tuple[int, ...], ...]) -> str:
    """`64x3x3`, factors joined by ` + `, `-` for a single number."""
    if shape and isinstance(shape[0], tuple):
        return " + ".join(_shape(factor) for factor in shape if isinstance(factor, tuple))
    return "x".join(map(str, shape)) or "-"
