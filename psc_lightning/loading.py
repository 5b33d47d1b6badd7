"""A Lightning checkpoint back into a model: its weights, and what our entry in it knows of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from psc_lightning import activations
from psc_lightning.callbacks.activations import ActivationQuantization, inputs_of, layers_of
from psc_lightning.callbacks.slot import SlotCallback
from psc_lightning.checkpoint import plain_name, read_content, tensors_of
from psc_lightning.sharding import sharded_modules
from psc_lightning.slots.ladder import set_threshold
from psc_lightning.slots.latent import Compressed
from psc_lightning.slots.live import compressed, hold
from psc_lightning.slots.slots import SLOTS, Slots, Spec
from psc_lightning.slots.targets import Target, tensors
from psc_lightning.training import entry

if TYPE_CHECKING:
    from lightning.pytorch import Callback

__all__ = ["load_checkpoint"]

_SHOWN = 6  # names in a message


@torch.no_grad()
def load_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], callbacks: Callback | Sequence[Callback] | None = None
) -> None:
    """Give a model the weights of a Lightning checkpoint, and the slots and latent weights that our entry in it knows.

    It is live then as after the fit: `save` writes what training would have written at that step, factors and all, `measure`
    and `export_onnx` know the same, and a fit with the same callbacks goes on.

    Args:
        model: of the checkpoint's LightningModule's class, or the network in it: a prefix that all of the model's names have
            in the checkpoint (``net.``) is taken off.
        path: the checkpoint, read with `weights_only=True`: nothing is unpickled.
        callbacks: those it was trained with, to be checked against it; None: what the checkpoint says.

    Raises:
        ValueError: no such file, damaged, of another model (the names are listed), with other callbacks than these, or of
            another version of psc_lightning; or the model is sharded. The model is as it was.

    Warns:
        UserWarning: the checkpoint holds weights only; `save` then recognises what has few values.
    """
    if sharded_modules(model):
        raise ValueError("load_checkpoint: the model is sharded already: load into it before fully_shard")
    try:
        content = read_content(Path(path))
        found = {plain_name(name): value for name, value in tensors_of(content).items()}
        own = entry.check(content[entry.KEY]) if entry.KEY in content else None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    names = {plain_name(name): name for name in model.state_dict()}
    prefix = _prefix(list(found), list(names))
    shapes = {prefix + plain: tuple(model.state_dict()[name].shape) for plain, name in names.items()}
    _compare(str(path), found, shapes, prefix)
    targets = {plain_name(name): target for target in tensors(model) for name in target.names}
    specs = {} if own is None else _without(prefix, entry.specs_of(own), targets, str(path))
    rounded = {} if own is None else _without(prefix, _under_weights(own["activations"]), targets, str(path))
    ours = [one for one in _listed(callbacks) if isinstance(one, SlotCallback)]
    rounders = [one for one in _listed(callbacks) if isinstance(one, ActivationQuantization)]
    bits = {name: one["bits"] for name, one in rounded.items()}
    if ours or rounders:
        asked = {plain_name(target.name): one.bits for one in rounders for target in one.choose(model).targets}
        if own is not None and (differs := entry.difference_of_bits(bits, asked, "the model with these callbacks")):
            raise ValueError(f"{path}: {differs}: give the callbacks of that run, or none")
        given = _of_callbacks(model, ours)
        if own is not None and (differs := entry.difference(specs, given, "the model with these callbacks")):
            raise ValueError(f"{path}: {differs}: give the callbacks of that run, or none")
        specs = given
    live = {plain_name(name): tensor.slots.specs for name, tensor, _ in compressed(model)}
    if live and (differs := entry.difference(specs, live, "the model")):
        raise ValueError(f"{path}: {differs}: call psc_lightning.detach(model) first, or build it anew")
    begun = {f"{name}.weight".removeprefix("."): one.bits for name, _, one in activations.activations(model)}
    if begun and (differs := entry.difference_of_bits(bits, {plain_name(n): b for n, b in begun.items()}, "the model")):
        raise ValueError(f"{path}: {differs}: call psc_lightning.detach(model) first, or build it anew")
    made = {name: Compressed(_filled(targets[name], filled), name) for name, filled in specs.items()}
    for name, tensor in made.items():
        hold(targets[name].holders, tensor)
    model.load_state_dict({name: found[prefix + plain] for plain, name in names.items()})
    for full, one in ({} if own is None else own["tensors"]).items():
        name = plain_name(full).removeprefix(prefix)
        tensor, parameter = made[name], targets[name].parameter
        if one["threshold"] is not None:
            set_threshold(tensor.slots, one["threshold"])
        tensor.load_training_state(parameter, one["state"])
        # An average, say: what was loaded counts, and `save` sees whether the slots can hold it.
        tensor.loaded = tensor.latent is not None and not torch.equal(
            tensor.slots.make(tensor.dense(parameter)), parameter
        )
    for name, one in rounded.items():
        inputs = inputs_of(targets[name], one["bits"], one["owner"])
        activations.hold(layers_of(targets[name]), inputs)
        inputs.load_training_state(one["state"])
    if own is None:
        for rounder in rounders:
            rounder.attach(model)
        warnings.warn(
            f"{path} holds weights only: what was trained beside them (factors, latent weights) is not there; "
            "psc_lightning.save recognises what has few values",
            stacklevel=2,
        )


def _listed(callbacks: Any) -> Sequence[Any]:
    return callbacks if isinstance(callbacks, Sequence) else [] if callbacks is None else [callbacks]


def _prefix(found: Sequence[str], wanted: Sequence[str]) -> str:
    """What stands before all wanted names in those found; nothing, where none does.

    >>> _prefix(["net.0.weight", "net.0.bias", "loss.weight"], ["0.weight", "0.bias"])
    'net.'
    """
    first, have = wanted[0] if wanted else "", set(found)
    tried = sorted({name.removesuffix(first) for name in found if name.endswith(first)}, key=len)
    whole = (one for one in tried if one[-1:] in ("", ".") and all(one + name in have for name in wanted))
    return next(whole, "")


def _compare(path: str, found: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]], prefix: str) -> None:
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is not in the model" for name in found if name.startswith(prefix) and name not in wanted]
    wrong += [
        f"{name} is {list(found[name].shape)}, in the model {list(shape)}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" * (len(wrong) > _SHOWN)
        raise ValueError(
            f"{path}: expected the tensors of the model, found {len(wrong)} differences: {'; '.join(wrong[:_SHOWN])}{more}: "
            "build the model that was trained, or the network in it"
        )


def _without(prefix: str, specs: Mapping[str, Any], targets: Mapping[str, Target], path: str) -> dict[str, Any]:
    """What fills the slots, under the model's own names."""
    plain = {plain_name(name): filled for name, filled in specs.items()}
    outside = [name for name in plain if not name.startswith(prefix) or name.removeprefix(prefix) not in targets]
    if outside:
        raise ValueError(
            f"{path}: compressed tensors of the checkpoint are no Parameters of the model: {', '.join(outside[:_SHOWN])}: "
            "build the model that was trained"
        )
    return {name.removeprefix(prefix): filled for name, filled in plain.items()}


def _under_weights(entries: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of layers, by the names of their weights."""
    return {f"{name}.weight".removeprefix("."): one for name, one in entries.items()}


def _of_callbacks(model: nn.Module, callbacks: Sequence[SlotCallback]) -> dict[str, dict[str, Spec]]:
    """What callbacks fill."""
    found: dict[str, dict[str, Spec]] = {}
    for callback in callbacks:
        targets = callback.choose(model).targets
        for target, spec in zip(targets, callback.specs(targets), strict=True):
            found.setdefault(plain_name(target.name), {})[callback.slot] = spec
    return found


def _filled(target: Target, specs: Mapping[str, Spec]) -> Slots:
    slots = Slots(target.layout, tuple(target.parameter.shape)).to(target.parameter.device)
    for slot in SLOTS:
        if slot in specs:
            slots.fill(slot, specs[slot])
    return slots
