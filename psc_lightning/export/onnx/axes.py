"""Which axes of a graph's inputs have no fixed length, and what its inputs and outputs are called."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from onnx import GraphProto
from torch import Tensor, nn

__all__ = ["Shapes", "check_open", "open_axes", "set_names", "shapes_of", "with_lengths"]

#: input (a glob over their names) → axis → what to call its length
Shapes = Mapping[str, Mapping[int, str]]


def open_axes(
    plain: nn.Module,
    example: tuple[Any, ...],
    dynamic_shapes: Shapes | None,
    dynamic_batch: bool,
    input_names: Sequence[str] | None,
) -> list[dict[int, str]]:
    """Of each input, the axes whose length is open, and the lengths' names.

    Raises:
        ValueError: an input, axis or name that there is not, or lengths of one name that differ in the example.

    >>> open_axes(nn.Identity(), (torch.zeros(2, 5),), {"input": {-1: "length"}}, True, None)
    [{0: 'batch', 1: 'length'}]
    """
    found: list[dict[int, str]] = [{} for _ in example]
    if dynamic_batch:
        lengths = {len(x) if isinstance(x, Tensor) and x.dim() else None for x in example}
        if len(lengths) != 1 or None in lengths:
            raise ValueError("dynamic_batch: expected inputs that are tensors with first axes of one length")
        found = [{0: "batch"} for _ in example]
    for pattern, axes in (dynamic_shapes or {}).items():
        names = _names(plain, example, input_names)
        chosen = [i for i, known in enumerate(names) if any(fnmatchcase(name, pattern) for name in known)]
        if not chosen:
            listed = ", ".join(name for known in names for name in known[:1])
            raise ValueError(f"dynamic_shapes: {pattern!r} is none of the inputs, which are {listed}")
        for i in chosen:
            found[i] |= {_axis(example[i], axis, name, names[i][0]): name for axis, name in axes.items()}
    if any(found) and not all(isinstance(x, Tensor) for x in example):
        raise ValueError("dynamic_shapes: expected inputs that are tensors, one beside the other")
    for name in {name for axes in found for name in axes.values()}:
        given = {x.shape[axis] for x, axes in zip(example, found) for axis in axes if axes[axis] == name}
        if len(given) > 1 or 0 in given:
            raise ValueError(
                f"dynamic_shapes: {name!r} is one length above 0, but in the example it is {sorted(given)}"
            )
    return found


def _names(plain: nn.Module, example: tuple[Any, ...], input_names: Sequence[str] | None) -> list[list[str]]:
    """What each input may be called: as the caller says, and as `forward` does."""
    known: list[list[str]] = [[name] for name in input_names or ()][: len(example)]
    known += [[] for _ in example[len(known) :]]
    parameters = list(inspect.signature(plain.forward).parameters.values())
    for i, names in enumerate(known if parameters else ()):
        own = parameters[min(i, len(parameters) - 1)]
        many = own.kind is inspect.Parameter.VAR_POSITIONAL
        names.append(f"{own.name}_{i - len(parameters) + 1}" if many else own.name)
    return known


def _axis(x: Any, axis: int, name: str, which: str) -> int:
    axes = x.dim() if isinstance(x, Tensor) else 0
    if not isinstance(axis, int) or not -axes <= axis < axes:
        raise ValueError(f"dynamic_shapes: {which} has {axes} axes in the example, found axis {axis!r}")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"dynamic_shapes: expected a name of letters, digits and _ for a length, found {name!r}")
    return axis % axes


def with_lengths(example: tuple[Any, ...], axes: Sequence[Mapping[int, str]]) -> tuple[Any, ...]:
    """An example whose open lengths are no 1, which torch takes for a constant."""
    made = list(example)
    for i, one in enumerate(axes):
        for axis in one:
            if made[i].shape[axis] == 1:
                made[i] = torch.cat((made[i], made[i]), axis)
    return tuple(made)


def shapes_of(plain: nn.Module, example: tuple[Any, ...], axes: Sequence[Mapping[int, str]]) -> Any:
    """What tells torch which lengths are open, however `forward` takes its inputs; None: none."""
    if not any(axes):
        return None
    names = {name for one in axes for name in one.values()}
    lengths = {name: torch.export.Dim(name) for name in names}
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]  # torch's
    for x, one in zip(example, axes, strict=True):
        if one:
            shapes[x] = {axis: lengths[name] for axis, name in one.items()}
    return shapes.dynamic_shapes(plain, example)  # type: ignore[no-untyped-call]  # torch's


def check_open(graph: GraphProto, axes: Sequence[Mapping[int, str]], dynamic_batch: bool) -> None:
    """Refuse a graph in which a length has become a constant.

    Raises:
        ValueError: there is one; it is named.
    """
    for value, one in zip(graph.input, axes):
        for axis, name in one.items():
            if value.type.tensor_type.shape.dim[axis].dim_param:
                continue
            argument = "dynamic_batch" if dynamic_batch and name == "batch" else "dynamic_shapes"
            which = "the first axis" if axis == 0 else f"axis {axis}"
            which += f" of {value.name} ({name})" if argument == "dynamic_shapes" else ""
            raise ValueError(
                f"{argument}: the model's code fixes the length of {which}, as len(x) does: take x.shape[{axis}] there, or "
                "export one file for each length"
            )


def set_names(graph: Any, what: str, values: Sequence[Any], names: Sequence[str] | None) -> None:
    """Give inputs, or then outputs, of torch's graph other names; values within that have one get another by torch.

    Args:
        graph: in torch's own form.
        what: the argument that the names come from.
        values: its inputs, or its outputs.
        names: for each a name; None: those that torch chose.

    Raises:
        ValueError: not a name for each, or one twice.
    """
    if names is None:
        return
    texts = [] if isinstance(names, str) else [name for name in names if isinstance(name, str) and name]
    inputs = () if values is graph.inputs else graph.inputs
    if not len(values) == len(texts) == len({*texts}) == len(list(names)) or {*texts} & {
        value.name for value in inputs
    }:
        of = ", none of them an input's," * bool(inputs)
        raise ValueError(f"{what}: expected {len(values)} different names{of or ','} found {names!r}")
    own = {id(value) for value in values}
    if len(own) < len(values) or any(id(value) in own for value in inputs):
        raise ValueError(
            f"{what}: the model returns an input, or a value twice, which has one name only: leave this out"
        )
    for value, name in zip(values, texts):
        value.name = name
