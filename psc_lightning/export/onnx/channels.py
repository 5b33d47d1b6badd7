"""Leaves out channels that are zero, where a chain of layers has no branch.

A layer whose output row is zero gives its bias alone, a constant that the operators behind it turn into another one;
the next layer takes it up into its own bias (where a padded convolution reads it, it must be 0: the border differs).
A channel that the next layer does not read is left out whatever it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from psc_lightning.activations import Ranges
from psc_lightning.export.onnx.graph import Graph, leave_out_unused, reads
from psc_lightning.slots.stored import Stored

__all__ = ["remove_dead_channels"]

Array = NDArray[Any]

_UNARY = {"Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Softplus"}
_UNARY |= {"Gelu", "Mish", "Identity", "Dropout"}
_POOLS = {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"}
_X_TIMES_W_TURNED = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}


def remove_dead_channels(
    model: GraphProto, graph: Graph, held: Mapping[str, Stored], ranges: dict[str, Ranges]
) -> dict[str, Stored]:
    """Leave out dead channels of a graph, in place; `held` with what is left of its weights.

    Args:
        model: the graph, with the shapes of its values; its compressed weights are neither inputs nor constants.
        graph: knows which names are free.
        held: name → compressed weight.
        ranges: name of such a weight → what its layers' inputs are rounded to, and their outputs' ranges, which are cut, too.
    """
    found = _Model(model, graph, dict(held), ranges)
    for layer in found.layers.values():
        chain = found.chain(layer)
        if chain is not None:
            _shorten(found, layer, *chain)
    del model.initializer[:]
    model.initializer.extend(found.constants.values())
    leave_out_unused(model)
    return found.held


@dataclass(frozen=True)
class _Layer:
    """A matrix, or kernels, applied to channels.

    Attributes:
        node: the node that reads its input.
        result: the value it gives, bias added.
        weight: the node that names its weight (outputs first), and the place among that node's inputs.
        bias: the same for its bias, which may be missing; None: it cannot have one.
        channels_first: whether the axis after the batch is the channels'.
    """

    node: NodeProto
    result: str
    weight: tuple[NodeProto, int]
    bias: tuple[NodeProto, int] | None
    channels_first: bool = True

    @property
    def source(self) -> str:
        """The value it reads."""
        name: str = self.node.input[0]
        return name


class _Model:
    """A graph whose layers and constants can be looked up and cut."""

    def __init__(self, model: GraphProto, graph: Graph, held: dict[str, Stored], ranges: dict[str, Ranges]) -> None:
        self.graph, self.held, self.ranges = graph, held, ranges
        self.constants = {tensor.name: tensor for tensor in model.initializer}
        self.users: dict[str, list[NodeProto]] = {value.name: [NodeProto()] for value in model.output}
        self.makers = {name: node for node in model.node for name in node.output}
        self.shapes = {
            value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in model.value_info
        }
        for node in model.node:
            for name in reads(node):
                self.users.setdefault(name, []).append(node)
        found = [self._layer(node) for node in model.node]
        #: by the value that a layer reads
        self.layers = {layer.source: layer for layer in found if layer is not None}

    def values(self, place: tuple[NodeProto, int] | None) -> Array | None:
        """The constant at a node's input, None where there is none."""
        if place is None or place[1] >= len(place[0].input):
            return None
        name = place[0].input[place[1]]
        if name in self.held:
            return np.asarray(self.held[name].weight.detach().cpu())
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None

    def set(self, place: tuple[NodeProto, int], values: Array) -> None:
        """Give a node another constant; who else uses the old one keeps it."""
        node, at = place
        name = self.graph.name()
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        node.input.extend([""] * (at + 1 - len(node.input)))
        node.input[at] = name

    def cut(self, place: tuple[NodeProto, int], axis: int, keep: Array) -> None:
        """Keep some rows (axis 0) or columns (axis 1) of a layer's weight."""
        name = place[0].input[place[1]]
        held, ranges = self.held.get(name), self.ranges.get(name)
        if held is None:
            self.set(place, _known(self.values(place)).compress(keep, axis))
            return
        kept = torch.from_numpy(keep.nonzero()[0])
        cores = {name: core.index_select(axis, kept) for name, core in held.cores.items()}
        weight = held.weight.index_select(axis, kept)
        self.held[name] = replace(held, cores=cores, weight=weight)
        if ranges is not None and ranges.outputs is not None and axis == 0:
            self.ranges[name] = replace(ranges, outputs=ranges.outputs.cpu().index_select(1, kept))

    def _layer(self, node: NodeProto) -> _Layer | None:
        """The layer that a node is the heart of, if its weight is its own and can be cut."""
        attributes, kernels = _attributes(node), node.op_type == "Conv"
        product = node.op_type == "Gemm" and attributes == _X_TIMES_W_TURNED | attributes
        if (kernels and attributes.get("group", 1) == 1) or product:
            layer = _Layer(node, node.output[0], (node, 1), (node, 2))
        elif node.op_type == "MatMul":
            turned, users = self.makers.get(node.input[1]), self.users.get(node.output[0], [])
            if turned is None or turned.op_type != "Transpose" or len(self.users[node.input[1]]) > 1:
                return None
            layer = _Layer(node, node.output[0], (turned, 0), None, channels_first=False)
            if len(users) == 1 and users[0].op_type == "Add":
                place = (users[0], 1 - list(users[0].input).index(node.output[0]))
                bias = self.values(place)
                if bias is not None and bias.ndim == 1:
                    layer = replace(layer, result=users[0].output[0], bias=place)
        else:
            return None
        name = layer.weight[0].input[layer.weight[1]]
        weight, held = self.values(layer.weight), self.held.get(name)
        if weight is None or weight.ndim < 2 or len(self.users[name]) > 1:
            return None
        if held is not None and (held.tying is not None or held.layout.transposed):
            return None
        return None if len(node.input) > 2 and self.values((node, 2)) is None else layer

    def chain(self, first: _Layer) -> tuple[list[NodeProto], _Layer] | None:
        """What a layer's output passes through alone, and the layer that reads that."""
        value, between = first.result, list[NodeProto]()
        while len(users := self.users.get(value, [])) == 1:
            if value in self.layers:
                return between, self.layers[value]
            (node,) = users
            passes = node.op_type in _UNARY
            if first.channels_first:
                passes |= node.op_type in _POOLS | {"BatchNormalization"} or self._flattens(node)
            if not passes or node.input[0] != value:
                return None
            between.append(node)
            value = node.output[0]
        return None

    def _flattens(self, node: NodeProto) -> bool:
        """Whether a node puts all of a channel's entries next to each other, channel after channel."""
        shape = self.values((node, 1)) if node.op_type == "Reshape" else None
        before = self.shapes.get(node.input[0], []) if shape is not None else []
        return shape is not None and len(before) > 1 and all(before[1:]) and list(shape[1:]) == [prod(before[1:])]


def _shorten(model: _Model, first: _Layer, between: list[NodeProto], last: _Layer) -> None:
    """Leave out the channels between two layers that carry nothing."""
    weight, reader = _known(model.values(first.weight)), _known(model.values(last.weight))
    channels = len(weight)
    width = reader.shape[1] // channels  # a flattened image: so many columns a channel
    columns = reader.reshape(len(reader), channels, -1)
    constant = _passed(model, first, between, channels)
    zero_only = last.bias is None or any(map(_pads, [*between, last.node]))
    dead = ~weight.reshape(channels, -1).any(1) & np.isfinite(constant) & ((constant == 0) | (not zero_only))
    keep = ~dead & columns.any((0, 2))
    keep[0] |= not keep.any()
    if keep.all():
        return
    added = (columns.sum(2, dtype=np.float64) @ np.where(dead & ~keep, constant, 0.0)).astype(reader.dtype)
    if added.any() and last.bias is not None:
        bias = model.values(last.bias)
        model.set(last.bias, added if bias is None else bias + added)
    model.cut(first.weight, 0, keep)
    if first.bias is not None and (bias := model.values(first.bias)) is not None:
        model.set(first.bias, bias[keep])
    for node in between:
        if node.op_type == "BatchNormalization":
            for place in range(1, 5):
                model.set((node, place), _known(model.values((node, place)))[keep])
        elif node.op_type == "Reshape":
            model.set((node, 1), np.array([_known(model.values((node, 1)))[0], width * keep.sum()], np.int64))
    model.cut(last.weight, 1, np.repeat(keep, width))


def _passed(model: _Model, first: _Layer, between: list[NodeProto], channels: int) -> Array:
    """What the next layer reads of each channel whose weights are zero: the bias, through all that lies between."""
    bias = model.values(first.bias)
    value: Array = np.zeros(channels, np.float32) if bias is None else bias
    value = value.reshape(1, channels, 1, 1)
    for node in between:
        if node.op_type in _UNARY or node.op_type == "BatchNormalization":
            read = helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, value.shape)
            given = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, value.shape)
            constants = [model.constants[name] for name in list(node.input)[1:] if name]
            alone = helper.make_model(helper.make_graph([node], "alone", [read], [given], constants))
            results: Any = ReferenceEvaluator(alone).run(None, {node.input[0]: value})
            value = results[0]
    return value.reshape(channels)


def _pads(node: NodeProto) -> bool:
    """Whether a node reads zeros around an image."""
    attributes = _attributes(node)
    padded = any(attributes.get("pads", ())) or attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    return padded and node.op_type in ("Conv", "AveragePool")


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def _known(values: Array | None) -> Array:
    """A constant of a layer: there, or else it would be none."""
    assert values is not None
    return values
