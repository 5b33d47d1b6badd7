"""Whether numbers lie on a grid around zero already: then its step is the one to start from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["grid_steps"]

_GLANCE = 4096  # entries to look at before all are sorted


def grid_steps(values: npt.NDArray[np.floating[Any]], top: int, zero: bool = True) -> Iterator[float]:
    """Float32 steps s > 0, the larger first, with which every value is a whole multiple of s, at most `top` of it, exactly.

    Tried are the smallest magnitude, the smallest gap, and the largest magnitude over 1 … top: on a grid that is used
    at both ends one of them is its step. None for zeros alone: any step would do.

    Args:
        values: float32 or float64.
        top: the largest multiple.
        zero: whether 0 · s counts; if not, values are ±s … ±top · s.

    >>> list(grid_steps(np.array([0.5, -1.0, 0.0], dtype=np.float32), 2))
    [0.5]
    >>> list(grid_steps(np.array([0.5, -1.1, 0.0], dtype=np.float32), 2))
    []
    """
    if len(np.unique(np.abs(values[:_GLANCE]))) > top + 1:
        return
    sizes = np.unique(np.abs(values))
    used = sizes[sizes > 0]
    if len(sizes) > top + 1 or not len(used) or not np.isfinite(sizes[-1]) or (not zero and sizes[0] == 0):
        return
    gaps = np.diff(np.concatenate((np.zeros(1, dtype=sizes.dtype), used)))
    tried = np.concatenate((used[:1], [gaps.min()], used[-1] / np.arange(1, top + 1).astype(sizes.dtype)))
    for step in np.unique(tried.astype(np.float32))[::-1]:
        if step <= 0:
            continue
        with np.errstate(over="ignore"):  # a step may be tiny
            multiples = np.rint(sizes / step)
        if multiples[-1] <= top and np.array_equal(multiples * step, sizes):
            yield float(step)
