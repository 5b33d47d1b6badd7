from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from psc_lightning.slots.layout import Layout


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 5), (5, 3)),
        (nn.Conv1d(4, 6, 3, groups=2), (6, 2, 3)),
        (nn.Conv2d(4, 4, 3, groups=4), (4, 1, 3, 3)),
        (nn.Conv3d(2, 3, 2), (3, 2, 2, 2, 2)),
        (nn.ConvTranspose1d(4, 6, 3), (6, 4, 3)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), (6, 2, 3, 3)),
        (nn.Embedding(7, 3), (7, 3)),
        (nn.Bilinear(2, 3, 4), (4, 2, 3)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_shape_and_round_trip(layer: nn.Module, shape: tuple[int, ...]):
    layout = Layout.of(layer)
    matrix = layout.matrix(layer.weight)
    assert layout.shape(tuple(layer.weight.shape)) == shape == tuple(matrix.shape)
    back = layout.weight(matrix, tuple(layer.weight.shape))
    assert torch.equal(back, layer.weight)
    assert back.is_contiguous()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_a_row_of_the_matrix_is_what_one_output_reads(groups, inputs, outputs, kernel):
    """Zeroing row o of the matrix silences output channel o, and no other."""
    up = nn.ConvTranspose2d(groups * inputs, groups * outputs, kernel, groups=groups, bias=False)
    layout, x = Layout.of(up), torch.rand(1, groups * inputs, 2, 2) + 0.1
    matrix = layout.matrix(up.weight.detach()).abs() + 0.1
    for o in range(len(matrix)):
        one = matrix.clone()
        one[o] = 0
        out = F.conv_transpose2d(x, layout.weight(one, tuple(up.weight.shape)), groups=groups)
        assert [bool(channel.any()) for channel in out[0]] == [i != o for i in range(len(matrix))]


def test_a_column_of_the_matrix_is_one_input():
    up = nn.ConvTranspose2d(4, 6, 1, groups=2)
    layout = Layout.of(up)
    matrix = torch.zeros(6, 2, 1, 1)
    matrix[4, 1] = 1  # second group's second output reads that group's second input
    assert layout.weight(matrix, (4, 3, 1, 1)).nonzero().tolist() == [[3, 1, 0, 0]]


@pytest.mark.parametrize("shape", [(), (1,), (5,)])
def test_one_axis_or_none_is_one_row(shape: tuple[int, ...]):
    values = torch.rand(shape)
    for layout in (Layout(), Layout(transposed=True)):
        assert layout.shape(shape) == (1, values.numel()) == tuple(layout.matrix(values).shape)
        assert torch.equal(layout.weight(layout.matrix(values), shape), values)


def test_subclasses_and_names():
    class Mine(nn.ConvTranspose1d):
        pass

    assert Layout.of(Mine(4, 4, 3, groups=2)) == Layout(transposed=True, groups=2)
    conv1d = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})
    assert Layout.of(conv1d()) == Layout(transposed=True)
    assert Layout.of(type("Conv1D", (nn.Module,), {"__module__": "mine"})()) == Layout()


def test_the_matrix_is_differentiable():
    up = nn.ConvTranspose1d(2, 3, 2)
    (Layout.of(up).matrix(up.weight) * torch.arange(12.0).reshape(3, 2, 2)).sum().backward()
    # matrix[o, i, k] is weight[i, o, k]
    assert up.weight.grad.tolist() == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 11]]]


@pytest.mark.parametrize("layout", [Layout(), Layout(transposed=True), Layout(transposed=True, groups=3)])
def test_stored_in_one_integer(layout: Layout, tape):
    written = tape()
    layout.encode(written)
    assert len(written.items) == 1
    assert Layout.decode(written, (6, 2, 3)) == layout


@pytest.mark.parametrize(("groups", "shape"), [(4, (6, 2)), (1, (6,)), (1, ())])
def test_a_layout_that_cannot_be_is_refused(groups: int, shape: tuple[int, ...], tape):
    written = tape()
    written.integer(groups)
    with pytest.raises(ValueError, match="does not fit the shape"):
        Layout.decode(written, shape)
