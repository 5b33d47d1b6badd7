"""A model as a file sees it: plain names, and what each tensor is stored as.

As its slots say, at full strength; where it has none, or was loaded with what these would change: as the file did that it was
read from, or as what it is recognised to be.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from psc_lightning.artifact import leftovers
from psc_lightning.artifact.directory import DTYPES, EXTRA_STATE, MOST_AXES, Entry
from psc_lightning.artifact.leftovers import Precisions
from psc_lightning.artifact.streams import SymbolWriter
from psc_lightning.checkpoint import plain_name
from psc_lightning.recognition import recognise, same_bits
from psc_lightning.sharding import gather, is_sharded, reshard, whole
from psc_lightning.slots.live import compressed, read_from, under_names
from psc_lightning.slots.slots import Slots
from psc_lightning.slots.stored import Stored
from psc_lightning.slots.tape import Tape
from psc_lightning.slots.targets import Target, matches_name, patterns, tensors
from psc_lightning.symbols import Writer

__all__ = [
    "AXES",
    "ENTRIES",
    "Form",
    "Snapshot",
    "check",
    "check_tensor",
    "finite",
    "part_of",
    "plain_state",
    "snapshots_of",
    "tell_extras",
]

_SHOWN = 8

#: what has fewer is stored as it is: by default no callback takes it, either
AXES, ENTRIES = 2, 64
_HEAD = 128  # bits that name methods and options


class Form(Protocol):
    """What a tensor is stored as: slots at full strength, or what a file said."""

    def stored(self, latent: Tensor) -> Stored:
        """Its cores, and what makes the weight of them."""

    def encode(self, writer: Writer, latent: Tensor) -> None:
        """Store it."""


#: and the latent weight that it is of
Snapshot = tuple[Form, Tensor]


def snapshots_of(
    model: nn.Module, precisions: Precisions = "float32", only: str | Iterable[str] | None = None
) -> dict[str, Snapshot]:
    """What a file would hold of each tensor of few numbers, under every name that it has; one object for one tensor.

    Args:
        model: live or plain; it is not changed.
        precisions: of leftovers: what is recognised must be smaller than it would be as one.
        only: patterns of what is asked for; see `part_of`.

    Raises:
        ValueError: as `leftovers.check` and `part_of`.
    """
    slotted = under_names(model)
    begun = {plain_name(name) for name, tensor in slotted.items() if tensor.slots.begun}
    state = part_of(plain_state(model), only)
    leftovers.check(precisions, [name for name in state if name not in begun])
    reshard(model)
    once: dict[int, tuple[Slots, Tensor] | None] = {}
    strayed: dict[int, str] = {}
    for name, tensor, parameter in compressed(model):
        own = once[id(tensor)] = tensor.snapshot(parameter)
        if own is not None and tensor.loaded and not same_bits(own[0].make(own[1]), gather(parameter)):
            strayed[id(tensor)] = f"{name} ({own[0].method})"
    found: dict[str, Snapshot] = {}
    with whole(model):
        for target in tensors(model):
            own_of = {name: id(slotted.get(name)) for name in target.names}
            known: Snapshot | None = None
            if plain_name(target.name) in state and all(
                key in strayed or once.get(key) is None for key in own_of.values()
            ):
                known = _read(target) or _recognised(target, precisions)
            for name, key in own_of.items():
                snapshot = known or once.get(key)
                if snapshot is not None:
                    found[name] = snapshot
                if known is not None:
                    strayed.pop(key, None)
    if strayed:
        warnings.warn(
            f"load_state_dict wrote what their slots cannot hold to {', '.join(strayed.values())}: a file would hold another "
            "weight. psc_lightning.load_checkpoint(model, path) takes factors and all from a whole checkpoint; "
            "psc_lightning.detach(model) before loading keeps what is loaded as it is",
            stacklevel=3,
        )
    return found


def _read(target: Target) -> Snapshot | None:
    """As the file had it that the tensor was read from, if it is still that."""
    weight = target.parameter.detach().cpu()
    items = read_from(*target.holders[0])
    if items is None:
        return None
    tape = Tape(items, tuple(weight.shape), weight.dtype)
    return (tape, weight) if same_bits(tape.stored(weight).weight, weight) else None


def _recognised(target: Target, precisions: Precisions) -> Snapshot | None:
    """As few numbers, if it holds no more, the cheapest; and if they are no longer: of few bits both ways are as short."""
    weight, name = target.parameter.detach(), plain_name(target.name)
    if weight.dim() < AXES or weight.numel() < ENTRIES or not weight.is_floating_point() or weight.is_meta:
        return None
    weight = weight.cpu()
    kind = leftovers.kind_of(name, weight.dtype, precisions)
    best, fewest = None, math.inf
    for slots in recognise(weight, target.layout):
        if best is None:
            plain = SymbolWriter()
            entry = Entry(name, kind, weight.dtype, tuple(weight.shape))
            leftovers.encode(plain, {name: weight}, leftovers.stored_as(entry))
            fewest = 1.01 * plain.bits + _HEAD
        pricer = SymbolWriter()
        slots.encode(pricer, weight)
        if pricer.bits <= fewest:
            best, fewest = slots, pricer.bits
    return None if best is None else (best, weight)


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
    if name.rpartition(".")[2] == EXTRA_STATE:
        raise ValueError(
            f"{name}: expected a weight, found a module's extra state: many modules unpickle theirs, so that no .psc file "
            "holds any: name what to save (only=…), or register a buffer for it"
        )
    if tensor.dim() > MOST_AXES:
        raise ValueError(f"{name}: expected at most {MOST_AXES} axes, found {tensor.dim()}: reshape it")
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.dtype not in DTYPES:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"{name}: expected a dense tensor with values, of type {kinds}, found {tensor.dtype} ({tensor.layout}) on "
            f"{tensor.device}: convert it first, or register a buffer with persistent=False"
        )
    # A shard was whole when the model was built; all ranks would have to look at once.
    if not is_sharded(tensor) and not finite(tensor):
        raise ValueError(
            f"{name}: expected finite numbers, found NaN or infinity: look for a diverged training run; a buffer that masks "
            "may hold torch.finfo(dtype).min, or be registered with persistent=False"
        )


def finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
        return True
    numbers = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return all(map(math.isfinite, map(float, numbers.aminmax())))  # either is NaN where any entry is


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
