"""FSDP2: a Parameter is a shard on each rank between steps, and whole only while its layer runs.

What needs whole weights between steps (thresholds, k-means, saliency, writing a file) gathers them here. All ranks
gather in the same order and compute alike, so that results need no exchange. A shard (a `DTensor`) is recognised by its
methods, since importing its class takes longer than reading a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

__all__ = ["by_rank_zero", "gather", "is_sharded", "local", "reshard", "scatter", "sharded_modules", "whole"]


def is_sharded(tensor: object) -> bool:
    """Whether this is a `DTensor`, of which each rank holds a part."""
    return hasattr(tensor, "full_tensor")


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    return [module for module in model.modules() if any(base.__name__ == "FSDPModule" for base in type(module).__mro__)]


def reshard(model: nn.Module) -> None:
    """Let go of weights that a forward pass has left whole: what is written to the shards would not reach them."""
    for module in sharded_modules(model):
        module.reshard()


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor; every rank of it must ask."""
    return tensor.full_tensor().detach() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """The part that this rank holds, detached: of a tensor that is not sharded all of it."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part.detach()


@torch.no_grad()
def scatter(full: Tensor, shard: Tensor) -> None:
    """Overwrite a sharded tensor with its part of a whole one, which is the same on every rank."""
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(shard, DTensor)
    mesh = shard.device_mesh
    everywhere = DTensor.from_local(full.to(shard.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    shard.copy_(everywhere.redistribute(placements=shard.placements))


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Within it, sharded Parameters of a module are whole and plain, for reading."""
    found: dict[int, nn.Parameter] = {}
    places = [
        (owner._parameters, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]
    if places:
        reshard(module)
    try:
        for parameters, name, parameter in places:
            if id(parameter) not in found:
                found[id(parameter)] = nn.Parameter(gather(parameter), parameter.requires_grad)
            parameters[name] = found[id(parameter)]
        yield
    finally:
        for parameters, name, parameter in places:
            parameters[name] = parameter


def by_rank_zero(action: Callable[[], None], together: bool) -> None:
    """Do something once, on rank zero, however many processes there are.

    Args:
        action: what to do.
        together: all ranks call this: they wait, and fail where rank zero fails.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return action()
    failed: list[OSError | None] = [None]
    if distributed.get_rank() == 0:
        try:
            action()
        except OSError as error:
            failed = [error]
    if together:
        distributed.broadcast_object_list(failed)
    if failed[0] is not None:
        raise failed[0]
    return None
