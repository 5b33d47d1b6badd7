"""What reading one file may take: bytes of memory and steps of work, set by what it declares and by its own length.

    bytes    16 · declared bytes + 4 · length of the symbols + 2^25
    steps    256 · tensors + declared bytes / 1024 + 16 · length of the symbols + 2^15
    tensors  length of the table of contents / 4 + 2^15, and max_bytes / 1 KiB + 2^15

Declared are the shapes in the table of contents, and 1 KiB a tensor for its name and its object. A step is 10 to 30 µs: an
integer, a plane, a block of a stream, a table made anew, half a line, an eighth of a diagonal. Whoever takes memory of
a size that a file says asks first. A writer counts alike, and takes another coding before one that would be too dear, so that
no file of its own is refused. Honest files of many small layers, structured as codings like it, take up to a third of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from psc_lightning.artifact.errors import ADVICE, ArtifactError

__all__ = ["DIAGONAL", "LINE", "TENSOR", "Allowance", "most_tensors"]

TENSOR = 1 << 10  # bytes of a tensor's name, entry and object
LINE, DIAGONAL = 2, 8  # steps

_BYTES = (16, 4, 1 << 25)  # for a declared byte, for a byte of symbols, in any case
_STEPS = (1 / 1024, 16, 1 << 15)
_OF_TENSOR = 256  # steps
_FREE = 1 << 15  # tensors
_APART = 4  # bytes of a table of contents, for each one more: undeflated it has as many


def most_tensors(length: int, max_bytes: int | None = None) -> int:
    """How many tensors a table of contents of so many bytes may have, and `max_bytes` may hold.

    >>> most_tensors(400), most_tensors(1 << 20, 0)
    (32868, 32768)
    """
    return _FREE + min(length // _APART, length if max_bytes is None else max_bytes // TENSOR)


class Allowance:
    """Counts what one file takes, and refuses before it is too much.

    Args:
        declared: bytes of all its tensors.
        tensors: how many.
        length: of its symbols, in bytes.

    Attributes:
        bytes: held now, as far as they were asked for.
        steps: taken so far.
        most_bytes: that may be held.
        most_steps: that may be taken.

    >>> allowance = Allowance(declared=4096, tensors=1, length=100)
    >>> allowance.most_bytes - 2**25, allowance.most_steps - 2**15
    (82320, 1861)
    """

    def __init__(self, declared: int, tensors: int, length: int) -> None:
        sizes = (declared + TENSOR * tensors, length, 1)
        self.bytes = self.steps = 0
        self.most_bytes = sum(factor * size for factor, size in zip(_BYTES, sizes, strict=True))
        self._apart = _OF_TENSOR * tensors
        self.most_steps = self._apart + int(sum(factor * size for factor, size in zip(_STEPS, sizes, strict=True)))

    @classmethod
    def unlimited(cls) -> Allowance:
        """For what is no file of a stranger."""
        return cls(1 << 60, 0, 0)

    def spare(self, length: float) -> float:
        """Steps that a writer may take where it need not, after so many bytes: those of each tensor are set apart."""
        return self.most_steps - self._apart + _STEPS[1] * length

    def step(self, number: int = 1) -> None:
        """Count so many steps.

        Raises:
            ArtifactError: they are too many.
        """
        self.steps += number
        if self.steps > self.most_steps:
            raise ArtifactError(
                f"expected at most {self.most_steps} steps of work for a file of this length and its tensors, found "
                f"{self.steps} or more: {ADVICE}"
            )

    def hold(self, number: int) -> None:
        """Count so many bytes, before they are taken.

        Raises:
            ArtifactError: they are too many.
        """
        self.bytes += number
        if self.bytes > self.most_bytes:
            raise ArtifactError(
                f"expected at most {self.most_bytes} bytes of tables and symbols for a file of this length and its tensors, "
                f"found {self.bytes} or more: {ADVICE}"
            )

    @contextmanager
    def holding(self, number: int) -> Iterator[None]:
        """Count so many bytes that are given back at the end.

        Raises:
            ArtifactError: they are too many.
        """
        before = self.bytes
        self.hold(number)
        try:
            yield
        finally:
            self.bytes = before
