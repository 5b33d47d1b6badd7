"""Small models for the tests of the file."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor, nn

from psc_lightning.levels import LEVELS
from psc_lightning.slots.latent import Compressed
from psc_lightning.slots.layout import Layout
from psc_lightning.slots.live import hold
from psc_lightning.slots.slots import Slots, Spec
from psc_lightning.tying import TYINGS


def bag(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module whose state dict is exactly this."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(leaf, tensor)
    return root


def net(seed: int = 0) -> nn.Module:
    """A convolution, BatchNorm and a linear layer: 8 leftovers and 2 weights."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 8))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator).abs_() * 0.2 + 0.01)
    for weight in (model[0].weight, model[3].weight):
        weight.data.copy_(torch.randn(weight.shape, generator=generator))
    return model


def fill(
    model: nn.Module, names: tuple[str, ...], hard: bool = True, **slots: str | tuple[str, dict[str, object]]
) -> None:
    """Compress these tensors with these slots (a method, or a method and its options)."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        layer = model.get_submodule(path)
        weight = layer._parameters[leaf]
        assert weight is not None
        its_slots = Slots(Layout.of(layer), tuple(weight.shape))
        for slot, method in slots.items():
            method, options = (method, {}) if isinstance(method, str) else method
            its_slots.fill(slot, Spec(method, options, "test"))
        tensor = Compressed(its_slots)
        hold([(layer, leaf)], tensor)
        if hard:
            tensor.harden(weight)


def compressed(**slots: str | tuple[str, dict[str, object]]) -> nn.Module:
    """`net` with both weights behind these slots (a tying that needs a kernel: the first only)."""
    model = net()
    names = ("0.weight",) if slots.get("tying") == "separable" else ("0.weight", "3.weight")
    fill(model, names, **slots)
    return model


MASK = ("magnitude", {"threshold": 0.3})

#: every tying × levels, all with a mask, and none of a kind among each
EVERY_METHOD = [
    {slot: method for slot, method in (("tying", tying), ("mask", MASK), ("levels", levels)) if method}
    for tying, levels in product((None, *TYINGS), (None, *LEVELS))
]
