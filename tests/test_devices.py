"""Where the weights live there may be no float64, no NumPy, and no sum that is the same every time (case 37)."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import pytest
import torch
from far import Far, FarDevice
from test_contract import LAYERS, Choice, alone, applies, combinations, fill, label

from psc_lightning.callbacks import GradientClipping
from psc_lightning.numerics.asking import answers
from psc_lightning.slots.slots import Slots
from psc_lightning.training.sidecars import Sidecars


def _cycle(slots: Slots, latent: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """Labels, a start, a step in the ramp and one after it: every hard weight and gradient of them."""
    made = []
    for slot in ("tying", "mask"):
        slots.observe(slot, latent, gradient)
    slots.set_strength("tying", 1.0, latent)
    for strength in (0.5, 1.0):
        for slot in ("mask", "levels"):
            slots.set_strength(slot, strength, latent)
        slots.refresh(latent)
        made.append(slots.make(latent, torch.empty_like(latent)).clone())
        pulled = slots.pull(latent, gradient.clone())
        made += [] if pulled is None else [pulled]
        learning = [sidecar for sidecar in slots.active_sidecars() if sidecar.grad is not None]
        assert all(
            sidecar.grad.stride() == sidecar.stride() for sidecar in learning
        )  # a fused optimizer takes no others
        made += [sidecar.grad for sidecar in learning]
        slots.stale = True
    return made


def _far(slots: Slots) -> None:
    for module in slots.modules():
        for kind in (module._parameters, module._buffers):
            for name, tensor in kind.items():
                if tensor is not None:
                    far = Far(tensor.detach().clone())
                    kind[name] = torch.nn.Parameter(far) if kind is module._parameters else far


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0, "scope": "layer"}, {"max_value": 0.1}, {"adaptive": 0.01}], ids=str
)
def test_clipping_elsewhere_is_clipping_on_the_cpu(options):
    torch.manual_seed(0)
    layer, gradient = torch.nn.Linear(40, 30), torch.randn(30, 40)
    layer.weight.grad = gradient.clone()
    here = GradientClipping(**options).clip(layer, [layer.weight])
    far = torch.nn.Linear(40, 30)
    far.weight = torch.nn.Parameter(Far(layer.weight.detach()))
    with FarDevice():
        far.weight.grad = Far(gradient.clone())
        there = GradientClipping(**options).clip(far, [far.weight])
    assert there == pytest.approx(here, rel=1e-5)
    torch.testing.assert_close(far.weight.grad.near, layer.weight.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("choice", [*alone(), *combinations()], ids=lambda choice: label("", choice))
@pytest.mark.parametrize("layer", ["Conv2d"])
def test_a_step_elsewhere_is_the_step_on_the_cpu(layer: str, choice: dict[str, Choice]):
    torch.manual_seed(0)
    made, name = LAYERS[layer]
    module = made()
    weight = module._parameters[name]
    if not all(applies(*part, tuple(weight.shape)) for slot, part in choice.items() if part and slot == "tying"):
        pytest.skip("this tying has nothing to tie here")
    here = fill(module, name, choice).slots
    there, latent, gradient = deepcopy(here), weight.detach().clone(), torch.randn_like(weight)
    expected = _cycle(here, latent.clone(), gradient)
    with FarDevice():
        _far(there)
        found = _cycle(there, Far(latent.clone()), Far(gradient.clone()))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, Far)
        torch.testing.assert_close(one.near, other, rtol=1e-5, atol=1e-6)


def _step(choice: dict[str, Choice], tensors: int, strengths: tuple[float, ...] = (0.6, 1.0)) -> FarDevice:
    """What a device has seen of a last training step over so many tensors."""
    torch.manual_seed(0)
    made, name = LAYERS["Conv2d"]
    modules = [made() for _ in range(tensors)]
    held = [fill(module, name, choice) for module in modules]
    with FarDevice() as device:
        for module, tensor in zip(modules, held, strict=True):
            _far(module)
            _far(tensor.slots)
        weights = [module._parameters[name] for module in modules]
        pairs = list(zip(held, weights, strict=True))
        for tensor, weight in pairs:
            for slot in ("tying", "mask", "levels"):
                tensor.set_strength(slot, 0.5, weight)
        answers(tensor.showing(weight) for tensor, weight in pairs)
        sidecars = Sidecars([(0.01, [sidecar for tensor in held for sidecar in tensor.slots.active_sidecars()])])
        for strength in strengths:
            device.waits.clear()
            device.launches.clear()
            for tensor, weight in pairs:
                tensor.set_strength("levels", strength, weight)
            answers(tensor.settling(weight, absorb=False) for tensor, weight in pairs)
            for tensor, weight in pairs:
                weight.grad = torch.ones_like(weight) * weight.detach()
                tensor.pull(weight)
            answers(tensor.lending(weight) for tensor, weight in pairs)
            for _, weight in pairs:
                weight.data.add_(weight if weight.grad is None else weight.grad, alpha=-0.01)
            sidecars.step(1.0)
            for tensor, _ in pairs:
                tensor.slots.stale = True
            answers(tensor.showing(weight) for tensor, weight in pairs)
    return device


@pytest.mark.parametrize("choice", [*alone(), *combinations()], ids=lambda choice: label("", choice))
def test_a_step_waits_for_a_device_as_often_for_many_tensors_as_for_one(choice: dict[str, Choice]):
    one, many = _step(choice, 1).waits, _step(choice, 2).waits
    if (choice.get("tying") or ("",))[0] in ("separable", "low_rank"):
        del one["_to_copy"], many["_to_copy"]  # factors go to where there is float64, each at its time
    assert one == many
    assert sum(many.values()) <= 6


@pytest.mark.parametrize(("method", "most"), [("uniform", 10), ("binary", 10), ("ternary", 22), ("codebook", 44)])
def test_another_tensor_launches_few_operations(method: str, most: int):
    """Each once: a sum before the step and one after it, what finds its tables, what makes its levels."""
    few, many = (_step({"levels": (method, {})}, tensors, (1.0, 1.0)).launches for tensors in (2, 3))
    own = Counter({"ones_like": 1, "mul": 1, "add_": 1})  # of the test: a gradient, a step
    assert sum((many - few - own).values()) <= most
