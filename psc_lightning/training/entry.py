"""Our entry in a checkpoint: beside the plain weights, what training needs to go on; tensors and primitives only."""

from __future__ import annotations

import math
from typing import Any

from psc_lightning.activations import Activations
from psc_lightning.slots import SLOTS, Slots
from psc_lightning.training.averaging import Average
from psc_lightning.training.cast import Cast
from psc_lightning.training.rounding import Rounding

__all__ = ["KEY", "check", "read", "write"]

#: where it lies in a checkpoint, and the version of what lies there
KEY, VERSION = "psc_lightning", 4

_ADVICE = "start from its weights: model.load_state_dict(torch.load(path)['state_dict'])"


def write(cast: Cast, rounding: Rounding, averages: list[Average]) -> dict[str, Any]:
    """What goes into a checkpoint."""
    return {
        "version": VERSION,
        "tensors": {
            place.name: {
                "slots": _methods(place.tensor.slots),
                "state": place.tensor.training_state(place.parameter),
            }
            for place in cast.everywhere()
        },
        "activations": {
            name: {"slots": _rounded(inputs), "state": inputs.training_state()}
            for name, inputs in rounding.layers.items()
        },
        "optimizer": cast.sidecars.state_dict(),
        "total_steps": cast.total if cast.total is not None and math.isfinite(cast.total) else None,
        "base_rate": cast.base_rate,
        "averages": [average.state_dict() for average in averages],
        "penalties": {penalty.state_key: penalty.penalty_state() for penalty in cast.penalties},
    }


def check(entry: Any) -> dict[str, Any]:
    """The entry, if it can be read.

    Raises:
        ValueError: it is of another version.
    """
    if not isinstance(entry, dict) or entry.get("version") != VERSION:
        raise ValueError(
            f"the checkpoint's entry {KEY!r} is of another version of psc_lightning and cannot be resumed from; {_ADVICE}"
        )
    return entry


def read(entry: dict[str, Any], cast: Cast, rounding: Rounding, averages: list[Average]) -> None:
    """Put it back.

    Raises:
        ValueError: it was trained with other methods.
    """
    tensors, activations = entry["tensors"], entry["activations"]
    now = {place.name: _methods(place.tensor.slots) for place in cast.everywhere()}
    now |= {name: _rounded(inputs) for name, inputs in rounding.layers.items()}
    then = {name: dict(found["slots"]) for name, found in (tensors | activations).items()}
    for name in [*now, *then]:
        if (has := now.get(name, {})) != (had := then.get(name, {})):
            raise ValueError(
                f"{name}: the checkpoint was trained with {_described(had)}, this run has {_described(has)}: resume with the "
                f"same callbacks, or {_ADVICE}"
            )
    for penalty in cast.penalties:  # first: what follows from a latent weight also follows from a threshold
        if (state := entry["penalties"].get(penalty.state_key)) is not None:
            penalty.load_penalty_state(cast, state)
    for place in cast.everywhere():
        place.tensor.load_training_state(place.parameter, tensors[place.name]["state"])
        place.tensor.reconcile(place.parameter)
    for name, inputs in rounding.layers.items():
        inputs.load_training_state(activations[name]["state"])
    cast.sidecars.load_state_dict(entry["optimizer"])
    cast.total, cast.base_rate = entry["total_steps"], entry["base_rate"]
    for average, state in zip(averages, entry["averages"]):
        average.load_state_dict(state)


def _methods(slots: Slots) -> dict[str, str]:
    """The methods and their options, in the order of the slots: what must be the same to go on."""
    specs = [(slot, slots.specs[slot]) for slot in SLOTS if slot in slots.specs]
    return {slot: ", ".join([spec.method, *(f"{k}={v}" for k, v in spec.options.items())]) for slot, spec in specs}


def _rounded(inputs: Activations) -> dict[str, str]:
    return {"activations": f"bits={inputs.bits}"}


def _described(methods: dict[str, str]) -> str:
    return " + ".join(f"{slot} ({method})" for slot, method in methods.items()) or "no slots"
