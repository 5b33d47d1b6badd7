"""A live model as a file sees it: plain names, and what the slots would be at full strength."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from psc_lightning.live import compressed, under_names
from psc_lightning.sharding import reshard
from psc_lightning.slots import Slots

__all__ = ["Snapshot", "plain_name", "plain_state", "snapshots_of"]

#: slots at full strength, and the latent weight they are of
Snapshot = tuple[Slots, Tensor]


def snapshots_of(model: nn.Module) -> dict[str, Snapshot]:
    """What a file would hold of each tensor that is compressed, under every name that it has; one object for one tensor."""
    reshard(model)
    once = {id(tensor): tensor.snapshot(parameter) for _, tensor, parameter in compressed(model)}
    found = {plain_name(name): once.get(id(tensor)) for name, tensor in under_names(model).items()}
    return {name: snapshot for name, snapshot in found.items() if snapshot is not None}


def plain_name(name: str) -> str:
    """A name without what torch.compile puts into it.

    >>> plain_name("net._orig_mod.0.weight")
    'net.0.weight'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def plain_state(model: nn.Module) -> dict[str, Any]:
    """The model's state under plain names."""
    return {plain_name(name): value for name, value in model.state_dict().items()}
