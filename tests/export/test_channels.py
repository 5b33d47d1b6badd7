from __future__ import annotations

from math import prod
from pathlib import Path

import onnx
import pytest
import torch
from nets import difference, run
from torch import Tensor, nn

import psc_lightning
from psc_lightning import MaskLearning, StraightThroughQuantization, export_onnx


def export(model: nn.Module, x: Tensor, path: Path) -> int:
    """Drop half of all channels, export, compare; how many numbers the layers' weights have in a session."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.bias.data.normal_()
    callbacks = [
        MaskLearning("magnitude", 0.5, granularity="channel", min_size=1),
        StraightThroughQuantization("uniform", min_size=1),
    ]
    psc_lightning.compress(model.eval(), callbacks)
    export_onnx(model, path, x)
    with torch.no_grad():
        assert difference(run(path, x), model(x)) <= 1e-5
    made = onnx.load(path)
    shapes = {tensor.name: onnx.numpy_helper.to_array(tensor).tolist() for tensor in made.graph.initializer}
    weights = {node.input[1] for node in made.graph.node if node.op_type in ("Conv", "Gemm")}
    weights |= {node.input[0] for node in made.graph.node if node.op_type == "Transpose"}
    makers = {node.output[0]: node for node in made.graph.node if node.output[0] in weights}
    # The last step of a rebuilt weight is a product of numbers in its shape, and scales.
    reshapes = {node.output[0]: shapes[node.input[1]] for node in made.graph.node if node.op_type == "Reshape"}
    return sum(prod(reshapes[maker.input[0]]) for maker in makers.values())


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_dead_rows_are_left_out_and_their_constants_kept(tmp_path: Path) -> None:
    # No padding: a dead channel's constant, tanh of BatchNorm of its bias, goes into the next bias.
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 9, 20),
        nn.Sigmoid(),
        nn.Linear(20, 10),
    )
    kept = 8 * 27 + 12 * 8 * 9 + 10 * 12 * 9 + 10 * 10
    assert export(model, torch.randn(2, 3, 12, 12), tmp_path / "model.onnx") == kept


def test_a_padded_convolution_reads_zeros_only(tmp_path: Path) -> None:
    padded = nn.Conv2d(8, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), padded)
    x = torch.randn(1, 3, 6, 6)
    # Around the image a dead channel is 0, inside it its bias: it stays,
    assert export(model, x, tmp_path / "model.onnx") == 8 * 27 + 4 * 8 * 9
    # unless it is 0 there too.
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Tanh(), nn.Conv2d(8, 4, 3, padding=1))
    assert export(model, x, tmp_path / "model.onnx") == 4 * 27 + 4 * 4 * 9


def test_a_layer_of_a_transformer(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    assert export(model, torch.randn(2, 5, 16), tmp_path / "model.onnx") == 32 * 16 + 16 * 32


def test_a_channel_that_nobody_reads_is_left_out(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)).eval()
    x = torch.randn(3, 16)
    with torch.no_grad():
        model[2].weight[:, [1, 5, 6]] = 0
        export_onnx(model, tmp_path / "model.onnx", x)
        assert difference(run(tmp_path / "model.onnx", x), model(x)) <= 1e-5
    shapes = {tuple(tensor.dims) for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert {(9, 16), (4, 9)} <= shapes


class Branched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.second(x)


def test_a_branch_keeps_all(tmp_path: Path) -> None:
    assert export(Branched(), torch.randn(1, 16), tmp_path / "model.onnx") == 8 * 16 + 8 * 8


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.both = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(torch.relu(self.both(torch.relu(self.first(x)))))


def test_a_weight_that_is_used_twice_keeps_all(tmp_path: Path) -> None:
    assert export(Shared(), torch.randn(1, 8), tmp_path / "model.onnx") == 2 * 64


class Rearranged(nn.Module):
    """Sixteen places of eight channels become sixteen rows, although the memory has channel after channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).reshape(16, 8))


def test_a_reshape_that_mixes_channels_keeps_all(tmp_path: Path) -> None:
    assert export(Rearranged(), torch.randn(1, 3, 4, 4), tmp_path / "model.onnx") == 24 + 32


def test_one_channel_is_left_where_none_would_be(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(1, 8)
    with torch.no_grad():
        model[0].weight.zero_()
        export_onnx(model, tmp_path / "model.onnx", x)
        assert difference(run(tmp_path / "model.onnx", x), model(x)) <= 1e-5
    shapes = {tuple(tensor.dims) for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert {(1, 8), (4, 1)} <= shapes
