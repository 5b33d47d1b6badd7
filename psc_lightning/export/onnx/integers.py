"""Layers whose inputs are rounded, in 8 bit integers: QuantizeLinear and DequantizeLinear around each of them.

Runtimes compute such a layer in integers where its input, weight and output are all on a grid. The inputs' grids come
from training; a convolution's output that no such layer reads gets one of the range that was seen in training, without what
an Add behind it cannot use (where its sum is on a grid, and so is its other operand).

Source: Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only inference".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, helper, numpy_helper

from psc_lightning.activations import Grid, Ranges, grid
from psc_lightning.export.onnx.graph import Graph, leave_out_unused, reads
from psc_lightning.export.onnx.packing import integer_constant, multiples
from psc_lightning.export.onnx.weights import core_values
from psc_lightning.slots.stored import Stored

__all__ = ["run_in_integers"]

Array = NDArray[Any]

_SATURATES = 2**15 // 2  # two products of this are more than 16 bits hold
_BACKWARDS = {"MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity"}
_FORWARDS = _BACKWARDS | {"Slice", "Pad"}


def run_in_integers(
    model: GraphProto, graph: Graph, held: Mapping[str, Stored], ranges: Mapping[str, Ranges]
) -> dict[str, Stored]:
    """Round the inputs of layers as they are in training, and let them compute in integers, in place.

    Args:
        model: the graph; its compressed weights are neither inputs nor constants.
        graph: takes constants, and the nodes that rebuild weights.
        held: name → compressed weight.
        ranges: name of such a weight → what the inputs of its layers are rounded to.

    Returns:
        What is left of `held`: weights that are read as floating-point numbers.
    """
    if not ranges:
        return dict(held)
    made = _Integers(model, graph, held, ranges)
    layers = [layer for layer in made.layers if layer.codes is not None and made.bounded(layer)]
    made.move()
    for layer in layers:
        made.write(layer)
    made.leave_out_relus()
    made.round_values()
    float_only = [layer.name for layer in made.layers if layer not in layers]
    if float_only:
        warnings.warn(
            f"{', '.join(float_only)}: computed in floating point, for the weight is no whole multiples of a scale a row, or "
            "no output was seen in training",
            stacklevel=2,
        )
    if any(np.abs(layer.codes).max() * layer.inputs.top > _SATURATES for layer in layers):
        warnings.warn(
            "8 bit weights times 8 bit inputs: x86 processors without VNNI add two such products in 16 bits, which do not "
            "always hold them, and onnxruntime's results are then wrong; with bits=7 they are right everywhere",
            stacklevel=2,
        )
    leave_out_unused(model)
    used = {name for node in model.node for name in reads(node)}
    return {name: stored for name, stored in held.items() if name in used}


@dataclass(eq=False)
class _Layer:
    """A Conv, Gemm or MatMul whose input is rounded.

    Attributes:
        name: of its weight.
        node: the node.
        inputs: what its input is rounded to.
        result: what it gives; BatchNorm's result, where that alone reads it.
        codes: the weight, output axis first, as whole numbers times a scale each row; None: it is no such.
        scales: one a row.
        bias: one a row, BatchNorm's shift included; None: there is none.
        biased: the node that reads it, and the place among that node's inputs.
        norm: the BatchNorm.
        low: the lowest result that was seen in training.
        high: the highest.
    """

    name: str
    node: NodeProto
    inputs: Grid
    result: str
    codes: Any = None
    scales: Any = None
    bias: Any = None
    biased: tuple[NodeProto, int] | None = None
    norm: NodeProto | None = None
    low: float = -math.inf
    high: float = math.inf


class _Integers:
    """A graph in which values have grids."""

    def __init__(
        self, model: GraphProto, graph: Graph, held: Mapping[str, Stored], ranges: Mapping[str, Ranges]
    ) -> None:
        self.model, self.graph = model, graph
        self.constants = {tensor.name: tensor for tensor in model.initializer}
        self.turned = {node.output[0]: node for node in model.node if node.op_type == "Transpose"}
        self.grids: dict[str, Grid] = {}
        found = []
        for node in model.node:
            name = node.input[1] if node.op_type in ("Conv", "Gemm", "MatMul") else ""
            name = self.turned[name].input[0] if node.op_type == "MatMul" and name in self.turned else name
            if name in held and name in ranges:
                found.append((name, node))
        for name, node in found:
            self._give(node, ranges[name].inputs)
        self.users: dict[str, list[NodeProto]] = {value.name: [NodeProto()] for value in model.output}
        for node in model.node:
            for name in reads(node):
                self.users.setdefault(name, []).append(node)
        self.layers = [self._layer(name, held[name], node, ranges[name]) for name, node in found]
        self.move()

    def _give(self, node: NodeProto, inputs: Grid) -> None:
        """Let a node read a value on a grid; where another reader's differs, behind an Identity."""
        source = node.input[0]
        if self.grids.setdefault(source, inputs) != inputs:
            node.input[0] = self.graph.name()
            self.grids[node.input[0]] = inputs
            at = [other.output[0] for other in self.model.node].index(node.output[0])
            self.model.node.insert(at, helper.make_node("Identity", [source], [node.input[0]]))

    def _only_user(self, value: str, *ops: str) -> NodeProto | None:
        """The one node that reads a value, if it is one of `ops`."""
        users = self.users.get(value, [])
        return users[0] if len(users) == 1 and users[0].op_type in ops else None

    def _read(self, name: str) -> Array:
        return numpy_helper.to_array(self.constants[name])

    def _layer(self, name: str, stored: Stored, node: NodeProto, ranges: Ranges) -> _Layer:
        layer = _Layer(name, node, ranges.inputs, node.output[0], biased=(node, 2))
        plain = stored.tying is None and not stored.layout.transposed
        found = multiples(core_values(stored.cores["core"])) if plain else None
        if found is None:
            return layer
        layer.codes, layer.scales = found[0].reshape(stored.weight.shape), found[1]
        if node.op_type == "MatMul":
            add = self._only_user(layer.result, "Add")
            layer.biased = None if add is None else (add, 1 - list(add.input).index(layer.result))
        if layer.biased is not None:
            reader, at = layer.biased
            bias = self.constants.get(reader.input[at]) if at < len(reader.input) else None
            if bias is not None and list(bias.dims) == [len(layer.scales)]:
                layer.bias = numpy_helper.to_array(bias).astype(np.float64)
        outputs = ranges.outputs
        seen = None if outputs is None else outputs.double().cpu().numpy()
        norm = self._only_user(layer.result, "BatchNormalization") if node.op_type == "Conv" else None
        if norm is not None:
            gain, shift, mean, variance = (self._read(name).astype(np.float64) for name in list(norm.input)[1:])
            epsilon = next((one.f for one in norm.attribute if one.name == "epsilon"), 1e-5)
            factor = gain / np.sqrt(variance + epsilon)
            layer.bias = shift + ((0.0 if layer.bias is None else layer.bias) - mean) * factor
            # Scales are positive: a negative factor turns the codes.
            layer.codes = layer.codes * _column(np.where(factor < 0, -1, 1), layer.codes)
            layer.scales = layer.scales * np.abs(factor)
            layer.norm, layer.result = norm, norm.output[0]
            seen = None if seen is None else (seen - mean) * factor + shift
        if outputs is not None and seen is not None and bool((outputs[1] > outputs[0]).any()):
            layer.low, layer.high = float(seen.min()), float(seen.max())
        return layer

    def move(self) -> None:
        """What only moves numbers keeps their grid: backwards where nothing else reads them, then forwards.

        So does a Relu of numbers on a grid from 0 up: rounding to it is the Relu.
        """
        for node in reversed(self.model.node):
            one = self.grids.get(node.output[0])
            if one is None or self._only_user(node.input[0], node.op_type) is None:
                continue
            if node.op_type in _BACKWARDS or (node.op_type == "Relu" and one.zero == 0):
                self.grids.setdefault(node.input[0], one)
        for node in self.model.node:
            one = self.grids.get(node.input[0]) if node.input else None
            if one is None:
                continue
            if (node.op_type in _FORWARDS and self._pads_nothing_else(node)) or (
                node.op_type == "Relu" and one.zero == 0
            ):
                self.grids.setdefault(node.output[0], one)

    def _pads_nothing_else(self, node: NodeProto) -> bool:
        """Whether a node, if it pads, pads zeros."""
        value = node.input[2] if node.op_type == "Pad" and len(node.input) > 2 else ""
        return not value or not self._read(value).any()

    def bounded(self, layer: _Layer) -> bool:
        """Whether a layer may run in integers: a convolution whose result has a grid, which it gets if it has none."""
        if layer.node.op_type != "Conv" or layer.result in self.grids:
            return True
        low, high = layer.low, layer.high
        add = self._only_user(layer.result, "Add")
        if add is not None:
            total = self.grids.get(add.output[0])
            (*_, other) = [self.grids.get(name) for name in add.input if name != layer.result] or [None]
            if total is not None and other is not None:
                low, high = max(low, total.low - other.high), min(high, total.high - other.low)
        if self._only_user(layer.result, "Relu") is not None:
            low = max(low, 0.0)
        if not math.isfinite(high - low):
            return False
        scale, zero = grid(torch.tensor(min(low, 0.0)), torch.tensor(max(high, 0.0)), bits=8)
        self.grids[layer.result] = Grid(scale.item(), int(zero), 255)
        return True

    def write(self, layer: _Layer) -> None:
        """Let a node read whole numbers."""
        node, graph, codes, scales = layer.node, self.graph, layer.codes, layer.scales
        if layer.bias is not None and layer.biased is not None:
            # A bias is int32 steps of input times weight: where these are too small for it, the weight's are made larger.
            least = np.maximum(np.abs(layer.bias) / (layer.inputs.scale * 2.0**30), np.finfo(np.float32).tiny)
            larger = np.maximum(scales, least)
            codes = np.rint(codes * _column(scales / larger, codes)).astype(np.int64)
            scales = larger.astype(np.float32)
            steps = np.float32(layer.inputs.scale) * scales
            whole = np.rint(layer.bias / steps.astype(np.float64)).astype(np.int32)
            reader, at = layer.biased
            reader.input.extend([""] * (at + 1 - len(reader.input)))
            reader.input[at] = graph.node("DequantizeLinear", graph.constant(whole), graph.constant(steps), axis=0)
        axis = 0
        if node.op_type == "MatMul":
            codes, axis = np.ascontiguousarray(codes.T), 1
            if len(self.users[node.input[1]]) == 1:
                self.model.node.remove(self.turned[node.input[1]])
        # Onnxruntime's QGemm asks for the zero point, although it is 0.
        packed, zero = integer_constant(graph, codes), graph.constant(np.zeros(len(scales), np.int8))
        scale = graph.constant(scales.astype(np.float32))
        node.input[1] = graph.node("DequantizeLinear", packed, scale, zero, axis=axis)
        if layer.norm is not None:
            self.model.node.remove(layer.norm)
            node.output[0] = layer.result

    def leave_out_relus(self) -> None:
        """A Relu between two values on one grid from 0 up does nothing."""
        outputs = {value.name for value in self.model.output}
        for node in [node for node in self.model.node if node.op_type == "Relu"]:
            before, after = self.grids.get(node.input[0]), self.grids.get(node.output[0])
            if before is not None and before == after and before.zero == 0 and node.output[0] not in outputs:
                self.model.node.remove(node)
                for reader in self.model.node:
                    for i, name in enumerate(reader.input):
                        reader.input[i] = node.input[0] if name == node.output[0] else name

    def round_values(self) -> None:
        """Round every value that has a grid where it arises.

        Who computes in integers reads the rounded one, and so does every reader of what integers give, the user included.
        """
        nodes: list[NodeProto] = []
        rounded: dict[str, str] = {}
        readers = {layer.node.output[0] for layer in self.layers}
        outputs = {value.name for value in self.model.output}
        whole: set[str] = set()

        def arises(value: str, maker: NodeProto | None = None) -> None:
            one = self.grids.get(value)
            if one is None:
                return
            raw, last = value, self.graph.name()
            if maker is not None and value in outputs & whole:
                raw, last = last, value
                maker.output[list(maker.output).index(value)] = raw
            if one.top < 255:  # fewer bits than the type has
                ends = [self.graph.constant(np.float32(end)) for end in (one.low, one.high)]
                clipped = self.graph.name()
                nodes.append(helper.make_node("Clip", [raw, *ends], [clipped]))
                raw = clipped
            constants = [self.graph.constant(np.float32(one.scale)), self.graph.constant(np.uint8(one.zero))]
            numbers = self.graph.name()
            nodes.append(helper.make_node("QuantizeLinear", [raw, *constants], [numbers]))
            nodes.append(helper.make_node("DequantizeLinear", [numbers, *constants], [last]))
            rounded[value] = last

        for value in self.model.input:
            arises(value.name)
        for node in self.model.node:
            values = [name for name in (*node.input, *node.output) if name and name not in self.constants]
            keeps = node.op_type in _FORWARDS | {"Relu", "Add"} and all(name in self.grids for name in values)
            if keeps or node.output[0] in readers:
                whole.update(node.output)
            for i, name in enumerate(node.input):
                if name in whole or node.output[0] in whole:
                    node.input[i] = rounded.get(name, name)
            nodes.append(node)
            for name in node.output:
                arises(name, node)
        del self.model.node[:]
        self.model.node.extend(nodes)


def _column(values: Array, codes: Array) -> Array:
    """A number a row, to be multiplied by all of its entries."""
    return values.reshape(-1, *(1,) * (codes.ndim - 1))
