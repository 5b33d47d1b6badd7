"""Names and patterns → tensors.

A pattern is a glob over tensor names (``encoder.*.weight``), a module's name (its weights), ``re:`` and a regular
expression for the whole tensor name, or a layer type (``Conv2d``, subclasses included).
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from psc_lightning.sharding import is_sharded
from psc_lightning.slots.layout import Layout

__all__ = [
    "Idle",
    "Selection",
    "Target",
    "frozen",
    "left_out",
    "matches_name",
    "named",
    "patterns",
    "select",
    "tensors",
]


_NOT_AMONG = "not among the targets"
_LARGE = 0.05  # share of a model's entries from which on a tensor is worth a word
_SHOWN = 4  # tensors that a message names

#: layers whose Parameters of two or more axes are multiplied by, or looked up in
_LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Bilinear, _ConvNd, nn.Embedding, nn.EmbeddingBag)
_LAYERS += (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
#: what layers that give a model's outputs are called
_HEADS = [["head"], ["classifier"], ["lm_head"], ["logits"], ["score"]]


@dataclass(frozen=True)
class Target:
    """One Parameter, under its first name, with every layer that holds it and every name it has."""

    name: str
    parameter: nn.Parameter
    holders: list[tuple[nn.Module, str]]
    #: a tied weight has several, and so has the weight of a layer that stands in two places
    names: list[str]
    #: whether a pattern names it and nothing else
    exact: bool = False
    #: whether a pattern names it, alone or with others: its name, or a module that holds it, not only a layer type
    named: bool = False

    @property
    def layer(self) -> nn.Module:
        """The first layer that holds it."""
        return self.holders[0][0]

    @property
    def layout(self) -> Layout:
        """Where its output axis is; of a tied weight, what a table says of its rows counts."""
        every = [Layout.of(layer) for layer, _ in self.holders]
        return next((one for one in every if one.padding is not None), every[0])

    @property
    def looked_up(self) -> bool:
        """Whether it is an embedding table: its rows are entries."""
        return any(isinstance(layer, nn.Embedding | nn.EmbeddingBag) for layer, _ in self.holders)

    @property
    def padding(self) -> int | None:
        """The row of a table that is zero and stays so."""
        return self.layout.padding

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Its shape with the output axis first."""
        return self.layout.shape(tuple(self.parameter.shape))


@dataclass
class Selection:
    """What was chosen, and for every other tensor why not.

    Attributes:
        targets: what was chosen.
        skipped: tensor name → why not.
        left: those of some weight that only a default leaves out: naming them takes them.
        outputs: the weights whose rows seem to be the model's outputs: its last layer's, and of layers called so.
    """

    targets: list[Target] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    left: list[Target] = field(default_factory=list)
    outputs: set[str] = field(default_factory=set)

    def leave(self, target: Target, reason: str) -> None:
        """Leave out a tensor that was chosen."""
        self.targets = [other for other in self.targets if other is not target]
        self.skipped[target.name] = reason


#: why a default leaves a tensor out of a fit; None: it does not
Idle = Callable[[Target], str | None]


def frozen(target: Target) -> str | None:
    """The `Idle` of a model by itself.

    >>> [frozen(target) for target in tensors(nn.Linear(8, 16, bias=False).requires_grad_(False))]
    ['frozen']
    """
    return None if target.parameter.requires_grad else "frozen"


def patterns(name: str, value: str | type | Iterable[str | type] | None) -> list[str] | None:
    """The argument `name` as a list of pattern strings; a layer class stands for its name.

    Raises:
        ValueError: where it is anything else; it names the argument.

    >>> patterns("targets", "layer1.*"), patterns("ignore", [nn.Linear, "head"]), patterns("ignore", None)
    (['layer1.*'], ['Linear', 'head'], None)
    """
    if value is None:
        return None
    found = [item.__name__ if isinstance(item, type) else item for item in _flat(value)]
    for item in found:
        if not isinstance(item, str) or not item:
            raise ValueError(f"{name}: expected a pattern or a list of patterns, found {item!r}")
        if item.startswith("re:"):
            try:
                re.compile(item[3:])
            except re.error as error:
                raise ValueError(f"{name}: {item!r} is not a regular expression: {error}") from None
    return found


def _flat(value: Any) -> Iterator[Any]:
    """What a value holds, however nested; YAML joins lists by nesting them, and has null for nothing."""
    if isinstance(value, str | type) or not isinstance(value, Iterable):
        yield value
        return
    for item in value:
        if item is not None:
            yield from _flat(item)


def tensors(model: nn.Module) -> Iterator[Target]:
    """Every Parameter of the model once."""
    found: dict[int, Target] = {}
    seen: set[int] = set()
    for prefix, layer in model.named_modules(remove_duplicate=False):
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                full = f"{prefix}.{name}" if prefix else name
                target = found.setdefault(id(parameter), Target(full, parameter, [], []))
                target.names.append(full)
                if id(layer) not in seen:
                    target.holders.append((layer, name))
        seen.add(id(layer))
    yield from found.values()


def _names(pattern: str, target: Target) -> bool:
    """Whether the pattern names exactly this tensor, or a layer that holds it."""
    return any(pattern in (name, name.rpartition(".")[0]) for name in target.names)


def _matches(pattern: str, target: Target) -> bool:
    return _how(pattern, target) is not None


def _how(pattern: str, target: Target) -> str | None:
    """How a pattern matches: by the `tensor`'s name, by that of a `module` that holds it, by a layer `type`, or not."""
    if pattern.startswith("re:"):
        return "tensor" if any(re.fullmatch(pattern[3:], name) for name in target.names) else None
    if any(fnmatchcase(name, pattern) for name in target.names):
        return "tensor"
    if not isinstance(target.parameter, UninitializedParameter) and target.parameter.dim() < 2:
        return None  # a module or a type means its weights
    if any(pattern == base.__name__ for layer, _ in target.holders for base in type(layer).__mro__[:-2]):
        return "type"
    paths = [name.split(".")[:-1] for name in target.names]
    return "module" if any(fnmatchcase(".".join(p[: i + 1]), pattern) for p in paths for i in range(len(p))) else None


def _matches_any(pattern: str, target: Target) -> bool:
    """Where a module, or a type, means all its parameters."""
    if any(pattern == base.__name__ for layer, _ in target.holders for base in type(layer).__mro__[:-2]):
        return True
    return any(matches_name(pattern, name) for name in target.names)


def matches_name(pattern: str, name: str) -> bool:
    """Whether a pattern means this tensor, or a module that it lies in.

    >>> [matches_name(pattern, "net.head.bias") for pattern in ("*.bias", "net.head", "re:net.*", "head")]
    [True, True, True, False]
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    path = name.split(".")
    return any(fnmatchcase(".".join(path[: i + 1]), pattern) for i in range(len(path)))


def named(model: nn.Module, targets: Sequence[str] | None, ignore: Sequence[str] | None) -> list[Target]:
    """All Parameters that patterns choose, whatever they are; a module's name, or a type, means its biases too.

    Args:
        model: any module.
        targets: patterns; None: all.
        ignore: patterns of what to leave out; it wins over `targets`.

    Raises:
        ValueError: a pattern matches nothing, or all is left out.

    >>> [target.name for target in named(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), ["Linear"], ["0"])]
    ['1.weight', '1.bias']
    """
    everything = list(tensors(model))
    _check_patterns(model, everything, _matches_any, targets, ignore)
    found = [target for target in everything if targets is None or any(_matches_any(p, target) for p in targets)]
    found = [target for target in found if not any(_matches_any(pattern, target) for pattern in ignore or ())]
    if not found:
        raise ValueError(f"ignore={ignore} leaves nothing of targets={targets}")
    return found


def _refusal(target: Target) -> str | None:
    """Why a tensor cannot be compressed, or None."""
    parameter = target.parameter
    if isinstance(parameter, UninitializedParameter):
        return "a lazy layer has no weight yet: run one batch through the model first"
    if "parametrizations" in target.name.split("."):
        return "it belongs to torch.nn.utils.parametrize (weight_norm?): remove the parametrization first"
    layer, name = target.holders[0]
    if name.endswith(("_orig", "_g", "_v")) and name.rpartition("_")[0] in vars(layer):
        return "torch.nn.utils has pruned or weight-normed it: remove that first"
    if parameter.is_meta:
        return "it is on the meta device and has no values yet: build it with them"
    if type(parameter.data) is not torch.Tensor and not is_sharded(parameter):
        return f"it is a {type(parameter.data).__name__}, not a plain tensor: compress the plain model instead"
    if not parameter.is_floating_point():
        return f"it holds {parameter.dtype}, not floating-point numbers"
    if any(getattr(layer, "max_norm", None) is not None for layer, _ in target.holders):
        return "its layer's max_norm rewrites it in every forward pass: set max_norm to None"
    return None


def _no_weight(target: Target, of_named_type: bool) -> str | None:
    """Why a tensor of two or more axes is none that a layer multiplies by; it is one if two of three signs say so."""
    bases = {base.__name__ for layer, _ in target.holders for base in type(layer).__mro__}
    if bases & {"LayerNorm", "RMSNorm"}:  # transformers has its own
        return f"the scale of a {type(target.layer).__name__}"
    matrix = sum(length > 1 for length in target.parameter.shape) > 1
    known = of_named_type or target.layout.transposed or any(isinstance(one, _LAYERS) for one, _ in target.holders)
    called = any(re.search(r"(^|_)weight(_|$)", name) for _, name in target.holders)
    if matrix + known + called > 1:
        return None
    if not matrix:
        return "no matrix: at most one axis is longer than 1"
    return f"no layer's weight: {type(target.layer).__name__} is no known layer type, nor is it called weight"


def _outputs(model: nn.Module, everything: Sequence[Target], idle: Idle) -> set[str]:
    place = {name: index for index, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    dense = [target for target in everything if _refusal(target) is None]
    weights = [target for target in dense if target.parameter.dim() > 1 and _no_weight(target, False) is None]
    trained = [t for t in weights if idle(t) is None] or weights
    last = max(trained, key=lambda target: max(place[name] for name in target.names), default=None)
    called = [t for t in trained if any(name.split(".")[-2:-1] in _HEADS for name in t.names)]
    return {target.name for target in called + ([last] if last is not None else [])}


def select(
    model: nn.Module,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] | None = None,
    min_size: int = 64,
    idle: Idle = frozen,
) -> Selection:
    """The tensors that patterns choose; by default every layer's weight of two or more axes and `min_size` entries.

    A tensor (or its layer) that is named exactly is taken whatever its size and axes. Left out unless a pattern matches
    their names: Parameters that are no layer's weight (tokens, position tables, scales of norms), and, where other
    weights are trained, those that are not: unless a pattern names them, or a module that holds them.

    Args:
        model: any module.
        targets: patterns; None: all weights.
        ignore: patterns of what to leave out; it wins over `targets`.
        min_size: fewest entries of a tensor.
        idle: which tensors are not trained, and why.

    Raises:
        ValueError: a pattern matches nothing, all matches are excluded, or a chosen tensor cannot be compressed or holds an
            infinity or a NaN.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 2))
    >>> [t.name for t in select(model).targets], select(model).skipped
    (['0.weight'], {'0.bias': 'one axis', '1.weight': 'fewer than 64 entries', '1.bias': 'one axis'})
    >>> [t.name for t in select(model, targets=["1"]).targets]
    ['1.weight']
    """
    everything = list(tensors(model))
    _check_patterns(model, everything, _matches, targets, ignore)
    chosen, entries = Selection(), _entries(everything)
    for target in everything:
        exact = any(_names(pattern, target) for pattern in targets or ())
        how = {_how(pattern, target) for pattern in targets or ()}
        target = replace(target, exact=exact, named=exact or bool(how & {"tensor", "module"}))
        reason = _why_not(target, targets, ignore, min_size)
        if reason is None and "tensor" not in how and not exact and not _refusal(target):
            reason = _no_weight(target, "type" in how)
            if reason is not None and target.parameter.numel() > _LARGE * entries:
                chosen.left.append(target)
        if reason is None:
            chosen.targets.append(target)
        else:
            chosen.skipped[target.name] = reason
    _leave_idle(chosen, idle)
    chosen.outputs = _outputs(model, everything, idle)
    for target in chosen.targets:
        if refusal := _refusal(target):
            raise ValueError(f"{target.name} cannot be compressed: {refusal}, or leave it out: ignore={target.name!r}")
        # A shard was whole, and looked at, when its slots were attached.
        if not is_sharded(target.parameter) and not bool(target.parameter.detach().isfinite().all()):
            raise ValueError(f"{target.name} holds a value that is not a finite number")
    if not chosen.targets:
        types = Counter(type(layer).__name__ for layer in model.modules() if layer._parameters)
        listed = ", ".join(f"{count} {name}" for name, count in types.most_common()) or "no layer with a parameter"
        telling = sorted(chosen.skipped.items(), key=lambda item: item[1] == _NOT_AMONG)
        reasons = "; ".join(f"{name}: {reason}" for name, reason in telling[:5])
        raise ValueError(
            f"targets={list(targets) if targets else None}, ignore={list(ignore) if ignore else None}, "
            f"min_size={min_size} leave no tensor to compress. The model has {listed}. {reasons}"
        )
    return chosen


def _why_not(target: Target, targets: Sequence[str] | None, ignore: Sequence[str] | None, min_size: int) -> str | None:
    if targets and not any(_matches(pattern, target) for pattern in targets):
        return _NOT_AMONG
    if ignore and any(_matches(pattern, target) for pattern in ignore):
        return "ignored"
    if isinstance(target.parameter, UninitializedParameter):
        return None  # it has neither axes nor entries to go by
    if not target.exact and target.parameter.dim() < 2:
        return "one axis"
    if not target.exact and target.parameter.numel() < min_size:
        return f"fewer than {min_size} entries"
    if not target.exact and target.parameter.is_complex():
        return "complex numbers"
    return "empty" if target.parameter.numel() == 0 else None


def _leave_idle(chosen: Selection, idle: Idle) -> None:
    """Leave out what is not trained, where something is."""
    reasons = [(target, idle(target)) for target in chosen.targets]
    if all(reason is not None for _, reason in reasons):
        return
    for target, reason in reasons:
        if reason is not None and not target.named:
            chosen.leave(target, f"{reason}, while others are trained")
            chosen.left.append(target)


def _entries(targets: Iterable[Target]) -> int:
    """How many all of them have."""
    return sum(t.parameter.numel() for t in targets if not isinstance(t.parameter, UninitializedParameter))


def left_out(selections: Iterable[Selection]) -> str | None:
    """What to say of tensors that only defaults leave out, where none of these selections takes them; None: nothing."""
    selections = list(selections)
    taken = {id(target.parameter) for one in selections for target in one.targets}
    left = {t.name: one.skipped[t.name] for one in selections for t in one.left if id(t.parameter) not in taken}
    if not left:
        return None
    shown = "; ".join(f"{name} ({reason})" for name, reason in islice(left.items(), _SHOWN))
    more = f"; and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    return (
        f"not compressed: {shown}{more}. Name them in targets to compress them too, or in ignore to hear no more of it"
    )


def _check_patterns(
    model: nn.Module,
    everything: list[Target],
    matches: Callable[[str, Target], bool],
    targets: Sequence[str] | None,
    ignore: Sequence[str] | None,
) -> None:
    """Refuse a pattern that matches nothing."""
    for argument, wanted in (("targets", targets), ("ignore", ignore)):
        for pattern in wanted or ():
            if not any(matches(pattern, target) for target in everything):
                raise ValueError(_nothing(argument, pattern, model, everything))


def _nothing(argument: str, pattern: str, model: nn.Module, everything: list[Target]) -> str:
    names = [name for target in everything for name in target.names]
    types = sorted({type(layer).__name__ for layer in model.modules() if layer._parameters})
    modules = {name.rpartition(".")[0] for name in names}
    near = difflib.get_close_matches(pattern, [*names, *modules, *types], n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else "."
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return (
        f"{argument}: {pattern!r} matches no tensor, module or layer type{hint} "
        f"The tensors are {listed or '(none)'}; the layer types {', '.join(types) or '(none)'}."
    )
