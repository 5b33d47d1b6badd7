"""The networks are the published ones."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from psc_lightning.app.models import DigitsCNN, LeNet5, LeNet300, ResNet20


@pytest.mark.parametrize(
    ("network", "shape", "parameters"),
    [
        (DigitsCNN, (1, 8, 8), 24_058),
        (LeNet300, (1, 28, 28), 266_610),
        (LeNet5, (1, 28, 28), 431_080),
        (ResNet20, (3, 32, 32), 269_722),
    ],
)
def test_parameters_and_shapes(network: type[nn.Module], shape: tuple[int, ...], parameters: int) -> None:
    net = network().eval()
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert net(torch.zeros(2, *shape)).shape == (2, 10)
    assert network(classes=7).eval()(torch.zeros(1, *shape)).shape == (1, 7)


def test_lenet5_is_caffes() -> None:
    shapes = [tuple(value.shape) for name, value in LeNet5().state_dict().items() if name.endswith("weight")]
    assert shapes == [(20, 1, 5, 5), (50, 20, 5, 5), (500, 800), (10, 500)]


def test_resnet20_has_the_names_of_the_published_checkpoints() -> None:
    names = list(ResNet20().state_dict())
    pattern = r"(layer[123]\.[012]\.)?(conv|bn)[12]\.\w+|linear\.(weight|bias)"
    assert all(re.fullmatch(pattern, name) for name in names)
    assert len([name for name in names if not name.endswith("num_batches_tracked")]) == 97


def test_resnet20_shortcut_takes_every_second_pixel_and_pads_both_sides() -> None:
    block = ResNet20().layer2[0].eval()
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    x = torch.rand(1, 16, 4, 4)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()
