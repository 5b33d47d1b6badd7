"""Which entries are the smallest: the selection behind every mask, in the order (score, tiebreak, index), exact.

Rows of scores are selected at once by a partition. One long row on the CPU, a whole tensor's, is read in strips and
never copied: a sample tells between which two numbers the cut must lie, a pass counts what lies below them and takes
out the few entries between, and the cut is found among these.

Source: Floyd and Rivest 1975, "Expected time bounds for selection"; the bounds are only a guess, what follows from them
is counted, and a wrong guess costs a partition of all.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from psc_lightning.numerics.asking import Question, answer

__all__ = ["Reader", "choose", "largest", "magnitudes", "mark_largest", "numbers"]

Floats = npt.NDArray[np.float32]
#: Gives the entries from … to as float32, in memory that the next call may use again.
Reader = Callable[[int, int], Floats]

_STRIP = 1 << 16
_SAMPLE = 61  # one entry of so many; a prime, so that it meets all columns of a matrix
_FEW = 1 << 13  # entries: below, no guess is worth its while


def _strips(n: int) -> list[tuple[int, int]]:
    return [(start, min(start + _STRIP, n)) for start in range(0, n, _STRIP)]


def numbers(row: Tensor) -> Reader:
    """Read a flat tensor on the CPU as it is.

    >>> numbers(torch.tensor([1.0, -2.0]))(1, 2).tolist()
    [-2.0]
    """
    row = row.detach()
    return lambda start, stop: row[start:stop].float().numpy()


def magnitudes(row: Tensor) -> Reader:
    """Read a flat tensor on the CPU as |x|.

    >>> magnitudes(torch.tensor([1.0, -2.0]))(1, 2).tolist()
    [2.0]
    """
    row, scratch = row.detach(), np.empty(min(_STRIP, len(row)), dtype=np.float32)
    return lambda start, stop: np.abs(row[start:stop].float().numpy(), out=scratch[: stop - start])


def _guess(read: Reader, n: int, place: int) -> tuple[float, float]:
    """Two numbers with the `place`-th smallest of n between them, very likely."""
    sample = np.concatenate([read(start, stop)[::_SAMPLE] for start, stop in _strips(n)])
    share = place / n
    margin = 4 * (len(sample) * share * (1 - share)) ** 0.5 + 2
    low, high = int(len(sample) * share - margin), int(len(sample) * share + margin) + 1
    inside = [rank for rank in (low, high) if 0 <= rank < len(sample)]
    ordered = np.partition(sample, inside) if inside else sample
    bottom = float(ordered[low]) if low in inside else -np.inf
    top = float(ordered[high]) if high in inside else np.inf
    return (-np.inf if np.isnan(bottom) else bottom), (np.inf if np.isnan(top) else top)


def _cut(read: Reader, n: int, place: int) -> tuple[float, int, int]:
    """The `place`-th smallest entry of n (from 1), how many are smaller, and how many are equal to it."""
    marks, between = np.empty(min(_STRIP, n), dtype=bool), np.empty(min(_STRIP, n), dtype=bool)
    if n > _FEW:
        low, high = _guess(read, n, place)
        below, found, equal = 0, [], 0
        for start, stop in _strips(n):
            part, below_, between_ = read(start, stop), marks[: stop - start], between[: stop - start]
            below += int(np.count_nonzero(np.less(part, low, out=below_)))
            if low == high:  # a sample full of one number: so are the scores that no gradient has reached
                equal += int(np.count_nonzero(np.equal(part, low, out=between_)))
                continue
            np.less_equal(part, high, out=between_)
            found.append(part[np.greater(between_, below_, out=between_)])
        if below < place <= below + equal:
            return low, below, equal
        inner = np.concatenate(found) if found else np.empty(0, dtype=np.float32)
        if below < place <= below + len(inner):
            return _of(inner, place, below)
    return _of(np.concatenate([read(start, stop).copy() for start, stop in _strips(n)]), place, 0)


def _of(entries: Floats, place: int, below: int) -> tuple[float, int, int]:
    """`_cut` among entries of which no copy is needed, `below` others being smaller than all."""
    entries.partition(place - below - 1)
    cut = entries[place - below - 1]
    return float(cut), below + int(np.count_nonzero(entries < cut)), int(np.count_nonzero(entries == cut))


def mark_largest(read: Reader, tiebreak: Reader | None, zeros: int, kept: npt.NDArray[np.bool_]) -> None:
    """Set `kept` to false for the `zeros` smallest entries and to true for the others.

    Args:
        read: the scores.
        tiebreak: which of equal scores is smaller; None: the first.
        zeros: how many, fewer than there are.
        kept: a flat array to write to, an entry a score.

    >>> kept = np.empty(4, dtype=bool)
    >>> mark_largest(magnitudes(torch.tensor([-3.0, 1.0, 2.0, -1.0])), None, 1, kept)
    >>> kept.tolist()
    [True, False, True, True]
    """
    n = len(kept)
    if zeros == 0:
        kept.fill(True)
        return
    cut, below, equal = _cut(read, n, zeros)
    missing = zeros - below
    if missing == equal:
        for start, stop in _strips(n):
            part = kept[start:stop]
            np.logical_not(np.less_equal(read(start, stop), cut, out=part), out=part)  # what is not a number is kept
        return
    if tiebreak is None:
        for start, stop in _strips(n):
            part, scores = kept[start:stop], read(start, stop)
            np.logical_not(np.less(scores, cut, out=part), out=part)
            if missing:
                first = np.flatnonzero(scores == cut)[:missing]
                part[first] = False
                missing -= len(first)
        return
    second = tiebreak
    scratch = np.empty(min(_STRIP, n), dtype=np.float32)

    def of_the_tied(start: int, stop: int) -> Floats:
        """The tiebreak; not a number, which is larger than all, where the score is another than the cut."""
        entries = scratch[: stop - start]
        np.multiply(read(start, stop) != cut, np.int32(-1), out=entries.view(np.int32))
        np.bitwise_or(entries.view(np.int32), second(start, stop).view(np.int32), out=entries.view(np.int32))
        return entries

    mark_largest(of_the_tied, None, missing, kept)
    for start, stop in _strips(n):
        part = kept[start:stop]
        np.greater(part, read(start, stop) < cut, out=part)


def _smallest(scores: Tensor, place: int) -> Tensor:
    """The `place`-th smallest of each row, as a column."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.partition(scores.detach().numpy(), place - 1, axis=1)[:, place - 1 : place])
    return scores.sort(1).values[:, place - 1 : place]  # CUDA's kthvalue is not the same every time


def largest(scores: Tensor, tiebreak: Tensor | None, zeros: int) -> Tensor:
    """`choose`, of tensors that are at hand.

    >>> largest(torch.tensor([[0.0, 0.0, 0.0, 5.0]]), torch.tensor([[3.0, 1.0, 1.0, 0.0]]), 2).tolist()
    [[True, False, False, True]]
    """
    return answer(choose(lambda: scores, None if tiebreak is None else lambda: tiebreak, zeros))


def choose(score: Callable[[], Tensor], tiebreak: Callable[[], Tensor] | None, zeros: int) -> Question[Tensor]:
    """Keep all but the `zeros` smallest entries of each row, in the order (score, tiebreak, index).

    Args:
        score: gives the scores, ``(rows, entries)``, twice where some are equal: they are not kept while an answer is
            awaited.
        tiebreak: gives numbers of the same shape; None: the index alone decides among equal scores.
        zeros: fewer than entries.
    """
    scores = score()
    if zeros == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    cut = _smallest(scores, zeros)
    drop = scores <= cut
    del scores
    # Another sort only of the rows where the cut runs through equal scores; a device would have to say which.
    uneven = drop.sum(1) != zeros
    if not (yield uneven.any()):
        return ~drop
    rows = (
        uneven.nonzero().flatten() if uneven.device.type == "cpu" else torch.arange(len(uneven), device=uneven.device)
    )
    scores, cut = score()[rows], cut[rows]
    below, tied = scores < cut, scores == cut
    missing = zeros - below.sum(1, keepdim=True)
    if tiebreak is not None:
        second = torch.where(tied, tiebreak()[rows], float("inf"))
        last = second.sort(1).values.gather(1, (missing - 1).clamp_min(0))
        smaller = tied & (second < last)
        below, tied = below | smaller, tied & (second == last)
        missing = missing - smaller.sum(1, keepdim=True)
    drop[rows] = below | (tied & (tied.cumsum(1) <= missing))
    return ~drop
