"""Compression without training, and what a compression would take: `compress`, `attach`, `plan`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from psc_lightning import activations
from psc_lightning.activations import Activations
from psc_lightning.artifact import to_bytes
from psc_lightning.callbacks.activations import ActivationQuantization
from psc_lightning.callbacks.budget import ByteBudget, in_bytes
from psc_lightning.callbacks.presets import preset
from psc_lightning.callbacks.slot import SlotCallback
from psc_lightning.copies import copied
from psc_lightning.masks import MASKS, Mask
from psc_lightning.report.numbers import Report
from psc_lightning.sharding import is_sharded
from psc_lightning.slots.chain import Chain
from psc_lightning.slots.live import Place, compressed, held, let_go
from psc_lightning.slots.targets import Target, left_out, tensors

if TYPE_CHECKING:
    from lightning.pytorch import Callback

__all__ = ["Plan", "attach", "compress", "costly_masks", "plan"]


def attach(model: nn.Module, callbacks: Callback | Sequence[Callback]) -> None:
    """Fill the slots of the tensors that callbacks target, before a Trainer does: for processes that are spawned.

    The slots stay off until training begins; the same callbacks then go to the Trainer.

    Raises:
        ValueError: as the callbacks would before training.
    """
    for callback in _ours(callbacks):
        callback.attach(model)


def _ours(callbacks: Callback | Sequence[Callback]) -> list[SlotCallback | ActivationQuantization]:
    several = callbacks if isinstance(callbacks, Sequence) else [callbacks]
    return [callback for callback in several if isinstance(callback, SlotCallback | ActivationQuantization)]


def compress(
    model: nn.Module,
    compression: str | Sequence[Callback] | None = None,
    threshold: float | None = None,
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    **options: Any,
) -> Report:
    """Compress any torch model once, in place, without training.

    Its Parameters then hold the compressed weights; `save` writes them compactly, `detach` makes them all there is.

    Args:
        model: the model, changed in place (its dense weights are kept beside until `detach`).
        compression: a preset: float, binary, ternary, mask, cross_channel, row, column, separable, low_rank, log,
            codebook, deep, none; or callbacks of your own, which are left as they are. None: the methods by slot alone.
        threshold: share of the entries that are zero, 0 ≤ threshold < 1; None: the preset's default.
        batches: for presets that labels drive (`mask`, `deep`), and callbacks that round activations: batches to compute
            gradients on, and to see inputs in; `cross_channel` goes by magnitude without them; others do not read them.
        loss: ``loss(model, batch)`` gives a scalar for each of them.
        options: other methods in the preset's slots (`tying`, `mask`, `levels`), and the options of its methods: `bits`,
            `k`, `group`, `groups`, `block`, `rank`, `targets`, `ignore`, `min_size`, …; see `preset`.

    Returns:
        The report of the file that `save` will write.

    Raises:
        ValueError: an unknown preset or option, a wrong value, a pattern that matches nothing, a label-driven preset
            without `batches` and `loss`, or a model that is compressed already.

    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> report = compress(model, "float", threshold=0.5)
    >>> [(t.name, t.method, t.sparsity) for t in report.tensors if t.method != "plain"]
    [('0.weight', 'magnitude+uniform', 0.5), ('2.weight', 'magnitude+uniform', 0.5)]
    >>> report.compression_ratio > 4
    True
    """
    if compression is None:
        if not {"tying", "mask", "levels"} & {name for name, method in options.items() if method is not None}:
            raise ValueError(
                "compression: expected a preset, callbacks, or a method for tying, mask or levels, found none"
            )
        compression = "none"
    if isinstance(compression, str):
        if options.get("budget") is not None:
            raise ValueError("budget: nothing is trained here that could be steered; give ByteBudget to a Trainer")
        ours = _ours(preset(compression, threshold, **options))
    elif threshold is not None or options:
        raise ValueError(f"{', '.join(options) or 'threshold'}: an option of presets; callbacks have their own")
    else:
        ours = deepcopy(_ours(compression))
    callbacks = [callback for callback in ours if isinstance(callback, SlotCallback)]
    rounders = [callback for callback in ours if isinstance(callback, ActivationQuantization)]
    driven = ""
    labelled = any(callback.calibration_steps for callback in callbacks)  # a tying that takes labels if it gets them
    if any(callback.slot == "mask" and MASKS[callback.method].labels != "none" for callback in callbacks):
        driven = "is driven by labels"
    elif rounders:
        driven = "rounds inputs that it has seen"
    name = compression if isinstance(compression, str) else "+".join(type(callback).__name__ for callback in ours)
    if (batches is None) != (loss is None) or (driven and batches is None):
        raise ValueError(
            f"batches, loss: compression={name!r} "
            + (f"{driven} and needs both" if driven else "takes both or neither")
            + ": compress(model, …, batches=loader, loss=lambda model, batch: …)"
        )
    selections = [callback.choose(model) for callback in callbacks]
    chosen = [(callback, target) for callback, one in zip(callbacks, selections) for target in one.targets]
    for _, target in chosen:
        if any(held(*holder) is not None for holder in target.holders):
            raise ValueError(f"{target.name} is compressed already; call psc_lightning.detach(model) first")
    for name, _, _ in activations.activations(model) if rounders else ():
        raise ValueError(f"{name}: its inputs are rounded already; call psc_lightning.detach(model) first")
    if left := left_out(selections):
        warnings.warn(left, stacklevel=2)
    with _undone_on_error(model, chosen):
        filled = zip(callbacks, selections)
        places = [(callback, place) for callback, one in filled for place in callback.attach(model, one)]
        inputs = [found for rounder in rounders for _, found in rounder.attach(model)]
        if batches is not None and loss is not None and (driven or labelled):
            _calibrate(model, places, inputs, batches, loss)
        for _, place in places:
            place.tensor.harden(place.parameter)
        for found in inputs:
            found.begun = True
        report = to_bytes(model)[1]
        report.notes = costly_masks(model, report.file_bytes)
        return report


@contextmanager
def _undone_on_error(model: nn.Module, chosen: Sequence[tuple[SlotCallback, Target]]) -> Iterator[None]:
    """Where something fails within it, forget what was attached again: the model is as it was."""
    rounded = [layer for layer in model.modules() if activations.of(layer)]
    parameters = list({id(target.parameter): target.parameter for _, target in chosen}.values())
    values = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    except BaseException:
        for _, target in chosen:
            for layer, name in target.holders:
                let_go(layer, name)
        for layer in model.modules():
            if layer not in rounded:
                activations.let_go(layer)
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)
        raise


def _calibrate(
    model: nn.Module,
    places: Sequence[tuple[SlotCallback, Place]],
    inputs: Sequence[Activations],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> None:
    """Show all batches to who goes by labels or inputs; modes and gradients are left as they were."""
    from rich.progress import track

    training = [(layer, layer.training) for layer in model.modules()]
    before = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    number = -1
    try:
        for _, place in places:
            place.parameter.requires_grad_()  # a frozen weight has labels too
        for number, batch in enumerate(
            track(batches, description="calibrating", transient=True, disable=not sys.stdout.isatty())
        ):
            for parameter, _, _ in before:
                parameter.grad = None
            for found in inputs:
                found.observe()
            with torch.enable_grad():
                value = loss(model, batch)
                if not bool(value.detach().isfinite().all()):
                    raise ValueError(f"loss: expected a finite number, found {value.detach()} for batch {number}")
                value.backward()  # type: ignore[no-untyped-call]  # torch's
            for callback, place in places:
                weight = place.parameter
                place.tensor.slots.observe(callback.slot, weight.detach(), weight.grad)
    finally:
        for parameter, gradient, learns in before:
            parameter.grad = gradient
            parameter.requires_grad_(learns)
        for layer, mode in training:
            layer.training = mode
        for found in inputs:
            found.observing = False
    if number < 0:
        raise ValueError("batches: expected one batch or more, found none; a generator can be read only once")


@dataclass(frozen=True)
class Plan:
    """What callbacks would do to a model; ``str(plan)`` is a table.

    Attributes:
        taken: tensor name → the methods that would fill its slots.
        left: tensor name → why no callback takes it.
        notes: tensor name → why some slot stays empty although others are filled.
        report: the file that compressing a copy now would give. Training changes it: by a few per cent where the model is
            trained already, by more from random weights. Labels are not known: random ones stand for them; parameters and
            statistics that are still all equal count as what training would make of them.
        tables: name of an embedding table → its share of the dense bytes, 0 … 1.
    """

    taken: dict[str, str]
    left: dict[str, str]
    notes: dict[str, str]
    report: Report
    tables: dict[str, float]

    def __str__(self) -> str:
        lines = [str(self.report)]
        stored = {row.name: row.stored_bytes / max(self.report.file_bytes, 1) for row in self.report.tensors}
        if self.tables:
            lines += ["", "embedding tables:"]
        for name, share in self.tables.items():
            lines += [f"  {name}: {share:.1%} of the dense bytes, {stored[name]:.1%} of the file"]
        if self.notes:
            lines += ["", "slots left empty:"] + [f"  {name}: {reason}" for name, reason in self.notes.items()]
        if self.left:
            lines += ["", "not compressed:"] + [f"  {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def plan(model: nn.Module, callbacks: Callback | Sequence[Callback]) -> Plan:
    """Which tensors each callback takes, which it leaves and why, and the bytes to expect; the model is not touched.

    Args:
        model: the model.
        callbacks: those that will go to the Trainer; others than ours are passed over.

    Raises:
        ValueError: what training would refuse: a pattern that matches nothing, a slot filled twice.

    >>> from psc_lightning.callbacks import StraightThroughQuantization, WeightSharing
    >>> model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 10))
    >>> made = plan(model, [WeightSharing("separable"), StraightThroughQuantization("uniform")])
    >>> made.taken
    {'0.weight': 'separable+uniform', '2.weight': 'uniform'}
    >>> made.notes
    {'2.weight': 'separable does not apply: it has no kernel of two or more entries to separate'}
    """
    everything = callbacks if isinstance(callbacks, Sequence) else [callbacks]
    ours = _ours(everything)
    fillers = [callback for callback in ours if isinstance(callback, SlotCallback)]
    copy = copied(model)
    skipped: dict[str, list[str]] = {}
    labelled: list[tuple[str, Place]] = []
    for rounder in deepcopy(ours):
        if isinstance(rounder, ActivationQuantization):
            rounder.attach(copy)
    for callback in fillers:
        callback = deepcopy(callback)
        chosen = callback.choose(copy)
        places = callback.attach(copy, chosen)
        if callback.calibration_steps or (callback.slot == "mask" and MASKS[callback.method].labels != "none"):
            labelled += [(callback.slot, place) for place in places]
        for name, reason in chosen.skipped.items():
            reasons = skipped.setdefault(name, [])
            if reason not in reasons:
                reasons.append(reason)
    for callback in fillers[:1]:
        callback.check(copy)
    _foresee(copy, labelled)
    taken = {}
    for name, tensor, parameter in compressed(copy):
        taken[name] = tensor.slots.method
        tensor.harden(parameter)
    tables = [target.name for target in tensors(copy) if target.looked_up]
    why = {name: "; ".join(parts) for name, parts in skipped.items()}
    report = to_bytes(copy)[1]
    report.notes, report.batchnorm_batches = costly_masks(copy, report.file_bytes), None
    for budget in everything:
        if isinstance(budget, ByteBudget):
            allowed = in_bytes(budget.given, report.dense_bytes)
            report.notes.append(
                f"ByteBudget steers the file to {allowed:,} bytes in training; the bytes here are without it"
            )
    return Plan(
        taken=taken,
        left={name: reason for name, reason in why.items() if name not in taken},
        notes={name: reason for name, reason in why.items() if name in taken},
        report=report,
        tables={row.name: row.dense_bytes / max(report.dense_bytes, 1) for row in report.tensors if row.name in tables},
    )


@torch.no_grad()
def _foresee(model: nn.Module, labelled: Sequence[tuple[str, Place]]) -> None:
    """Change a model that is to be priced before training: random labels; noise on what training has not moved yet."""
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    for slot, place in labelled:
        if is_sharded(place.parameter):
            continue
        place.tensor.slots.observe(slot, place.parameter.detach(), noise(place.parameter))
    taken = {id(parameter) for _, _, parameter in compressed(model)}
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in taken]
    norms = [norm for norm in model.modules() if isinstance(norm, _NormBase)]
    for one in (*learned, *(buffer for norm in norms for buffer in norm.buffers())):
        if (
            one.is_floating_point()
            and one.numel() > 1
            and not is_sharded(one)
            and bool((one == one.flatten()[0]).all())
        ):
            one.add_(noise(one), alpha=0.1)


def costly_masks(model: nn.Module, file_bytes: int, **writing: Any) -> list[str]:
    """What to say of a live model whose file, of so many bytes, written in this way, would be smaller without its masks.

    That is asked where levels have no zero of their own, so that where the zeros are has to be stored.
    """

    def masks(one: nn.Module) -> Iterator[tuple[Mask, str]]:
        for _, tensor, _ in compressed(one):
            for chain in tensor.slots.cores.values():
                assert isinstance(chain, Chain)
                mask, levels = chain.mask, chain.levels
                if mask is not None and mask.threshold > 0 and levels is not None and not levels.zero:
                    yield mask, tensor.slots.specs["levels"].method

    if not (found := sorted({method for _, method in masks(model)})):
        return []
    other = copied(model)
    for mask, _ in list(masks(other)):
        mask.threshold = 0.0
    for _, tensor, parameter in compressed(other):
        tensor.slots.stale = True
        tensor.harden(parameter)
    without = to_bytes(other, **writing)[1].file_bytes
    if without > file_bytes:
        return []
    return [
        f"the mask costs more than it saves: {file_bytes:,} bytes with it, {without:,} without; levels={', '.join(found)} "
        "have no zero, so that where the zeros are is stored, too: threshold=0 gives the smaller file"
    ]
