"""A live model as a file sees it: plain names, and what the slots would be at full strength."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from psc_lightning.live import compressed, under_names
from psc_lightning.sharding import reshard
from psc_lightning.slots import Slots
from psc_lightning.targets import matches_name, patterns

__all__ = ["Snapshot", "part_of", "plain_name", "plain_state", "snapshots_of"]

_SHOWN = 8

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


def part_of(state: Mapping[str, Any], only: str | Iterable[str] | None) -> dict[str, Any]:
    """The entries of a state that patterns choose: globs over names, modules' names, ``re:…``; None: all.

    Raises:
        ValueError: a pattern matches nothing.

    >>> list(part_of({"base.weight": 0, "lora_A.weight": 1, "lora_B.weight": 2}, "lora_*"))
    ['lora_A.weight', 'lora_B.weight']
    """
    wanted = patterns("only", only)
    for pattern in wanted or ():
        if not any(matches_name(pattern, name) for name in state):
            shown = ", ".join(list(state)[:_SHOWN]) + ", …" * (len(state) > _SHOWN)
            raise ValueError(f"only: {pattern!r} matches no tensor or module; the tensors are {shown or '(none)'}")
    return {name: x for name, x in state.items() if wanted is None or any(matches_name(p, name) for p in wanted)}
