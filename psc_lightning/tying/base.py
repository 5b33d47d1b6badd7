"""What every tying is: many positions of a weight, fewer numbers that are trained and stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from psc_lightning.symbols import Reader, Writer

__all__ = ["Tying"]

Shape = tuple[int, ...]


class Tying(nn.Module):
    """The first slot: ``expand(reduce(W))`` is the effective weight.

    A tying is built for one weight of matrix shape ``(O, I, *kernel)``. Its *cores*, named tensors, are what masks and
    levels act on and what is stored. `expand` is all that reading a file needs: it repeats or multiplies, it never
    takes a mean.

    Attributes:
        code_number: the method's number in a file; never reused.
        ties_rows: whether several outputs (or entries of a table) become one.
        labelled: whether the method wants `observe` called with gradients before it begins.
    """

    code_number: ClassVar[int]
    ties_rows: ClassVar[bool] = False
    labelled: bool = False

    @classmethod
    def build(cls, shape: Shape, **options: object) -> Tying:
        """The tying of a weight of this shape. Raises ValueError where it does not apply, saying why."""
        raise NotImplementedError

    @classmethod
    def trains(cls, options: Mapping[str, Any]) -> bool:
        """Whether, with these options, the cores are trained themselves."""
        return False

    @classmethod
    def calibrates(cls, options: Mapping[str, Any]) -> bool:
        """Whether, with these options, labels are seen before it begins."""
        return False

    def core_shapes(self) -> dict[str, Shape]:
        """Name and shape of each core."""
        raise NotImplementedError

    def observe(self, matrix: Tensor, gradient: Tensor) -> None:
        """Take in the gradient of one step (labelled methods, before `begin`)."""

    def begin(self, matrix: Tensor) -> Tensor:
        """Called once when the tying starts; gives the dense weight that it starts from."""
        return self.expand(self.reduce(matrix)).to(matrix.dtype)

    def reduce(self, matrix: Tensor) -> dict[str, Tensor]:
        """The cores of a weight; differentiable."""
        raise NotImplementedError

    def expand(self, cores: dict[str, Tensor]) -> Tensor:
        """The weight of given cores; differentiable."""
        raise NotImplementedError

    def encode(self, writer: Writer) -> None:
        """Store the options that `expand` needs (not the cores)."""
        raise NotImplementedError

    @classmethod
    def decode(cls, reader: Reader, shape: Shape) -> Tying:
        """Read them."""
        raise NotImplementedError
