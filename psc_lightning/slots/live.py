"""The compressed tensors of a live model, which stays the plain model at any time.

What a compressed tensor needs lies in a plain object under its layer's ``__dict__``: copies and pickles of the layer take it
along; names, types, Parameters and states know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from psc_lightning import activations
from psc_lightning.sharding import sharded_modules
from psc_lightning.slots.latent import Compressed

__all__ = [
    "Place",
    "compressed",
    "detach",
    "forget",
    "hand_back",
    "held",
    "hold",
    "let_go",
    "note_read",
    "read_from",
    "under_names",
]

M = TypeVar("M", bound=nn.Module)

#: where a layer's compressed tensors lie in its ``__dict__``: tensor name → `Compressed`
PLACE = "_psc"
#: where lies what a file said of a layer's tensors: tensor name → numbers, for the artifact to understand
READ = "_psc_read"


@dataclass(frozen=True)
class Place:
    """Where a compressed tensor is: its first name, a layer that holds it, the name that it has there."""

    name: str
    layer: nn.Module
    attribute: str
    tensor: Compressed

    @property
    def parameter(self) -> nn.Parameter:
        """Its Parameter as it is now: assignment and sharding put others in its place."""
        found = self.layer._parameters.get(self.attribute)
        if found is None:
            raise ValueError(
                f"{self.name} is no Parameter of its layer any more: something has pruned, normed or parametrized it "
                "since it was compressed; do that before, or leave the tensor out by `ignore`"
            )
        return found


def hold(holders: list[tuple[nn.Module, str]], tensor: Compressed) -> None:
    """Let all layers that hold a Parameter (a tied weight has several) know its compressed tensor."""
    for layer, name in holders:
        if PLACE not in layer.__dict__:
            layer.__dict__[PLACE] = {}
            layer.register_load_state_dict_pre_hook(_note_loading)  # type: ignore[no-untyped-call]  # torch's
        layer.__dict__[PLACE][name] = tensor


def held(layer: nn.Module, name: str) -> Compressed | None:
    """The compressed tensor of a layer, or None."""
    found: Compressed | None = layer.__dict__.get(PLACE, {}).get(name)
    return found


def let_go(layer: nn.Module, name: str) -> None:
    """Forget a tensor's slots; its Parameter holds what it holds."""
    tensors = layer.__dict__.get(PLACE, {})
    tensors.pop(name, None)
    if not tensors and PLACE in layer.__dict__:
        del layer.__dict__[PLACE]
        hooks = layer._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _note_loading]:
            del hooks[key]


def forget(module: nn.Module, tensor: Compressed) -> None:
    """Let all layers of a model that hold a compressed tensor forget its slots."""
    for _, layer, name, held_there in list(_holders(module)):
        if held_there is tensor:
            let_go(layer, name)


def note_read(holders: list[tuple[nn.Module, str]], said: list[Any] | None) -> None:
    """Keep what a file said of a Parameter that was read from it; None: nothing."""
    for layer, name in holders:
        if said is not None:
            layer.__dict__.setdefault(READ, {})[name] = said
        elif READ in layer.__dict__:
            layer.__dict__[READ].pop(name, None)


def read_from(layer: nn.Module, name: str) -> list[Any] | None:
    """What a file said of a tensor when it was read, or None; whether it holds still is for the caller to see."""
    found: list[Any] | None = layer.__dict__.get(READ, {}).get(name)
    return found


def _holders(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Compressed]]:
    """Every (full name, layer, tensor name, compressed tensor), tied holders and a layer's other names included."""
    for prefix, layer in module.named_modules(remove_duplicate=False):
        for name, tensor in layer.__dict__.get(PLACE, {}).items():
            yield f"{prefix}.{name}" if prefix else name, layer, name, tensor


def compressed(module: nn.Module) -> Iterator[tuple[str, Compressed, nn.Parameter]]:
    """Each compressed tensor of a model once: its first name, itself, its Parameter."""
    seen: set[int] = set()
    for full, layer, name, tensor in _holders(module):
        parameter = layer._parameters.get(name)
        if id(tensor) not in seen and parameter is not None:
            seen.add(id(tensor))
            yield full, tensor, parameter


def under_names(module: nn.Module) -> dict[str, Compressed]:
    """The compressed tensor under each name of the state dict that has one.

    By their Parameter: a layer that came later, or that was given another Parameter, may hold one without knowing it, or not.
    """
    tensors = {id(parameter): tensor for _, tensor, parameter in compressed(module)}
    every = module.named_parameters(remove_duplicate=False)
    return {name: tensors[id(parameter)] for name, parameter in every if id(parameter) in tensors}


def detach(module: M) -> M:
    """Bring all slots that have begun to full strength and forget all: the Parameters keep the hard weights, for good.

    What it computes in eval stays bit for bit the same, but where inputs were rounded (`ActivationQuantization`): their
    ranges are no part of the plain class, and go (`export_onnx` before).

    Raises:
        ValueError: the model is sharded.
    """
    if sharded_modules(module):
        raise ValueError(
            "detach: fully_shard has sharded this model, and that cannot be undone: psc_lightning.save(model, path) on all "
            "ranks, then psc_lightning.load(path) into a plain model"
        )
    for _, tensor, parameter in compressed(module):
        tensor.absorb(parameter)  # what has been written to it since
        tensor.end_ramp(parameter)
        tensor.show_if_stale(parameter)
    for _, layer, name, _ in list(_holders(module)):
        let_go(layer, name)
    for layer in module.modules():
        activations.let_go(layer)
        layer.__dict__.pop(READ, None)
    return module


# -------------------------------------------------------------------------------------------------------- hooks


def _note_loading(layer: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Before `load_state_dict`: what it writes replaces a weight, however near it is; what `hand_back` added is taken."""
    for name, tensor in layer.__dict__.get(PLACE, {}).items():
        inner = f"{prefix}{name}.{PLACE}."
        carried = {key[len(inner) :]: state.pop(key) for key in list(state) if key.startswith(inner)}
        parameter = layer._parameters.get(name)
        if carried and parameter is not None:
            tensor.load_training_state(parameter, carried)
        tensor.loaded = tensor.loaded or prefix + name in state


def hand_back(module: nn.Module) -> None:
    """From now on the module's state dict carries the slots along, to a process that gets nothing else from this one."""
    module.register_state_dict_post_hook(_carry)  # type: ignore[no-untyped-call]  # torch's


def _carry(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, tensor, parameter in compressed(module):
        for key, value in tensor.training_state(parameter).items():
            state[f"{prefix}{name}.{PLACE}.{key}"] = value
    state.update(activations.carried(module, prefix))
