"""A live model as a file sees it: plain names, and what the slots would be at full strength."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from psc_lightning.artifact.directory import DTYPES
from psc_lightning.live import compressed, under_names
from psc_lightning.sharding import is_sharded, reshard
from psc_lightning.slots import Slots
from psc_lightning.targets import matches_name, patterns

__all__ = ["Snapshot", "check", "check_tensor", "part_of", "plain_name", "plain_state", "snapshots_of", "tell_extras"]

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


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors under plain names."""
    return {plain_name(name): value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def extras(model: nn.Module) -> dict[str, str]:
    """What else its state dict holds (extra state, a metric's lists), which no file does: plain name → type."""
    state = model.state_dict().items()
    return {plain_name(name): type(value).__name__ for name, value in state if not isinstance(value, Tensor)}


def check(model: nn.Module) -> None:
    """Refuse what no file holds, as far as it can be known before training; warn of what it leaves out.

    Raises:
        ValueError: as `save`; the tensor is named.
    """
    with torch.no_grad():
        for name, value in plain_state(model).items():
            check_tensor(name, value)
    tell_extras(model)


def tell_extras(model: nn.Module) -> None:
    """Warn of what a file leaves out."""
    if found := extras(model):
        listed = ", ".join(f"{name} ({kind})" for name, kind in found.items())
        warnings.warn(
            f"a .psc file holds tensors only, and leaves out {listed}: load_into(model, path) leaves the model's own there, "
            "load_state_dict needs strict=False",
            stacklevel=3,
        )


def check_tensor(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that cannot be stored.

    Raises:
        ValueError: its type, its kind, or a number that is not finite.
    """
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.dtype not in DTYPES:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"{name}: expected a dense tensor with values, of type {kinds}, found {tensor.dtype} ({tensor.layout}) on "
            f"{tensor.device}: convert it first, or register a buffer with persistent=False"
        )
    # Either is NaN where any entry is. A shard was whole when the model was built; all ranks would have to look at once.
    if is_sharded(tensor) or not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    if not all(map(math.isfinite, map(float, tensor.aminmax()))):
        raise ValueError(
            f"{name}: expected finite numbers, found NaN or infinity: look for a diverged training run; a buffer that masks "
            "may hold torch.finfo(dtype).min, or be registered with persistent=False"
        )


def part_of(state: Mapping[str, Tensor], only: str | Iterable[str] | None) -> dict[str, Tensor]:
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
