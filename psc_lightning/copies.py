"""A copy of the user's module for a use of our own, also where something that hangs on the module cannot be copied."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, TypeVar

from torch import nn

__all__ = ["copied"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def copied(module: ModuleT) -> ModuleT:
    """A deep copy, without a Trainer; what hangs on it and cannot be copied (a lock, a generator, a loss's graph) is shared.

    >>> net = nn.Linear(2, 1)
    >>> net.batches = (batch for batch in [])
    >>> twin = copied(net)
    >>> twin.batches is net.batches, twin.weight is net.weight
    (True, False)
    """
    without: dict[int, Any] = {id(getattr(module, "_trainer", None)): None}
    try:
        return deepcopy(module, dict(without))
    except Exception:  # of whatever hangs on it: the second try raises what is not mended by sharing
        torchs = vars(nn.Module())
        hung = [value for part in module.modules() for name, value in vars(part).items() if name not in torchs]
        shared = {id(value): value for value in hung if id(value) not in without and not _copyable(value)}
        return deepcopy(module, {**shared, **without})


def _copyable(value: Any) -> bool:
    try:
        deepcopy(value)
    except Exception:
        return False
    return True
