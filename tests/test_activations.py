"""Hand-computed numbers of the range of a layer's input, and of the grid that it is rounded to."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

from psc_lightning import detach
from psc_lightning.activations import Activations, Grid, activations, hold, of, takes_inputs


def seen(low: float, high: float, bits: int = 2) -> Activations:
    inputs = Activations(bits)
    inputs.see(torch.tensor([low, high]))
    return inputs


def test_inputs_are_rounded_and_the_gradient_passes_within_the_range():
    inputs = seen(-1.0, 2.0)  # steps of 1: -1, 0, 1, 2
    x = torch.tensor([-3.0, -0.6, 0.4, 0.5, 1.5, 1.9, 2.6], requires_grad=True)
    y = inputs(x)
    y.sum().backward()
    assert y.tolist() == [-1, -1, 0, 0, 2, 2, 2]  # halves go to the even one
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("low", "high", "bits", "expected"),
    [
        (-1.0, 2.0, 2, Grid(1.0, 1, 3)),
        (0.0, 510.0, 8, Grid(2.0, 0, 255)),
        (-255.0, -7.0, 8, Grid(1.0, 255, 255)),  # 0 is in every range
        (3.0, 15.0, 4, Grid(1.0, 0, 15)),
    ],
)
def test_the_grid(low: float, high: float, bits: int, expected: Grid):
    assert seen(low, high, bits).grid() == expected
    assert expected.low <= min(low, 0)
    assert expected.high >= max(high, 0)


def test_a_range_is_a_moving_average():
    inputs = seen(-1.0, 2.0)
    inputs.observe()
    inputs.see(torch.tensor([-2.0, 0.0, 1.0]))
    assert inputs.input.low.item() == pytest.approx(-1.1)
    assert inputs.input.high.item() == pytest.approx(1.9)


def test_a_batch_has_one_range_of_all_its_calls():
    """Whatever their order; and the average takes a tenth of it, not of each."""
    for calls in ([-1.0, 2.0], [-8.0, 1.0], [0.0, 16.0]), ([0.0, 16.0], [-8.0, 1.0], [-1.0, 2.0]):
        inputs = Activations(8)
        for number, factor in enumerate((1.0, 2.0)):
            inputs.observe()
            for call in calls:
                inputs.see(factor * torch.tensor(call))
            low, high = (-8.0, 16.0) if number == 0 else (-8.8, 17.6)
            assert inputs.input.low.item() == pytest.approx(low)
            assert inputs.input.high.item() == pytest.approx(high)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_batch_that_holds_no_finite_numbers_is_left_out(bad: float):
    inputs = seen(-1.0, 2.0)
    before = inputs.grid()
    inputs.see(torch.tensor([bad, 1.0]))
    inputs.see(torch.zeros(0))
    assert inputs.grid() == before


def test_an_input_passes_until_one_was_seen():
    inputs, x = Activations(8), torch.tensor([-3.3, 0.7], requires_grad=True)
    y = inputs(x)
    y.sum().backward()
    assert torch.equal(y, x)
    assert x.grad.tolist() == [1, 1]
    assert inputs.grid() is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_input_keeps_its_type(dtype: torch.dtype):
    x = torch.tensor([-3.0, 0.4, 1.6], dtype=dtype)
    assert seen(-1.0, 2.0)(x).dtype == dtype
    assert seen(-1.0, 2.0)(x).tolist() == [-1, 0, 2]
    assert torch.equal(Activations(8)(x), x)


def test_outputs_are_seen_channel_by_channel():
    inputs = Activations(8, channels=2)
    inputs.see_output(torch.tensor([[[1.0, 5.0], [-2.0, -1.0]], [[2.0, 3.0], [4.0, 0.0]]]), axis=1)
    assert inputs.output is not None
    assert inputs.output.low.tolist() == [1, -2]
    assert inputs.output.high.tolist() == [5, 4]


def test_half_precision_models_keep_exact_ranges():
    inputs = seen(-0.1, 2.3, 8)
    before = inputs.grid()
    nn.Sequential(inputs)  # a range is a buffer: it moves, and is saved, with its layer
    assert set(inputs.state_dict()) == {"input.low", "input.high"}
    assert inputs.grid() == before


# ------------------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize(
    ("make", "takes", "hooks"),
    [
        (lambda: nn.Linear(8, 5), True, (1, 0)),
        (lambda: nn.Conv2d(3, 4, 3), True, (1, 1)),
        (lambda: nn.Embedding(8, 5), False, (0, 0)),
        (lambda: nn.ConvTranspose2d(3, 4, 3), False, (0, 0)),
    ],
    ids=["Linear", "Conv2d", "Embedding", "ConvTranspose2d"],
)
def test_inputs_are_rounded_by_a_hook_that_goes(make: Callable[[], nn.Module], takes: bool, hooks: tuple[int, int]):
    layer = make()
    assert takes_inputs(layer) == takes
    if takes:
        inputs = Activations(4, channels=4 if hooks[1] else None)
        hold([layer], inputs)
        hold([layer], inputs)  # again
    assert (len(layer._forward_pre_hooks), len(layer._forward_hooks)) == hooks
    twin = pickle.loads(pickle.dumps(deepcopy(layer)))
    for one in (twin, layer):
        detach(one)
        assert (len(one._forward_pre_hooks), len(one._forward_hooks)) == (0, 0)
        assert not one._forward_pre_hooks_with_kwargs
        assert not one._load_state_dict_pre_hooks


def test_an_input_is_rounded_wherever_it_is_given():
    layer, x, inputs = nn.Linear(8, 5), torch.randn(3, 8), Activations(4)
    hold([layer], inputs)
    plain = layer(x)
    inputs.observing = True
    assert torch.equal(layer(x), plain)  # it has not begun
    inputs.observing, inputs.begun = False, True
    rounded = inputs(x)
    assert len(rounded.unique()) <= 16
    wanted = nn.functional.linear(rounded, layer.weight, layer.bias)
    assert not torch.equal(wanted, plain)
    assert torch.equal(layer(x), wanted)
    assert torch.equal(layer(input=x), wanted)
    twin = deepcopy(layer)
    of(twin).observing = True
    twin(10 * x)
    assert torch.equal(layer(x), wanted)  # a copy's ranges are its own
    assert [name for name, _, _ in activations(nn.Sequential(layer, twin))] == ["0", "1"]


def test_the_state_of_training():
    inputs = Activations(8, channels=2)
    inputs.see(torch.tensor([-1.0, 2.0]))
    inputs.see_output(torch.tensor([[1.0, 5.0]]), axis=1)
    inputs.begun = True
    other = Activations(8, channels=2)
    other.load_training_state(inputs.training_state())
    assert other.begun
    assert other.ranges().inputs == inputs.grid()
    assert other.ranges().outputs.tolist() == [[1, 5], [1, 5]]
    inputs.begun = False
    assert inputs.ranges() is None


def test_ranges_go_where_the_model_goes():
    """As far as a machine without another device shows it: what a moved layer gives has its device, and no error comes."""
    layer, inputs = nn.Linear(8, 5), Activations(4)
    hold([layer], inputs)
    inputs.see(torch.tensor([-1.0, 2.0]))
    inputs.begun = True
    assert layer.to("meta")(torch.zeros(3, 8, device="meta")).device.type == "meta"
    assert {bound.device.type for bound in inputs.buffers()} == {"meta"}
