"""FSDP2: a Parameter is a shard on each rank between steps, and whole only while its layer runs.

What looks at whole weights between steps (thresholds, k-means, saliency, writing a file) gathers them here. All ranks
gather in the same order and compute alike, so that what they find needs no exchange. A shard (a `DTensor`) is told by its
methods, since importing its class takes longer than reading a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

__all__ = ["by_rank_zero", "gather", "is_sharded", "reshard", "scatter", "sharded_modules", "whole"]

T = TypeVar("T", bound="Tensor | None")


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


@torch.no_grad()
def scatter(full: Tensor, shard: Tensor) -> None:
    """Overwrite a sharded tensor with its part of a whole one, which is the same on every rank."""
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(shard, DTensor)
    mesh = shard.device_mesh
    everywhere = DTensor.from_local(full.to(shard.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    shard.copy_(everywhere.redistribute(placements=shard.placements))


@contextmanager
def whole(module: nn.Module, weight: T = None, gradients: bool = False) -> Iterator[T]:  # type: ignore[assignment]
    """Within it, sharded Parameters of `module` are whole and plain; what is written to them goes back to the shards.

    Args:
        module: where nothing is sharded, nothing happens.
        weight: one Parameter more, which lies elsewhere, is sharded where those of `module` are, and is given out.
        gradients: gather their gradients, too.
    """
    if weight is not None and not is_sharded(weight):
        yield weight
        return
    reshard(module)
    found: dict[int, tuple[Tensor, nn.Parameter]] = {}

    def gathered(parameter: Any) -> Any:
        if id(parameter) not in found:
            full = nn.Parameter(gather(parameter), parameter.requires_grad)
            full.grad = gather(parameter.grad) if gradients and parameter.grad is not None else None
            found[id(parameter)] = parameter, full
        return found[id(parameter)][1]

    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (owner._parameters, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if parameter is not None and is_sharded(parameter)
    ]
    try:
        for parameters, name, parameter in places:
            parameters[name] = gathered(parameter)
        yield weight if weight is None else gathered(weight)
    finally:
        for parameters, name, parameter in places:
            parameters[name] = parameter
        for shard, full in found.values():
            scatter(full.detach(), shard)


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
