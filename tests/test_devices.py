"""Where the weights live there may be no float64, no NumPy, and no sum that is the same every time (case 37)."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from far import Far, FarDevice
from test_contract import LAYERS, Choice, alone, applies, combinations, fill, label

from psc_lightning.callbacks import GradientClipping
from psc_lightning.slots import Slots


def _cycle(slots: Slots, latent: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    """Labels, a start, a step in the ramp and one after it: every hard weight and gradient of them."""
    made = []
    for slot in ("tying", "mask"):
        slots.observe(slot, latent, gradient)
    slots.set_strength("tying", 1.0, latent)
    for strength in (0.5, 1.0):
        for slot in ("mask", "levels"):
            slots.set_strength(slot, strength, latent)
        made.append(slots.renew(latent, torch.empty_like(latent)).clone())
        pulled = slots.pull(latent, gradient.clone())
        made += [] if pulled is None else [pulled]
        made += [sidecar.grad for sidecar in slots.active_sidecars() if sidecar.grad is not None]
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
