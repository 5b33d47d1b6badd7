from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_weights import stored
from torch import nn

from psc_lightning.export.onnx.graph import Graph
from psc_lightning.export.onnx.packing import pack

ROWS, COLUMNS = 64, 512


def packed_bytes(**slots: tuple[str, dict[str, Any]]) -> int:
    """Bytes of the constants that rebuild a 64 × 512 weight."""
    held = stored(nn.Linear(COLUMNS, ROWS), **slots)
    graph = Graph()
    pack(graph, held.cores["core"].numpy(), (ROWS, COLUMNS))
    return sum(len(tensor.raw_data) for tensor in graph.initializers)


@pytest.mark.parametrize(
    ("levels", "options", "bits"),
    [
        *(("uniform", {"bits": bits}, bits) for bits in range(1, 9)),
        ("uniform", {"bits": 4, "group": 50}, 4 + 16 / 50),
        ("uniform", {"bits": 4, "group": 128}, 4 + 16 / 128),
        ("binary", {}, 1),
        ("binary", {"form": "01"}, 1),
        ("ternary", {"group": 64}, 1.6 + 16 / 64),
        ("ttq", {}, 1.6),
        ("ttq", {"group": "tensor"}, 1.6),
        ("log", {"bits": 8}, 8),
        ("log", {"bits": 4, "root": 2}, 4),
        ("codebook", {"k": 16}, 4),
        ("codebook", {"k": 256}, 8),
        ("float16", {}, 16),
        ("bfloat16", {}, 16),
    ],
)
def test_levels_take_their_bits(levels: str, options: dict[str, Any], bits: float) -> None:
    tables = 8 * ROWS + 4 * 512
    assert packed_bytes(levels=(levels, options)) <= 1.15 * bits * ROWS * COLUMNS / 8 + tables


@pytest.mark.parametrize(
    ("mask", "bits"),
    [
        ({"threshold": 0.5}, 1 + 0.5 * 8),
        ({"threshold": 0.5, "granularity": "row", "block": 4}, 1 / 4 + 0.5 * 8),
        ({"threshold": 0.5, "granularity": "column", "block": 4}, 1 / 4 + 0.5 * 8),
        ({"threshold": 0.5, "granularity": "channel"}, 0.5 * 8),
        ({"threshold": 0.9}, 0.1 * (8 + 5)),  # gaps of 5 bits, where a bitmap takes 10 for each survivor
        ({"threshold": 0.99}, 0.01 * (8 + 8)),
    ],
)
def test_masks_take_a_bit_a_unit_or_less(mask: dict[str, Any], bits: float) -> None:
    found = packed_bytes(mask=("magnitude", mask), levels=("uniform", {}))
    assert found <= 1.1 * bits * ROWS * COLUMNS / 8 + 4 * ROWS + 200


def test_what_has_few_values_needs_no_levels() -> None:
    graph = Graph()
    values = np.random.default_rng(0).choice(np.array([0.1, -7.3, 1e-30], np.float32), (ROWS, COLUMNS))
    pack(graph, values, values.shape)
    assert sum(len(tensor.raw_data) for tensor in graph.initializers) <= 1.6 * ROWS * COLUMNS / 8 + 100


def test_zeros_and_nothing() -> None:
    for shape in ((ROWS, COLUMNS), (0, 4)):
        graph = Graph()
        pack(graph, torch.zeros(shape).numpy(), shape)
        assert sum(len(tensor.raw_data) for tensor in graph.initializers) <= ROWS * COLUMNS / 8 + 200
