"""New nodes and constants for an ONNX graph, as few bytes as its format allows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

__all__ = ["Graph", "leave_out_unused", "reads"]

Array = NDArray[Any]


def reads(node: NodeProto) -> Iterator[str]:
    """The values that a node reads; those that the branches of an If read, too."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            yield from (name for one in inner.node for name in reads(one))
            yield from (value.name for value in inner.output)


def leave_out_unused(graph: GraphProto) -> None:
    """Leave out the constants that no node reads, in place."""
    used = {name for node in graph.node for name in reads(node)}
    left = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(left)


class Graph:
    """Collects nodes in the order in which they run; equal constants are kept once, names are short.

    Args:
        taken: names that values elsewhere have.

    >>> graph = Graph()
    >>> total = graph.node("Add", graph.constant(np.float32(1)), graph.constant(np.float32(1)))
    >>> total, len(graph.nodes), len(graph.initializers)
    ('psc1', 1, 1)
    """

    def __init__(self, taken: Collection[str] = ()) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: list[TensorProto] = []
        self._pool: dict[Any, str] = {}
        self._names = (name for name in map("psc{}".format, count()) if name not in taken)

    def name(self) -> str:
        """A name that no other value has."""
        return next(self._names)

    def constant(self, values: Any, bfloat16: bool = False) -> str:
        """The name of a constant; `bfloat16` says that a uint16 array holds the bits of such numbers."""
        array = np.asarray(values)
        key = (array.dtype.str, bfloat16, array.shape, array.tobytes())
        if key not in self._pool:
            self._pool[key] = self.name()
            tensor = numpy_helper.from_array(array, self._pool[key])
            if bfloat16:
                tensor.data_type = TensorProto.BFLOAT16
            self.initializers.append(tensor)
        return self._pool[key]

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """The name of a new node's only output."""
        output = self.name()
        self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
        return output

    def shaped(self, value: str, *shape: int) -> str:
        """`value` in another shape."""
        return self.node("Reshape", value, self.constant(np.array(shape, np.int64)))

    def cut(self, value: str, axis: int, length: int) -> str:
        """The first `length` entries along an axis."""
        numbers = [self.constant(np.array([number], np.int64)) for number in (0, length, axis)]
        return self.node("Slice", value, *numbers)

    def repeated(self, value: str, before: int, times: int, after: int) -> str:
        """A value seen as ``(before, after)`` with each row repeated: ``(before, times, after)``."""
        return self.node(
            "Expand", self.shaped(value, before, 1, after), self.constant(np.array([before, times, after], np.int64))
        )

    def rename(self, value: str, name: str) -> None:
        """Give the last node the name by which a graph asks for its value."""
        if self.nodes[-1].output[0] != value:
            raise ValueError(f"{value} is not what the last node gives")
        self.nodes[-1].output[0] = name
