"""A convolution under `separable` sharing as what it is: a depthwise convolution, then a pointwise one."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from onnx import GraphProto, NodeProto, helper

from psc_lightning.export.onnx.graph import Graph
from psc_lightning.export.onnx.packing import pack
from psc_lightning.export.onnx.weights import core_values
from psc_lightning.slots.stored import Stored
from psc_lightning.tying.separable import Separable

__all__ = ["split_convolutions"]


def split_convolutions(model: GraphProto, graph: Graph, held: Mapping[str, Stored]) -> dict[str, Stored]:
    """Split the convolutions whose weight is a sum of products, in place; what is left of `held`.

    ``W[o, i] = Σ_r p[o, i, r] · d[i, r]``: R kernels d for each input channel, then a 1×1 convolution with p.
    """
    left = dict(held)
    for name, stored in held.items():
        uses = [(i, node) for i, node in enumerate(model.node) if name in node.input]
        plain = all(node.op_type == "Conv" and node.input[1] == name for _, node in uses)
        if not isinstance(stored.tying, Separable) or stored.layout.transposed or not plain:
            continue
        del left[name]
        for i, node in reversed(uses):
            first, second = _split(graph, node, stored)
            model.node[i].CopyFrom(second)
            model.node.insert(i, first)
    return left


def _split(graph: Graph, node: NodeProto, stored: Stored) -> tuple[NodeProto, NodeProto]:
    p, d = (core_values(stored.cores[name]) for name in "pd")
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    groups = attributes.pop("group", 1)
    kernel = d.shape[2:]
    inner = d.shape[0] * d.shape[1]  # kernels of the input channels of one group; all groups have the same
    kernels = pack(graph, d, (inner, 1, *kernel))
    if groups > 1:
        kernels = graph.shaped(graph.repeated(kernels, 1, groups, d.size), groups * inner, 1, *kernel)
    mixing = pack(graph, p, (len(p), prod(p.shape[1:]), *(1,) * len(kernel)))
    between = graph.name()
    first = helper.make_node("Conv", [node.input[0], kernels], [between], group=groups * len(d), **attributes)
    second = helper.make_node("Conv", [between, mixing, *node.input[2:]], list(node.output), group=groups)
    return first, second
