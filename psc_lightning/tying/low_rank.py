"""Low-rank sharing: the matrix view is a product of two thin matrices."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from psc_lightning.numerics.functional import doubled
from psc_lightning.options import share_or_whole
from psc_lightning.symbols import Reader, Writer
from psc_lightning.tying.base import Shape, Tying

__all__ = ["LowRank", "resolve_rank"]


def resolve_rank(rank: int | float, full: int) -> int:
    """An integer rank as it is (at most `full`); a float in (0, 1) is a share of the full rank, at least 1.

    >>> resolve_rank(0.25, 16), resolve_rank(3, 16)
    (4, 3)
    """
    return max(1, int(rank * full)) if isinstance(rank, float) else min(rank, full)


class LowRank(Tying):
    """``W = U V``: U is ``(O, R)``, V is ``(R, N)``.

    Forward: the product, formed in float64 and rounded, so that torch, NumPy and a plain loop agree.
    Gradient: the factors', by the chain rule; from `begin` on the dense weight gets none.
    Start: the best rank-R approximation (SVD), its singular values shared evenly by U and V.
    Stored: R · (O + N) numbers; R.

    Args:
        shape: the matrix view's shape, ``(O, I, *kernel)``, N = I · prod(kernel).
        rank: R ≥ 1, or a share in (0, 1) of min(O, N). None: 0.25.

    Shapes:
        weight ``(O, I, *kernel)`` → U ``(O, R)`` and V ``(R, N)``.

    Raises:
        ValueError: where the two factors would hold as many numbers as the weight.

    >>> import torch
    >>> tying = LowRank.build((3, 3), rank=1)
    >>> w = torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.5]])
    >>> tying.begin(w).round(decimals=3).abs().tolist()
    [[1.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]]

    Source: Eckart & Young 1936; Denton et al. 2014, "Exploiting linear structure within convolutional networks".
    """

    code_number = 5

    def __init__(self, shape: Shape, rank: int) -> None:
        super().__init__()
        self.shape, self.rank = shape, rank
        self.u = nn.Parameter(torch.zeros(shape[0], rank))
        self.v = nn.Parameter(torch.zeros(rank, prod(shape[1:])))

    @classmethod
    def build(cls, shape: Shape, rank: Annotated[int | float | None, share_or_whole] = None) -> LowRank:  # type: ignore[override]
        """The tying for a weight of this shape."""
        rows, columns = shape[0], prod(shape[1:])
        wanted = resolve_rank(0.25 if rank is None else rank, min(rows, columns))
        if wanted * (rows + columns) >= rows * columns:
            raise ValueError(f"two factors of rank {wanted} are no smaller than a {rows} × {columns} weight")
        return cls(shape, wanted)

    @classmethod
    def trains(cls, options: Mapping[str, Any]) -> bool:
        """The factors."""
        return True

    def core_shapes(self) -> dict[str, Shape]:
        """Two cores, ``(O, R)`` and ``(R, N)``."""
        return {"u": tuple(self.u.shape), "v": tuple(self.v.shape)}

    def begin(self, matrix: Tensor) -> Tensor:
        """Fill the factors by SVD."""
        u, s, v = torch.linalg.svd(doubled(matrix.reshape(self.shape[0], -1)), full_matrices=False)
        root = s[: self.rank].sqrt()
        self.u.data.copy_(u[:, : self.rank] * root)
        self.v.data.copy_(root[:, None] * v[: self.rank])
        return super().begin(matrix)

    def reduce(self, matrix: Tensor) -> dict[str, Tensor]:
        """The trained factors; the dense weight plays no part any more."""
        return {"u": self.u, "v": self.v}

    def expand(self, cores: dict[str, Tensor]) -> Tensor:
        """The product, rounded to float32."""
        u, v = doubled(cores["u"]), doubled(cores["v"])
        with torch.autocast(u.device.type, enabled=False):
            product = (u @ v).float().to(cores["u"].device)
        return product.reshape(self.shape) + 0.0  # 0 · -1 is -0.0

    def encode(self, writer: Writer) -> None:
        """Store the rank."""
        writer.integer(self.rank)

    @classmethod
    def decode(cls, reader: Reader, shape: Shape) -> LowRank:
        """Read it; factors larger than the weight are refused before memory is taken."""
        rows, columns = shape[0], prod(shape[1:])
        return cls(shape, reader.integer(1, max(1, (rows * columns - 1) // max(1, rows + columns))))
