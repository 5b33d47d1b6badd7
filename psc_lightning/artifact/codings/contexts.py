"""Tables of bits that learn as they go, one a context."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from psc_lightning.artifact.ans import PRECISION, Ints, table

__all__ = ["UNIT", "Bytes", "Contexts", "runs"]

Bytes = npt.NDArray[np.uint8]

UNIT = 32  # weight of one symbol seen
_FIRST = 8  # bits that a context sees before its first table, and at least between two


class Contexts:
    """The same for writer and reader, in whole numbers.

    The weights of a context's table are those it starts with, and 32 for each time that the bit was seen in it. A table is
    made anew when its context has seen 8 bits, or 8 and a quarter of them more than when it was last made.

    Args:
        weights: of both bits, before any was seen; a row a context.

    >>> contexts = Contexts(np.array([[16, 16]]))
    >>> contexts.learn(np.array([[8, 0]]))
    8.0
    >>> contexts.renew(); contexts.tables[0].tolist()
    [15845148, 932068]
    """

    def __init__(self, weights: Ints) -> None:
        self._weights = weights
        self._seen = np.zeros_like(weights)
        self._due = np.full(len(weights), _FIRST)
        first = table(weights)
        #: the table of each context; an array is replaced, never changed
        self.tables: list[Ints] = list(first)
        self._costs = PRECISION - np.log2(first)
        #: tables made since it began
        self.renewed = 0

    def __len__(self) -> int:
        return len(self._due)

    def renew(self, start: int = 0, number: int | None = None) -> None:
        """Make the tables of `number` contexts from `start` on (all) anew that are due."""
        part = slice(start, None if number is None else start + number)
        seen = self._seen[part].sum(1)
        for c in (start + (seen >= self._due[part]).nonzero()[0]).tolist():
            seen_here = int(self._seen[c].sum())
            self._due[c] = seen_here + max(_FIRST, seen_here // 4)
            self.tables[c] = table(self._weights[c] + UNIT * self._seen[c])
            self._costs[c] = PRECISION - np.log2(self.tables[c])
            self.renewed += 1

    def learn(self, found: Ints, start: int = 0) -> float:
        """Take in how often both bits were found in each context from `start` on; what they cost, in bits."""
        part = slice(start, start + len(found))
        self._seen[part] += found
        return float((found * self._costs[part]).sum())


def runs(contexts: Bytes, number: int) -> tuple[npt.NDArray[np.intp], list[int], list[int]]:
    """Some entries sorted by context (below `number`), which contexts there are, and how many entries each has."""
    numbers = np.bincount(contexts, minlength=number)
    present = numbers.nonzero()[0]
    return np.argsort(contexts, kind="stable"), present.tolist(), numbers[present].tolist()
