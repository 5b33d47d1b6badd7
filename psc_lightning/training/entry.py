"""Our entry in a checkpoint: beside the plain weights, what training needs to go on; tensors and primitives only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from psc_lightning.slots.slots import SLOTS, Slots, Spec
from psc_lightning.training.averaging import Average
from psc_lightning.training.cast import Cast

__all__ = ["KEY", "bits_of", "check", "difference", "difference_of_bits", "read", "specs_of", "write"]

#: where it lies in a checkpoint, and the version of what lies there
KEY, VERSION = "psc_lightning", 5

_ADVICE = "start from its weights: model.load_state_dict(torch.load(path)['state_dict'])"


def write(cast: Cast, averages: list[Average]) -> dict[str, Any]:
    """What goes into a checkpoint."""
    settings = _settings(cast)
    return {
        "version": VERSION,
        "tensors": {
            place.name: {
                "slots": {slot: asdict(specs[slot]) for slot in SLOTS if slot in (specs := place.tensor.slots.specs)},
                "threshold": _threshold(place.tensor.slots),
                "settings": settings[place.name],
                "state": place.tensor.training_state(place.parameter),
            }
            for place in cast.everywhere()
        },
        "activations": {
            name: {
                "bits": inputs.bits,
                "owner": inputs.owner,
                "settings": settings[name],
                "state": inputs.training_state(),
            }
            for name, inputs in cast.rounding.layers.items()
        },
        "optimizer": cast.sidecars.state_dict(),
        "total_steps": cast.length.total if cast.length.known else None,
        "length": {**cast.length.state_dict(), "reached": dict(cast.reached), "zeros": dict(cast.zeros)},
        "base_rate": cast.base_rate,
        "others": _others(cast, averages),
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


def read(entry: dict[str, Any], cast: Cast, averages: list[Average]) -> None:
    """Put it back. What is set otherwise, but does not keep training from going on, is told.

    Raises:
        ValueError: it was trained with other methods.
    """
    tensors, activations = entry["tensors"], entry["activations"]
    now = {place.name: place.tensor.slots.specs for place in cast.everywhere()}
    bits = {name: inputs.bits for name, inputs in cast.rounding.layers.items()}
    if other := difference(specs_of(entry), now) or difference_of_bits(bits_of(entry), bits):
        raise ValueError(f"{other}: resume with the same callbacks, or {_ADVICE}")
    settings = {name: dict(had["settings"]) for name, had in (tensors | activations).items()}
    had, has = Counter(entry["others"]), Counter(_others(cast, averages))
    less, more = (" and ".join(sorted((one - two).elements())) for one, two in ((had, has), (has, had)))
    for other in (
        _difference(settings, _settings(cast), _set),
        f"the checkpoint was trained {f'with {less}' if less else f'without {more}'}, this run is "
        f"{f'with {more}' if more else f'without {less}'}"
        if had != has
        else "",
    ):
        if other:
            rank_zero_warn(f"{other}: training goes on as this run says")
    for penalty in cast.penalties:  # first: what follows from a latent weight also follows from a threshold
        if (state := entry["penalties"].get(penalty.state_key)) is not None:
            penalty.load_penalty_state(cast, state)
    for place in cast.everywhere():
        place.tensor.load_training_state(place.parameter, tensors[place.name]["state"])
        place.tensor.reconcile(place.parameter)
    for name, inputs in cast.rounding.layers.items():
        inputs.load_training_state(activations[name]["state"])
    cast.sidecars.load_state_dict(entry["optimizer"])
    length = dict(entry["length"])
    cast.reached, cast.zeros = length.pop("reached"), length.pop("zeros")
    cast.length.load_state_dict(length)
    cast.base_rate = entry["base_rate"]
    for average, state in zip(averages, entry["averages"]):
        average.load_state_dict(state)


def specs_of(entry: Mapping[str, Any]) -> dict[str, dict[str, Spec]]:
    """What filled the slots of each tensor."""
    return {name: {slot: Spec(**spec) for slot, spec in one["slots"].items()} for name, one in entry["tensors"].items()}


def difference(
    then: Mapping[str, Mapping[str, Spec]], now: Mapping[str, Mapping[str, Spec]], who: str = "this run"
) -> str:
    """Methods or options that are others now, in words; empty if none is. Whose callbacks they are does not count."""
    had, has = ({name: _methods(specs) for name, specs in side.items()} for side in (then, now))
    return _difference(had, has, _filled, who)


def bits_of(entry: Mapping[str, Any]) -> dict[str, int]:
    """To how many bits the inputs of each layer were rounded."""
    return {name: one["bits"] for name, one in entry["activations"].items()}


def difference_of_bits(then: Mapping[str, int], now: Mapping[str, int], who: str = "this run") -> str:
    """As `difference`, of what `bits_of` gives."""
    had, has = ({name: {"inputs": f"bits={bits}"} for name, bits in side.items()} for side in (then, now))
    return _difference(had, has, lambda one: _filled(one) if one else "inputs that are not rounded", who)


def _threshold(slots: Slots) -> float | None:
    """The share of zeros now, which a budget may have steered away from what was asked for."""
    return next((chain.mask.threshold for chain in slots.chains() if chain.mask is not None), None)


def _methods(specs: Mapping[str, Spec]) -> dict[str, str]:
    """The methods and their options, in the order of the slots: what must be the same to go on."""
    filled = [(slot, specs[slot]) for slot in SLOTS if slot in specs]
    return {slot: ", ".join([spec.method, *(f"{k}={v}" for k, v in spec.options.items())]) for slot, spec in filled}


def _settings(cast: Cast) -> dict[str, dict[str, Any]]:
    """How and when each tensor's slots act: what may be otherwise."""
    found: dict[str, dict[str, Any]] = {place.name: {} for place in cast.everywhere()}
    for filler in cast.fillers:
        for place in cast.of(filler):
            found[place.name] |= {f"{filler.slot}.{key}": value for key, value in filler.settings.items()}
    return found | cast.rounding.settings


def _others(cast: Cast, averages: list[Average]) -> list[str]:
    """What else of a run bears on its weights here."""
    clippers = [(type(one).__name__, one.settings) for one in cast.clippers]
    told = [f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" for name, given in clippers]
    told += [penalty.state_key for penalty in cast.penalties]
    return sorted([*told, *(type(average.callback).__name__ for average in averages)])


def _difference(
    then: Mapping[str, dict[str, Any]],
    now: Mapping[str, dict[str, Any]],
    told: Callable[[dict[str, Any]], str],
    who: str = "this run",
) -> str:
    """What the first tensor had that differs, what it has, and in how many others it is so; empty if none differs."""
    pairs = [(name, then.get(name, {}), now.get(name, {})) for name in {**now, **then}]
    differing = [pair for pair in pairs if pair[1] != pair[2]]
    if not differing:
        return ""
    name, had, has = differing[0]
    if had.keys() == has.keys():
        had, has = ({key: one[key] for key in one if had[key] != has[key]} for one in (had, has))
    also = f" (and so on in {len(differing) - 1} more)" if len(differing) > 1 else ""
    return f"{name}: the checkpoint was trained with {told(had)}, {who} has {told(has)}{also}"


def _filled(methods: dict[str, Any]) -> str:
    return " + ".join(f"{slot} ({method})" for slot, method in methods.items()) or "no slots"


def _set(settings: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in settings.items())
