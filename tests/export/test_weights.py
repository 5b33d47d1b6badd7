from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from psc_lightning.export.onnx.graph import Graph
from psc_lightning.export.onnx.weights import write_weight
from psc_lightning.levels import LEVELS
from psc_lightning.slots.layout import Layout
from psc_lightning.slots.slots import Slots, Spec
from psc_lightning.slots.stored import Stored
from psc_lightning.tying import TYINGS, Tying

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(30, 20),
    "Conv2d": lambda: nn.Conv2d(6, 10, 3),
    "grouped": lambda: nn.Conv2d(8, 12, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(8, 6, 3, groups=2),
}
MASKS: list[dict[str, Any]] = [
    {"threshold": 0.4},
    {"threshold": 0.9},
    {"threshold": 0.5, "granularity": "row", "block": 4},
    {"threshold": 0.5, "granularity": "column", "block": 4},
    {"threshold": 0.5, "granularity": "channel"},
]
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in LEVELS),
    *(("uniform", {"bits": bits}) for bits in (1, 2, 3, 5, 6, 7)),
    ("uniform", {"bits": 4, "group": "tensor"}),
    ("uniform", {"bits": 4, "group": 50}),
    ("uniform", {"learned_step": True}),
    ("binary", {"form": "01"}),
    ("binary", {"group": 32}),
    ("ternary", {"group": 7}),
    ("ttq", {"group": "tensor"}),
    ("ttq", {"group": 7}),
    ("log", {"root": 8}),
    ("log", {"bits": 4, "group": "tensor"}),
    ("codebook", {"k": 5, "group": "channel"}),
    ("codebook", {"k": 256}),
]


def run(graph: Graph, value: str, element: int = TensorProto.FLOAT) -> Tensor:
    """What onnxruntime makes of it."""
    output = helper.make_tensor_value_info(value, element, None)
    made = helper.make_graph(graph.nodes, "weight", [], [output], initializer=graph.initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {})[0])


def stored(layer: nn.Module, seed: int = 0, **slots: tuple[str, dict[str, Any]]) -> Stored:
    """A random weight through slots."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    weight.data.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)))
    made = Slots(Layout.of(layer), tuple(weight.shape))
    for slot, (method, options) in slots.items():
        made.fill(slot, Spec(method, options, "test"))
    made.harden(weight)
    return made.stored(weight)


def triples() -> Iterator[tuple[str, dict[str, Any] | None, tuple[str, dict[str, Any]] | None]]:
    """Each pair of a layer, a mask and levels; all three by all three where asked for."""
    if "PSC_TRIPLES" in os.environ:
        yield from product(LAYERS, (None, *MASKS), (None, *OPTIONS))
        return
    layers = list(LAYERS)
    for (i, mask), (j, levels) in product(enumerate((None, *MASKS)), enumerate((None, *OPTIONS))):
        yield layers[(i + j) % len(layers)], mask, levels


def combinations() -> Iterator[Any]:
    for layer, mask, levels in triples():
        chosen = {"mask": ("magnitude", mask) if mask else None, "levels": levels}
        slots = {slot: method for slot, method in chosen.items() if method}
        if slots:
            yield pytest.param(layer, slots, id=f"{layer} {mask or ''} {levels or ''}")
    for layer, tying in product(LAYERS, TYINGS):
        if (layer, tying) != ("Linear", "separable"):
            slots = {"tying": (tying, {}), "mask": ("magnitude", MASKS[0]), "levels": ("uniform", {})}
            yield pytest.param(layer, slots, id=f"{layer} {tying}")


@pytest.mark.parametrize(("layer", "slots"), list(combinations()))
def test_onnxruntime_rebuilds_every_weight_bit_for_bit(
    layer: str, slots: dict[str, Any], same_bits: Callable[[Tensor, Tensor], bool]
) -> None:
    held = stored(LAYERS[layer](), **slots)
    graph = Graph()
    value = write_weight(graph, held)
    found = run(graph, value)
    assert same_bits(found, held.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types(dtype: torch.dtype, same_bits: Callable[[Tensor, Tensor], bool]) -> None:
    held = stored(nn.Linear(30, 20, dtype=dtype), levels=("uniform", {}))
    graph = Graph()
    element = {torch.float64: TensorProto.DOUBLE, torch.float16: TensorProto.FLOAT16}[dtype]
    value = write_weight(graph, held)
    assert same_bits(run(graph, value, element), held.weight)


class Pairs(Tying):
    """A tying that ONNX export has not heard of: every entry twice."""

    def expand(self, cores: dict[str, Tensor]) -> Tensor:
        return cores["core"].repeat_interleave(2, 1)


def test_an_unknown_tying_is_refused() -> None:
    core = torch.randn(4, 3)
    held = Stored("pairs", {"core": core}, core.repeat_interleave(2, 1), Layout(), Pairs())
    with pytest.raises(ValueError, match=r"tying: ONNX export knows RowSharing, .*, found Pairs; `detach` the model"):
        write_weight(Graph(), held)
