"""BatchNorm that follows a convolution, folded into its scales: fewer numbers to store, the same function.

In eval BatchNorm multiplies each channel by γ/σ and adds β − μγ/σ. The size of that factor goes into the convolution's
scales (or into its weight, where it has none), what is left of BatchNorm is a sign and a shift: of four numbers a channel
one. The classes and their keys stay: BatchNorm's weight becomes ±1, its mean 0, its variance 1 − eps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Graph, Tracer

from psc_lightning.copies import copied
from psc_lightning.sharding import sharded_modules
from psc_lightning.slots.layout import Layout
from psc_lightning.slots.live import held

__all__ = ["fold_batchnorm"]

M = TypeVar("M", bound=nn.Module)

# Torch's own layers only: another class may transform its weight (weight standardisation, say).
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Tracing knows no shapes, and of three axes BatchNorm takes another one for channels than Linear does.
_LAYERS = (*_CONVOLUTIONS, nn.Linear)


def fold_batchnorm(model: M, pairs: Mapping[str, str] | None = None) -> M:
    """Return a copy of a model with each BatchNorm folded into the layer before it; `model` is not touched.

    The copy computes in eval what the model does, but for rounding (scales are stored rounded): it is for `save`, not for
    training on. `save(model, path, fold_batchnorm=True)` does both, and the file then holds the copy bit for bit.

    Args:
        model: any module; compressed layers stay compressed.
        pairs: layer name → name of the BatchNorm behind it, a convolution or a Linear of two-axis inputs; None: all
            convolutions that tracing the model (`torch.fx`) finds.

    Raises:
        ValueError: the model cannot be traced, no pair is found, a name is no such layer, other layers share its weight,
            BatchNorm keeps no statistics, or a layer's levels have no scale of its own for each output channel.

    >>> model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1)).eval()
    >>> _ = model[0].weight.data.fill_(3.0), model[1].weight.data.fill_(-2.0), model[1].running_mean.fill_(0.5)
    >>> folded = fold_batchnorm(model)
    >>> [round(t.item(), 3) for t in (folded[0].weight, folded[1].weight, folded[1].bias, folded[1].running_mean)]
    [6.0, -1.0, 1.0, 0.0]
    """
    if sharded_modules(model):
        raise ValueError(
            "fold_batchnorm: the model is sharded: load the file into a plain model, fold that, save again"
        )
    model = copied(model)
    if pairs is None:
        pairs = dict(_traced(model))
        if not pairs:
            raise ValueError("fold_batchnorm: found no convolution that BatchNorm alone follows")
    for layer, norm in pairs.items():
        _fold(model, layer, norm)
    return model


class _Leaves(Tracer):
    """Looks into containers only: layers are taken as they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is(m, (*_LAYERS, *_NORMS)) or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Convolutions that only one BatchNorm reads, each called once."""
    try:
        graph: Graph = _Leaves().trace(model)
    except Exception as error:  # of the user's own code, or torch's about it
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"fold_batchnorm: the model cannot be traced ({why}): name the pairs: fold_batchnorm={{'conv1': 'bn1', …}}"
        ) from error
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if (
            isinstance(before, torch.fx.Node)
            and before.op == "call_module"
            and len(before.users) == 1
            and calls[node.target] == calls[before.target] == 1
            and _is(model.get_submodule(str(node.target)), _NORMS)
            and _is(model.get_submodule(str(before.target)), _CONVOLUTIONS)
        ):
            yield str(before.target), str(node.target)


@torch.no_grad()
def _fold(model: nn.Module, layer_name: str, norm_name: str) -> None:
    layer, norm = _named(model, layer_name, _LAYERS), _named(model, norm_name, _NORMS)
    mean, variance, eps = norm.running_mean, norm.running_var, norm.eps
    assert isinstance(eps, float)
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor):
        raise ValueError(f"fold_batchnorm: {norm_name} keeps no running statistics: what it computes is not fixed")
    weight = layer._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"fold_batchnorm: {layer_name}: its weight is no Parameter (parametrized, weight-normed, pruned)"
        )
    if sum(one is weight for module in model.modules() for one in module._parameters.values()) > 1:
        raise ValueError(f"fold_batchnorm: {layer_name}: other layers share its weight")
    if Layout.of(layer).shape(tuple(weight.shape))[0] != len(mean):
        raise ValueError(f"fold_batchnorm: {norm_name} has {len(mean)} channels, {layer_name} gives another number")
    gain = norm.weight if isinstance(norm.weight, Tensor) else torch.ones_like(mean)
    shift = norm.bias if isinstance(norm.bias, Tensor) else torch.zeros_like(mean)
    slope = gain.double() / (variance.double() + eps).sqrt()
    offset = shift.double() - mean.double() * slope
    if isinstance(layer.bias, Tensor):
        offset += layer.bias.double() * slope
        layer.bias.zero_()
    factor = torch.where(slope == 0, 1.0, slope.abs())
    try:
        _scale(layer, weight, factor)
    except ValueError as error:
        raise ValueError(f"fold_batchnorm: {layer_name}: {error}") from error
    for name, values in (("weight", slope.sign()), ("bias", offset)):
        if not isinstance(getattr(norm, name), Tensor):
            raise ValueError(f"fold_batchnorm: {norm_name} is not affine: it has no {name} to hold what is left of it")
        getattr(norm, name).copy_(values)
    mean.zero_()
    variance.fill_(1 - eps)


def _is(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    return type(module) in kinds


def _named(model: nn.Module, name: str, kinds: tuple[type[nn.Module], ...]) -> nn.Module:
    found: nn.Module | None = dict(model.named_modules()).get(name)
    if found is None or not _is(found, kinds):
        what = "nothing" if found is None else type(found).__name__
        raise ValueError(
            f"fold_batchnorm: expected {name} to be one of {', '.join(kind.__name__ for kind in kinds)}, found {what}"
        )
    return found


def _scale(layer: nn.Module, weight: nn.Parameter, factor: Tensor) -> None:
    """Multiply what a layer gives, a factor an output channel."""
    tensor = held(layer, "weight")
    if tensor is not None and tensor.slots.begun:
        tensor.rescale(weight, factor)
        return
    layout = Layout.of(layer)
    matrix = layout.matrix(weight)
    scaled = matrix * factor.to(weight.dtype).reshape(-1, *(1,) * (matrix.dim() - 1))
    weight.copy_(layout.weight(scaled, tuple(weight.shape)))
