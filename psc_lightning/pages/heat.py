"""Where settings spend their bits: each layer's bits a weight and zeros, setting by setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psc_lightning.pages.front import Point
from psc_lightning.pages.jobs import Job

__all__ = ["Heat", "heat_of"]

_ROWS, _COLUMNS = 40, 40


@dataclass(frozen=True)
class Heat:
    """A map of settings by layers.

    Attributes:
        rows: indices of the points, from the smallest file.
        layers: names of the tensors, in the order of the network.
        bits: for each row and layer stored bits a weight; None where that network has no such layer.
        zeros: the share of zeros, likewise.
        left_rows, left_layers: how many settings and tensors are not shown.
    """

    rows: tuple[int, ...]
    layers: tuple[str, ...]
    bits: tuple[tuple[float | None, ...], ...]
    zeros: tuple[tuple[float | None, ...], ...]
    left_rows: int
    left_layers: int


def heat_of(jobs: Sequence[Job], points: Sequence[Point], front: Sequence[int]) -> Heat:
    """Choose the settings of the front, then others spread evenly over the sizes; and the largest layers.

    Of a setting with several seeds the first run is shown.
    """
    order = sorted(range(len(points)), key=lambda index: points[index].size)
    rest = [index for index in order if index not in set(front)]
    room = max(_ROWS - len(front), 0)
    chosen = {*front[:_ROWS], *(rest[len(rest) * place // room] for place in range(room) if rest)}
    rows = tuple(index for index in order if index in chosen)
    tensors = [_tensors(jobs[points[index].jobs[0]]) for index in rows]
    sizes: dict[str, int] = {}
    for row in tensors:
        for name, tensor in row.items():
            sizes[name] = max(sizes.get(name, 0), tensor.get("dense_bytes") or 0)
    largest = set(sorted(sizes, key=lambda name: -sizes[name])[:_COLUMNS])
    layers = tuple(name for name in sizes if name in largest)
    return Heat(
        rows,
        layers,
        tuple(tuple(_bits(row.get(name)) for name in layers) for row in tensors),
        tuple(tuple(row[name].get("sparsity") if name in row else None for name in layers) for row in tensors),
        len(points) - len(rows),
        len(sizes) - len(layers),
    )


def _tensors(job: Job) -> dict[str, Mapping[str, Any]]:
    """The tensors with two axes or more, where most of the weights are."""
    return {
        row["name"]: row
        for row in job.report.get("tensors") or ()
        if len(row.get("shape", ())) > 1 and row.get("method") != "shared"
    }


def _bits(tensor: Mapping[str, Any] | None) -> float | None:
    """
    >>> _bits({"shape": [4, 8], "stored_bytes": 6})
    1.5
    """
    if tensor is None or not (entries := math.prod(tensor["shape"])):
        return None
    return float(8 * tensor["stored_bytes"] / entries)
