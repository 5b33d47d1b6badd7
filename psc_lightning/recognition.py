"""A plain tensor of few values, seen for what it is: the mask and the levels that give it back, bit for bit.

Whatever made it (levels that have been detached, a checkpoint, another library) and whatever for, a file need not hold
its entries one by one. Only what is cheap to rule out is looked for: a tensor of many values costs a glance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from psc_lightning.levels import LEVELS, ROOTS, Levels
from psc_lightning.masks import MASKS, Mask
from psc_lightning.numerics.functional import Group, split
from psc_lightning.numerics.grid import grid_steps
from psc_lightning.numerics.precision import PRECISIONS, power_of_two
from psc_lightning.slots.chain import Chain
from psc_lightning.slots.layout import Layout
from psc_lightning.slots.slots import HARD, SLOTS, Slots, Spec

__all__ = ["recognise", "same_bits"]

Numbers = npt.NDArray[np.floating[Any]]
Found = tuple[str, dict[str, Any], Levels]
Fits = Callable[[Numbers], bool]

_GLANCE = 4096  # entries to look at before all are
_SPARSE = 16  # a mask is worth its bits where one in so many is zero
_TOP = 127  # multiples of a step, as 8 bits have them
_MOST = 256  # entries of a codebook
_FEW = (2, 3, 4, 8, 16)  # entries of a codebook that a short group may have of its own
_TRIES = 32  # lengths of a group below the longest that its first entries allow
_USUAL = (1024, 512, 256, 128, 64, 32, 16)  # lengths of groups
_SAMPLE = 8  # groups to look at before all are
_OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("ttq", {"group": "channel"}),
    *(("log", {"root": root}) for root in ROOTS),
    ("float16", {}),
    ("bfloat16", {}),
]
_SCALES = ("float16", "log8", "float32")  # the likeliest first


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal in type, shape and bit pattern: 0.0 is not -0.0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(left, right)


@torch.no_grad()
def recognise(weight: Tensor, layout: Layout) -> Iterator[Slots]:
    """Slots at full strength, each of which makes exactly this weight of itself; nothing, where it holds many values.

    They are on the CPU, as the weight must be.

    >>> first, *_ = recognise(torch.tensor([[0.5, -0.5], [0.3125, 0.3125]]).repeat(8, 8), Layout())
    >>> first.specs["levels"].method, first.specs["levels"].options
    ('uniform', {'group': 'tensor', 'scales': 'float16', 'bits': 5})
    """
    core = layout.matrix(weight if weight.dtype == torch.float64 else weight.float()).contiguous()
    for mask, found in _candidates(core):
        slots = _filled(layout, tuple(weight.shape), mask, found)
        if same_bits(slots.make(weight), weight):
            yield slots


def _filled(layout: Layout, shape: tuple[int, ...], mask: Mask | None, found: Found | None) -> Slots:
    slots = Slots(layout, shape)
    if mask is not None:
        slots.fill("mask", Spec("magnitude", {"threshold": mask.threshold}))
    if found is not None:
        slots.fill("levels", Spec(*found[:2]))
    slots.cores["core"] = Chain(mask, None if found is None else found[2])
    for index, slot in enumerate(SLOTS):
        slots.phase[index] = HARD if slot in slots.specs else slots.phase[index]
    return slots


def _candidates(core: Tensor) -> Iterator[tuple[Mask | None, Found | None]]:
    """What may make this core, the likeliest first; whether it does is for the caller to see."""
    if not bool(core.any()) or not bool(core.isfinite().all()):
        return
    for on_grid in _grids(core):
        yield None, on_grid
        if on_grid[0] != "uniform":
            return  # one size, or two with zero: nothing is shorter
    mask = _mask(core) if int(core.count_nonzero()) * _SPARSE <= core.numel() * (_SPARSE - 1) else None
    for found in (*_codebooks(core, mask), *_as_they_are(core)):
        yield mask, found
    if mask is not None:
        yield mask, None


def _mask(core: Tensor) -> Mask:
    """That of the entries which are +0.0."""
    mask = MASKS["magnitude"](tuple(core.shape), threshold=0.5)  # any share but none
    mask.keep.copy_((core != 0) | torch.signbit(core))
    return mask


# -------------------------------------------------------------------------------------------------- which groups


def _groups(core: Tensor, fits: Fits, begins: Fits, fewest: int = 8) -> Iterator[Group]:
    """Which entries may have something in common: all, those of a row, or n neighbours, n above the fewest.

    Args:
        core: all.
        fits: whether entries may be a group.
        begins: whether they may be the first of one.
        fewest: of a group.
    """
    flat, row = core.reshape(-1).numpy(), core.numel() // len(core)
    if fits(flat[:_GLANCE]) and fits(flat):
        yield "tensor"
    if len(core) > 1 and row > fewest and begins(flat[:row]):
        yield "channel"
    low, high = fewest, 2 * fewest
    while high < len(flat) and begins(flat[:high]):
        low, high = high, 2 * high
    if low == fewest or high >= len(flat):
        return
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if begins(flat[:middle]) else (low, middle)
    # The next group may begin with what fits into the first, or be of the same values.
    for length in (*range(low, max(low - _TRIES, fewest), -1), *(n for n in _USUAL if n > fewest)):
        apart = length * max(1, len(flat) // length // _SAMPLE)
        if all(fits(flat[start : start + length]) for start in range(0, len(flat), apart)):
            yield length


def _rows(core: Tensor, group: Group) -> Numbers:
    found: Numbers = split(core, group).numpy()
    return found


# ------------------------------------------------------------------------------------------------------- a grid


def _begins_grid(part: Numbers) -> bool:
    return not part.any() or next(grid_steps(part, _TOP), None) is not None


def _on_grid(part: Numbers) -> bool:
    """Whether its entries have a usual step, or are all zero."""
    if len(np.unique(np.abs(part[:_GLANCE]))) > _TOP + 1:
        return False
    return not part.any() or any(_steps(part[None], scales, thorough=False) is not None for scales in _SCALES)


def _grids(core: Tensor) -> Iterator[Found]:
    """Levels that are whole multiples of a step of their group."""
    for group in _groups(core, _on_grid, lambda part: _on_grid(part) or _begins_grid(part)):
        rows = _rows(core, group)
        for scales in _SCALES:
            if _steps(rows[_some(rows)], scales) is not None and (steps := _steps(rows, scales)) is not None:
                found = _of_steps(core, rows, steps, group, scales)
                yield found
                if isinstance(group, int) or found[0] != "uniform":
                    return
                break


def _steps(rows: Numbers, scales: str, thorough: bool = True) -> Tensor | None:
    """A step for each row, which its entries are whole multiples of, at most 127 of it; None where a row has none."""
    sizes = np.abs(rows)
    highest = sizes.max(1)
    steps = np.zeros(len(rows), dtype=np.float32)
    waiting = np.flatnonzero(highest)
    unit = power_of_two(torch.from_numpy(highest))
    # The smallest size, or the largest over the most that so many bits have: nearly always one of these, rounded as it was.
    for tried in (np.where(sizes == 0, np.inf, sizes).min(1), *(highest / (2**bits - 1) for bits in range(1, 8))):
        near = PRECISIONS[scales].round(torch.from_numpy(tried[waiting].astype(np.float32)), unit).numpy()
        others = (np.nextafter(near, np.float32(side)) for side in (0, np.inf)) if scales == "float32" else ()
        for step in (near, *others):
            with np.errstate(all="ignore"):
                codes = np.rint(sizes[waiting] / step[:, None])
                fits = (codes.max(1) <= _TOP) & (codes * step[:, None] == sizes[waiting]).all(1)
            steps[waiting[fits]] = step[fits]
        waiting = waiting[steps[waiting] == 0]
        if not len(waiting):
            break
    if len(waiting) and not thorough:
        return None
    for index in waiting:
        good = (step for step in grid_steps(rows[index], _TOP) if bool(_exact(torch.tensor([step]), scales)))
        steps[index] = next(good, 0.0)
        if not steps[index]:
            return None
    steps[highest == 0] = steps.max()  # of zeros alone any will do
    return torch.from_numpy(steps)


def _some(rows: Numbers) -> slice:
    """Rows enough to see that a precision is not theirs."""
    return slice(0, max(_SAMPLE, int(rows.any(1).argmax()) + 1))


def _exact(values: Tensor, scales: str) -> Tensor:
    """Which values are stored as they are."""
    return PRECISIONS[scales].round(values, power_of_two(values), positive=False) == values


def _of_steps(core: Tensor, rows: Numbers, steps: Tensor, group: Group, scales: str) -> Found:
    top = int(np.rint(np.abs(rows).max(1) / steps.numpy()).max())
    name = "uniform" if top > 1 else "binary" if bool(core.all()) else "ternary"
    options: dict[str, Any] = {"group": group, "scales": scales}
    if name == "uniform":
        options["bits"] = 1 + top.bit_length()
    levels: Any = LEVELS[name](tuple(core.shape), **options)
    levels.scale.copy_(steps)
    levels.unit.fill_(power_of_two(steps))
    if name == "ternary":
        levels.limit.copy_(steps / 2)
    return name, options, levels


# --------------------------------------------------------------------------------------------------- a codebook


def _codebooks(core: Tensor, mask: Mask | None) -> Iterator[Found]:
    """At most 256 values of all entries, or of those that a mask keeps; or few of a row's, or of n neighbours'."""
    flat = core.reshape(-1).numpy()
    table = _distinct(flat if mask is None else flat[mask.keep.reshape(-1).numpy()])
    if table is not None and 2 * len(table) <= len(flat):
        yield from _of_tables(core, table[None], "tensor")
    for few in _FEW:
        fits = partial(_has_few, most=few)
        for group in _groups(core, fits, fits, 2 * few):
            rows = _rows(core, group)
            if not all(_has_few(row, few) for row in rows[:_SAMPLE]):
                continue
            ordered = np.sort(rows, axis=1)
            new = np.ones(rows.shape, dtype=bool)
            np.not_equal(ordered[:, 1:], ordered[:, :-1], out=new[:, 1:])
            k = int(new.sum(1).max())
            if k <= few:
                tables = np.repeat(ordered[:, -1:], k, axis=1)
                tables[np.nonzero(new)[0], (new.cumsum(1) - 1)[new]] = ordered[new]
                yield from _of_tables(core, tables, group)
                break


def _has_few(values: Numbers, most: int) -> bool:
    return len(np.unique(values)) <= most


def _distinct(values: Numbers) -> Numbers | None:
    """All of them, in order, if they are at most 256."""
    for stop in (_GLANCE, 16 * _GLANCE, len(values)):
        found: Numbers = np.unique(values[:stop])
        if len(found) > _MOST:
            return None
    return found


def _of_tables(core: Tensor, tables: Numbers, group: Group) -> Iterator[Found]:
    centroids = torch.from_numpy(tables.astype(np.float32))
    scales = next((one for one in _SCALES if bool(_exact(centroids, one).all())), None)
    if scales is not None and centroids.shape[1] > 1:
        options: dict[str, Any] = {"k": centroids.shape[1], "group": group, "scales": scales}
        levels: Any = LEVELS["codebook"](tuple(core.shape), **options)
        levels.centroids.copy_(centroids)
        levels.refresh(core)
        levels.unit.fill_(power_of_two(centroids))
        yield "codebook", options, levels


# ------------------------------------------------------------------------------------------------- other methods


def _as_they_are(core: Tensor) -> Iterator[Found]:
    """What finds its own tables again: two sizes and zero, powers of two, half precision."""
    for name, options in _OTHERS:
        try:
            if same_bits(_fitted(name, options, core[:1]).hard(core[:1]), core[:1]):
                yield name, options, _fitted(name, options, core)
        except ValueError:  # beyond float16
            continue


def _fitted(name: str, options: dict[str, Any], core: Tensor) -> Levels:
    levels = LEVELS[name](tuple(core.shape), **options)
    levels.begin(core)
    levels.refresh(core)
    return levels
