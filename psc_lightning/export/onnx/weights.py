"""A compressed weight in an ONNX graph: packed cores, repeated or multiplied as its tying says."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from psc_lightning.export.onnx.graph import Graph
from psc_lightning.export.onnx.packing import dequantized, pack
from psc_lightning.stored import Stored
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
    rows, columns = matrix[0], prod(matrix[1:])
    if isinstance(tying, LowRank | Separable):
        return graph.shaped(_product(graph, tying, cores), *matrix)
    ((core),) = cores.values()
    if isinstance(tying, RowSharing):
        flat = graph.repeated(pack(graph, core, core.shape), core.size, tying.block, 1)
        return graph.shaped(graph.cut(graph.shaped(flat, rows, -1), 1, columns), *matrix)
    if isinstance(tying, ColumnSharing):
        flat = graph.repeated(pack(graph, core, core.shape), len(core), tying.block, columns)
        return graph.shaped(graph.cut(graph.shaped(flat, -1, columns), 0, rows), *matrix)
    if isinstance(tying, CrossChannelSharing):
        flat = graph.repeated(pack(graph, core, core.shape), rows, tying.groups, columns // tying.groups)
        return graph.shaped(flat, *matrix)
    shape = matrix if stored.layout.transposed else tuple(stored.weight.shape)
    return pack(graph, core, shape)


def _product(graph: Graph, tying: LowRank | Separable, cores: dict[str, Array]) -> str:
    """The factors' product in double precision, rounded."""
    if isinstance(tying, LowRank):
        left, right = (pack(graph, cores[name], cores[name].shape) for name in "uv")
    else:
        p, d = cores["p"], cores["d"]
        left = graph.node("Transpose", pack(graph, p, p.shape), perm=[1, 0, 2])
        right = pack(graph, d, (*d.shape[:2], prod(d.shape[2:])))
    wide = [graph.node("Cast", factor, to=TensorProto.DOUBLE) for factor in (left, right)]
    rounded = graph.node("Cast", graph.node("MatMul", *wide), to=TensorProto.FLOAT)
    return rounded if isinstance(tying, LowRank) else graph.node("Transpose", rounded, perm=[1, 0, 2])
