"""Where the output axis of a weight is: the matrix view of every layer type.

Every method sees a weight with its output axis first, ``(O, I, *kernel)``; read as a matrix it is O × N with
N = I · prod(kernel). Layers that store their weight otherwise are permuted to it and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from psc_lightning.symbols import Reader, Writer

__all__ = ["Layout", "memory_format"]


@dataclass(frozen=True)
class Layout:
    """How a stored weight maps to ``(O, I, *kernel)``.

    Args:
        transposed: the weight is stored ``(I, O/groups, *kernel)``, as ConvTranspose and Hugging Face's Conv1D do.
        groups: channel groups of a transposed convolution (≥ 1); each has its own outputs.
        padding: the row of an embedding table that is zero and stays so (`padding_idx`), which no file says.

    >>> import torch
    >>> up = nn.ConvTranspose2d(4, 6, 3, groups=2)
    >>> tuple(up.weight.shape), Layout.of(up).shape(up.weight.shape)
    ((4, 3, 3, 3), (6, 2, 3, 3))
    >>> matrix = Layout.of(up).matrix(up.weight)
    >>> torch.equal(Layout.of(up).weight(matrix, up.weight.shape), up.weight)
    True
    """

    transposed: bool = False
    groups: int = 1
    padding: int | None = None

    @classmethod
    def of(cls, layer: nn.Module) -> Layout:
        """The layout of `layer`'s weights."""
        if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
            return cls(padding=layer.padding_idx)
        if isinstance(layer, _ConvTransposeNd):
            return cls(transposed=True, groups=layer.groups)
        # Hugging Face's Conv1D is recognised by its name, so that transformers stays optional.
        names = {f"{base.__module__}.{base.__name__}" for base in type(layer).__mro__}
        return cls(transposed="transformers.pytorch_utils.Conv1D" in names)

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the matrix view, ``(O, I, *kernel)``, of a weight stored with shape `stored`."""
        if len(stored) < 2:
            return (1, prod(stored))
        if not self.transposed:
            return tuple(stored)
        return (stored[1] * self.groups, stored[0] // self.groups, *stored[2:])

    def matrix(self, stored: Tensor) -> Tensor:
        """The stored weight with its output axis first."""
        if stored.dim() < 2:
            return stored.reshape(1, -1)
        if not self.transposed:
            return stored
        inputs, outputs = stored.shape[:2]
        grouped = stored.reshape(self.groups, inputs // self.groups, outputs, *stored.shape[2:])
        return grouped.transpose(1, 2).reshape(self.shape(tuple(stored.shape)))

    def weight(self, matrix: Tensor, stored: tuple[int, ...]) -> Tensor:
        """The weight in its stored axis order; the inverse of `matrix`."""
        if len(stored) < 2 or not self.transposed:
            return matrix.reshape(stored)
        grouped = matrix.reshape(self.groups, stored[1], stored[0] // self.groups, *stored[2:])
        return grouped.transpose(1, 2).reshape(stored).contiguous()

    def encode(self, writer: Writer) -> None:
        """Store the layout: one integer, 0 for output first, else the number of groups."""
        writer.integer(self.groups if self.transposed else 0)

    @classmethod
    def decode(cls, reader: Reader, stored: tuple[int, ...]) -> Layout:
        """Read it; the groups must divide the stored input channels."""
        groups = reader.integer(0, max(1, stored[0] if stored else 1))
        if groups and (len(stored) < 2 or stored[0] % groups):
            raise ValueError(f"a transposed layout of {groups} groups does not fit the shape {tuple(stored)}")
        return cls(transposed=groups > 0, groups=max(groups, 1))


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The order in which a tensor's entries lie in memory, as `Module.to(memory_format=…)` sets it.

    >>> memory_format(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last))
    torch.channels_last
    """
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if last is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=last):
        return torch.contiguous_format
    return last
