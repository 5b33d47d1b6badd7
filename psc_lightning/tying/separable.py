"""Separable sharing: a k×k convolution is R depthwise convolutions and a pointwise one."""

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
from psc_lightning.tying.low_rank import resolve_rank

__all__ = ["Separable"]


class Separable(Tying):
    """``W[o, i] = Σ_r p[o, i, r] · d[i, r]``: every output sees input i through the same R kernels d.

    Forward: the sum, formed in float64 and rounded.
    Gradient: the factors', by the chain rule; from `begin` on the dense weight gets none.
    Start: for each input channel, the SVD of its ``O × k`` slice, singular values shared evenly.
    Stored: I · R · (O + k) numbers, k = prod(kernel); R.

    Args:
        shape: the matrix view's shape, ``(O, I, *kernel)``.
        rank: R ≥ 1, or a share in (0, 1) of min(O, k). None: 1, the depthwise-separable convolution.

    Shapes:
        weight ``(O, I, *kernel)`` → p ``(O, I, R)`` and d ``(I, R, *kernel)``.

    Raises:
        ValueError: without a kernel larger than one entry, or where the factors would be no smaller.

    >>> import torch
    >>> tying = Separable.build((2, 1, 3), rank=1)
    >>> w = torch.tensor([[[1.0, 2.0, 3.0]], [[2.0, 4.0, 6.0]]])
    >>> tying.begin(w).round(decimals=4).tolist()
    [[[1.0, 2.0, 3.0]], [[2.0, 4.0, 6.0]]]
    >>> {name: shape for name, shape in tying.core_shapes().items()}
    {'p': (2, 1, 1), 'd': (1, 1, 3)}

    Source: Guo et al. 2018, "Network decoupling", theorem 1; rank by input channel as there, trained here.
    """

    code_number = 4

    def __init__(self, shape: Shape, rank: int) -> None:
        super().__init__()
        self.shape, self.rank = shape, rank
        self.p = nn.Parameter(torch.zeros(shape[0], shape[1], rank))
        self.d = nn.Parameter(torch.zeros(shape[1], rank, *shape[2:]))

    @classmethod
    def build(cls, shape: Shape, rank: Annotated[int | float | None, share_or_whole] = None) -> Separable:  # type: ignore[override]
        """The tying for a weight of this shape."""
        kernel = prod(shape[2:])
        if kernel < 2:
            raise ValueError("it has no kernel of two or more entries to separate")
        wanted = resolve_rank(1 if rank is None else rank, min(shape[0], kernel))
        if wanted * (shape[0] + kernel) >= shape[0] * kernel:
            raise ValueError(f"factors of rank {wanted} are no smaller than {shape[0]} × {kernel} entries an input")
        return cls(shape, wanted)

    @classmethod
    def trains(cls, options: Mapping[str, Any]) -> bool:
        """The factors."""
        return True

    def core_shapes(self) -> dict[str, Shape]:
        """Two cores, ``(O, I, R)`` and ``(I, R, *kernel)``."""
        return {"p": tuple(self.p.shape), "d": tuple(self.d.shape)}

    def begin(self, matrix: Tensor) -> Tensor:
        """Fill the factors by SVD, an input channel at a time."""
        slices = doubled(matrix.reshape(self.shape[0], self.shape[1], -1)).transpose(0, 1)
        u, s, v = torch.linalg.svd(slices, full_matrices=False)
        root = s[:, : self.rank].sqrt()
        self.p.data.copy_((u[:, :, : self.rank] * root[:, None]).transpose(0, 1))
        self.d.data.copy_((root[:, :, None] * v[:, : self.rank]).reshape(self.d.shape))
        return super().begin(matrix)

    def reduce(self, matrix: Tensor) -> dict[str, Tensor]:
        """The trained factors; the dense weight plays no part any more."""
        return {"p": self.p, "d": self.d}

    def expand(self, cores: dict[str, Tensor]) -> Tensor:
        """The sum of products, rounded to float32."""
        p = doubled(cores["p"]).transpose(0, 1)
        d = doubled(cores["d"]).reshape(self.shape[1], self.rank, -1)
        with torch.autocast(p.device.type, enabled=False):
            product = torch.bmm(p, d).float().to(cores["p"].device)
        return product.transpose(0, 1).reshape(self.shape) + 0.0  # 0 · -1 is -0.0

    def encode(self, writer: Writer) -> None:
        """Store the rank."""
        writer.integer(self.rank)

    @classmethod
    def decode(cls, reader: Reader, shape: Shape) -> Separable:
        """Read it; factors larger than the weight are refused before memory is taken."""
        kernel = prod(shape[2:])
        return cls(shape, reader.integer(1, max(1, (shape[0] * kernel - 1) // max(1, shape[0] + kernel))))
