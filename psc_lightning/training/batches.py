"""What of a batch a model is called with, by the signature of its `forward`; what cannot be known is said, not guessed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

__all__ = ["Call", "call_of", "on_device", "shortened"]

#: positional and keyword arguments
Call = tuple[tuple[Any, ...], dict[str, Any]]


def call_of(model: nn.Module, batch: Any) -> Call:
    """The arguments for `model` in a batch of training.

    - a tensor: itself;
    - a mapping: the entries that `forward` names (all of them, where it takes any);
    - a list or tuple: the first entry, where `forward` takes one input, which may be a mapping again. Where it takes n ≥ 2,
      the first n of n + 1 entries, or the n of the first one.

    Raises:
        ValueError: none of these; the message says why.

    >>> x, y, z = torch.zeros(3, 2, 1).unbind()
    >>> call_of(nn.Linear(1, 1), [x, z])[0] == (x,), call_of(nn.Bilinear(1, 1, 1), [x, y, z])[0] == (x, y)
    (True, True)
    >>> list(call_of(nn.Linear(1, 1), {"input": x, "label": z})[1])
    ['input']
    """
    parameters = inspect.signature(model.forward).parameters.values()
    if isinstance(batch, Mapping):
        return (), _named(batch, list(parameters))
    if isinstance(batch, Tensor):
        return (batch,), {}
    if not isinstance(batch, list | tuple) or not batch:
        raise ValueError(
            f"a batch is a {type(batch).__name__}, neither a tensor nor a mapping nor a list that begins with one"
        )
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [one.name for one in parameters if one.kind in positional and one.default is one.empty]
    first = batch[0]
    if len(needed) > 1:
        if isinstance(first, list | tuple) and len(first) == len(needed):
            return tuple(first), {}
        if len(batch) == len(needed) + 1:
            return tuple(batch[:-1]), {}
        raise ValueError(
            f"forward needs {', '.join(needed)}, and which of a batch's {len(batch)} entries these are is not said"
        )
    if isinstance(first, Mapping):
        return (), _named(first, list(parameters))
    if not isinstance(first, Tensor):
        raise ValueError(f"a batch begins with a {type(first).__name__}, not with a tensor")
    return (first,), {}


def _named(batch: Mapping[Any, Any], parameters: list[inspect.Parameter]) -> dict[str, Any]:
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    names = [one.name for one in named] or ([*batch] if any(one.kind is one.VAR_KEYWORD for one in parameters) else [])
    missing = [one.name for one in named if one.default is one.empty and one.name not in batch]
    given = {name: batch[name] for name in names if name in batch}
    if missing or not given:
        raise ValueError(
            f"forward takes {', '.join(missing or names) or 'no names'}, a batch has {', '.join(map(str, batch))}"
        )
    return given


def shortened(call: Call, most: int) -> Call:
    """A copy of the arguments, of as many samples (two or more) as fit into so many bytes.

    Raises:
        ValueError: something in them that no checkpoint can hold.
    """
    tensors = list(_tensors(call))
    samples = next((len(tensor) for tensor in tensors if tensor.dim()), 0)
    fit = max(2, samples * most // max(sum(tensor.nbytes for tensor in tensors), 1))

    def short(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (value[:fit] if value.dim() and len(value) == samples else value).detach().clone()
        if type(value) in (list, tuple):
            return type(value)(map(short, value[:fit] if len(value) == samples else value))
        if isinstance(value, Mapping):
            return {key: short(one) for key, one in value.items()}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(f"a batch holds a {type(value).__name__}")

    args, kwargs = call
    return tuple(map(short, args)), {name: short(value) for name, value in kwargs.items()}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(one)


def on_device(value: Any, device: torch.device) -> Any:
    """The same with all its tensors there."""
    return apply_to_collection(value, Tensor, lambda tensor: tensor.to(device))
