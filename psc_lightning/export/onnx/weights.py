"""A compressed weight in an ONNX graph: packed cores, repeated or multiplied as its tying says."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from psc_lightning.export.onnx.graph import Graph
from psc_lightning.export.onnx.packing import dequantized, pack
from psc_lightning.slots.stored import Stored
from psc_lightning.tying.base import Tying
from psc_lightning.tying.column import ColumnSharing
from psc_lightning.tying.cross_channel import CrossChannelSharing
from psc_lightning.tying.low_rank import LowRank
from psc_lightning.tying.row import RowSharing
from psc_lightning.tying.separable import Separable

__all__ = ["core_values", "write_weight"]

Array = NDArray[Any]

_ELEMENTS = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
}


def core_values(core: Tensor) -> Array:
    """A core as numbers that `pack` takes."""
    return core.detach().cpu().contiguous().numpy().astype(np.float32, copy=False)


def write_weight(graph: Graph, stored: Stored, dequantize: bool = False) -> str:
    """Add what rebuilds a weight; its value's name.

    Args:
        graph: takes the constants and the nodes.
        stored: the weight; float32 holds its cores.
        dequantize: by DequantizeLinear, where a weight without a tying is 8 bit multiples of a scale a row.

    Raises:
        ValueError: a tying that is not known here.
    """
    cores = {name: core_values(core) for name, core in stored.cores.items()}
    shape = tuple(stored.weight.shape)
    matrix = stored.layout.shape(shape)
    value = None
    if dequantize and stored.tying is None and not stored.layout.transposed:
        value = dequantized(graph, cores["core"], shape)
    value = value or _expand(graph, stored, cores, matrix)
    if stored.layout.transposed:
        groups = stored.layout.groups
        split = graph.shaped(value, groups, shape[1], shape[0] // groups, *shape[2:])
        swapped = graph.node("Transpose", split, perm=[0, 2, 1, *range(3, len(shape) + 1)])
        value = graph.shaped(swapped, *shape)
    element = _ELEMENTS[stored.weight.dtype]
    return value if element == TensorProto.FLOAT else graph.node("Cast", value, to=element)


def _expand(graph: Graph, stored: Stored, cores: dict[str, Array], matrix: tuple[int, ...]) -> str:
    """The weight with its output axis first (as it is stored, where that is the same)."""
    tying = stored.tying
    if tying is None:
        return pack(graph, cores["core"], matrix if stored.layout.transposed else tuple(stored.weight.shape))
    if type(tying) not in _EXPANDED:
        known = ", ".join(one.__name__ for one in _EXPANDED)
        raise ValueError(
            f"tying: ONNX export knows {known}, found {type(tying).__name__}; `detach` the model first, and its weights are "
            "written dense"
        )
    return graph.shaped(_EXPANDED[type(tying)](graph, tying, cores, (matrix[0], prod(matrix[1:]))), *matrix)


def _row(graph: Graph, tying: RowSharing, cores: dict[str, Array], size: tuple[int, int]) -> str:
    """Each entry repeated along its row; what is beyond the row's end is cut off."""
    core, (rows, columns) = cores["core"], size
    flat = graph.repeated(pack(graph, core, core.shape), core.size, tying.block, 1)
    return graph.cut(graph.shaped(flat, rows, -1), 1, columns)


def _column(graph: Graph, tying: ColumnSharing, cores: dict[str, Array], size: tuple[int, int]) -> str:
    """Each row repeated; what is beyond the last row is cut off."""
    core, (rows, columns) = cores["core"], size
    flat = graph.repeated(pack(graph, core, core.shape), len(core), tying.block, columns)
    return graph.cut(graph.shaped(flat, -1, columns), 0, rows)


def _bank(graph: Graph, tying: CrossChannelSharing, cores: dict[str, Array], size: tuple[int, int]) -> str:
    """The bank repeated over the groups of input channels."""
    ((bank),) = cores.values()
    rows, columns = size
    return graph.repeated(pack(graph, bank, bank.shape), rows, tying.groups, columns // tying.groups)


def _low_rank(graph: Graph, tying: LowRank, cores: dict[str, Array], size: tuple[int, int]) -> str:
    """The product of u and v."""
    return _product(graph, *(pack(graph, cores[name], cores[name].shape) for name in "uv"))


def _separable(graph: Graph, tying: Separable, cores: dict[str, Array], size: tuple[int, int]) -> str:
    """The product of p and d, an input channel at a time."""
    p, d = cores["p"], cores["d"]
    left = graph.node("Transpose", pack(graph, p, p.shape), perm=[1, 0, 2])
    right = pack(graph, d, (*d.shape[:2], prod(d.shape[2:])))
    return graph.node("Transpose", _product(graph, left, right), perm=[1, 0, 2])


def _product(graph: Graph, left: str, right: str) -> str:
    """A product in double precision, rounded."""
    wide = [graph.node("Cast", factor, to=TensorProto.DOUBLE) for factor in (left, right)]
    return graph.node("Cast", graph.node("MatMul", *wide), to=TensorProto.FLOAT)


#: how a weight is made of a tying's cores: what takes (graph, tying, cores, size of the matrix)
_EXPANDED: dict[type[Tying], Callable[[Graph, Any, dict[str, Array], tuple[int, int]], str]] = {
    RowSharing: _row,
    ColumnSharing: _column,
    CrossChannelSharing: _bank,
    LowRank: _low_rank,
    Separable: _separable,
}
