"""Axes of any length, and inputs and outputs with names: one file, run by onnxruntime at several lengths."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from nets import NETS, build, difference, run, session
from test_integers import rounded
from torch import Tensor, nn

import psc_lightning
from psc_lightning import export_onnx


def shapes(path: Path) -> list[tuple[str, list[Any]]]:
    """Names and shapes of a file's inputs and outputs."""
    made = session(path)
    return [(value.name, value.shape) for value in (*made.get_inputs(), *made.get_outputs())]


def test_sentences_of_any_length(tmp_path: Path) -> None:
    model, x = build("text encoder")
    psc_lightning.compress(model, "low_rank")
    open_axes = {"words": {0: "batch", 1: "length"}}
    export_onnx(model, tmp_path / "model.onnx", x[:1, :1], dynamic_shapes=open_axes, output_names=["y"])
    assert shapes(tmp_path / "model.onnx")[0] == ("words", ["batch", "length"])
    for batch, length in ((1, 3), (3, 16), (2, 1)):
        y = torch.cat([NETS["text encoder"][1]() for _ in range(2)])[:batch, :length]
        with torch.no_grad():
            assert difference(run(tmp_path / "model.onnx", y), model(y)) <= 1e-5, (batch, length)


class Sound(nn.Module):
    """Convolutions over time, its mean, a label; `forward` takes its inputs as they come."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv1d(4, 16, 5, padding=2), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 8, 3))
        self.linear = nn.Linear(8, 3)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        sound, gain = inputs
        heard = self.net(sound * gain)
        return self.linear(heard.mean(-1)), heard


def test_the_last_axis_of_one_of_several_inputs(tmp_path: Path) -> None:
    model = Sound().eval()
    psc_lightning.compress(model, "separable")
    example = (torch.zeros(2, 4, 20), torch.ones(2, 1, 1))
    open_axes = {"inputs_0": {-1: "time"}}
    export_onnx(model, tmp_path / "model.onnx", example, dynamic_shapes=open_axes, output_names=["a", "b"])
    first, second, third, fourth = shapes(tmp_path / "model.onnx")
    assert (first, second) == (("inputs_0", [2, 4, "time"]), ("inputs_1", [2, 1, 1]))
    assert (third, fourth[0]) == (("a", [2, 3]), "b")
    made = session(tmp_path / "model.onnx")
    for length in (20, 7, 33):
        x, gain = torch.randn(2, 4, length), torch.rand(2, 1, 1)
        label, heard = made.run(["a", "b"], {first[0]: x.numpy(), second[0]: gain.numpy()})
        with torch.no_grad():
            expected = model(x, gain)
        assert difference(torch.from_numpy(label), expected[0]) <= 1e-5
        assert difference(torch.from_numpy(heard), expected[1]) <= 1e-5


def test_images_of_any_size_in_integers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    model = rounded(net, [torch.rand(4, 3, 12, 12) for _ in range(4)])
    axes = {"*": {0: "batch", 2: "height", 3: "width"}}
    export_onnx(model, tmp_path / "model.onnx", torch.rand(1, 3, 12, 12), dynamic_shapes=axes)
    for size in ((1, 3, 12, 12), (2, 3, 9, 17)):
        x = torch.rand(size)
        with torch.no_grad():
            expected = model(x)
        assert difference(run(tmp_path / "model.onnx", x), expected) <= 0.02


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("scale", torch.full((8,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))) * self.scale + torch.relu(x)


@pytest.mark.parametrize("names", [("linear", "scale"), ("a.weight", "psc0")])
def test_a_name_may_be_one_that_a_value_within_has(names: tuple[str, str], tmp_path: Path) -> None:
    model, x = Beside().eval(), torch.randn(3, 8)
    psc_lightning.compress(model, "ternary", min_size=1)
    export_onnx(model, tmp_path / "model.onnx", x, input_names=names[:1], output_names=names[1:])
    assert shapes(tmp_path / "model.onnx") == [(names[0], [3, 8]), (names[1], [3, 8])]
    with torch.no_grad():
        assert difference(run(tmp_path / "model.onnx", x), model(x)) <= 1e-5


class Fixes(nn.Module):
    """Its code makes a constant of a length."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 3, 2).sum(2) + y


class Back(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return x + y, y


class Same(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z = x + y
        return z, z


PAIR = (torch.zeros(2, 6), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("model", "example", "options", "said"),
    [
        (
            Fixes(),
            PAIR,
            {"dynamic_shapes": {"x": {1: "n"}}},
            r"code fixes the length of axis 1 of x \(n\), as len\(x\) does",
        ),
        (Fixes(), PAIR, {"dynamic_shapes": {"z": {1: "n"}}}, "'z' is none of the inputs, which are x, y"),
        (
            Fixes(),
            PAIR,
            {"dynamic_shapes": {"*": {1: "n"}}},
            r"'n' is one length above 0, but in the example it is \[3, 6\]",
        ),
        (Fixes(), PAIR, {"dynamic_shapes": {"x": {2: "n"}}}, "x has 2 axes in the example, found axis 2"),
        (Fixes(), PAIR, {"dynamic_shapes": {"x": {"1": "n"}}}, "found axis '1'"),
        (
            Fixes(),
            PAIR,
            {"dynamic_shapes": {"x": {1: "a-b"}}},
            "expected a name of letters, digits and _ for a length, found 'a-b'",
        ),
        (Fixes(), (PAIR[0], 3.0), {"dynamic_shapes": {"x": {1: "n"}}}, "expected inputs that are tensors"),
        (Fixes(), (torch.zeros(2, 0), PAIR[1]), {"dynamic_shapes": {"x": {1: "n"}}}, r"in the example it is \[0\]"),
        (Back(), (PAIR[0], PAIR[0]), {"input_names": "ab"}, "input_names: expected 2 different names, found 'ab'"),
        (Back(), (PAIR[0], PAIR[0]), {"output_names": ["a", "b"]}, "output_names: the model returns an input"),
        (
            Same(),
            (PAIR[0], PAIR[0]),
            {"output_names": ["a", "b"]},
            "output_names: the model returns an input, or a value twice",
        ),
        (
            Beside(),
            (torch.zeros(2, 8),),
            {"output_names": ["x"]},
            "output_names: expected 1 different names, none of them an input's",
        ),
    ],
)
def test_what_cannot_be_open_or_named_is_told(
    model: nn.Module, example: tuple[Any, ...], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        export_onnx(model, tmp_path / "model.onnx", example, **options)
    assert not list(tmp_path.iterdir())


def test_a_stream_takes_a_graph() -> None:
    stream = io.BytesIO()
    export_onnx(nn.Linear(3, 2), stream, torch.zeros(1, 3), dynamic_batch=True)
    made = onnxruntime.InferenceSession(stream.getvalue(), providers=["CPUExecutionProvider"])
    assert made.get_inputs()[0].shape == ["batch", 3]
