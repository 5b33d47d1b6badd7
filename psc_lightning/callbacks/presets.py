"""Presets: the callbacks that `python train.py compression=…` builds, for any Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from psc_lightning.callbacks.slot import SlotCallback
from psc_lightning.configs import config_dir
from psc_lightning.options import one_of
from psc_lightning.slots.slots import SLOTS
from psc_lightning.slots.targets import patterns
from psc_lightning.words import elsewhere, hint, known

__all__ = ["composed", "preset", "readers", "wanted"]

_NOT_OPTIONS = ("name", "callbacks", "untied")
#: callbacks that are there where the key of their name has a value
_OPTIONAL = ("activations", "budget")


def _methods(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def readers(word: str) -> str:
    """What an error adds where another method, or a callback by itself, takes this option."""
    from omegaconf import OmegaConf

    found: dict[str, list[str]] = {}
    for slot in SLOTS:
        for path in sorted((config_dir() / "compression" / slot).glob("*.yaml")):
            if option := known(word, [str(key) for key in OmegaConf.load(path) if key not in _NOT_OPTIONS]):
                found.setdefault(option, []).append(f"{slot}={path.stem!r}")
    parts = [f"{option} is an option of {', '.join(methods)}" for option, methods in found.items()]
    return f"; {'; '.join(parts)}" if parts else elsewhere(word)


def composed(compression: str, **slots: str) -> Any:
    """A preset's configuration, as Hydra composes it from the files in ``conf/compression``.

    Args:
        compression: a file's name there.
        slots: another method for `tying`, `mask` or `levels`; `none` leaves the slot empty.

    Raises:
        ValueError: an unknown preset or method; the argument is named.
    """
    from omegaconf import DictConfig, ListConfig, OmegaConf

    folder = config_dir() / "compression"
    one_of("compression", compression, _methods(folder))
    own = OmegaConf.load(folder / f"{compression}.yaml")
    assert isinstance(own, DictConfig)
    parts: list[DictConfig | ListConfig] = [own]
    for default in reversed(own.pop("defaults")):
        for group, choice in {} if default == "_self_" else default.items():
            choice = one_of(group, slots.get(group, choice), _methods(folder / group))
            parts.insert(0, OmegaConf.load(folder / group / f"{choice}.yaml"))
    return OmegaConf.merge(*parts)


def wanted(config: Any) -> dict[str, Any]:
    """The callbacks of a composed compression by name: of filled slots, and of `activations` and `budget` if given."""
    nodes: dict[str, Any] = dict(config["callbacks"].items())
    return {
        name: node
        for name, node in nodes.items()
        if node
        and "_target_" in node  # not what a preset sets for a slot that was left empty
        and (name not in _OPTIONAL or config.get(name, name) is not None)
    }


def preset(
    compression: str = "none",
    threshold: float | None = None,
    *,
    tying: str | None = None,
    mask: str | None = None,
    levels: str | None = None,
    schedule: Any = None,
    **options: Any,
) -> list[Callback]:
    """The callbacks of a preset, for `Trainer(callbacks=[…])`.

    Args:
        compression: none, float, binary, ternary, mask, cross_channel, row, column, separable, low_rank, log, codebook,
            deep or small.
        threshold: share of the core's entries that are zero; None: the preset's default.
        tying, mask, levels: another method in that slot (`"none"` leaves it empty); None: the preset's.
        schedule: a `Schedule`, its kind, or a mapping, for all of them. None: linear up to 70 % of training.
        options: the methods' options (`bits`, `group`, `rank`, …), `targets`, `ignore`, `min_size`, `activations`: bits of
            the inputs of layers (see `ActivationQuantization`), and `budget`: bytes of the file (`2500`, `"27kB"`, `"3%"`
            of the dense size), which training then steers to.

    Raises:
        ValueError: an unknown preset or method, an option that none of them reads, or a wrong value; it is named.

    >>> [callback.method for callback in preset("deep", threshold=0.8)]
    ['movement', 'codebook']
    >>> [type(callback).__name__ for callback in preset("ternary", budget="2kB")]
    ['MaskLearning', 'StraightThroughQuantization', 'ByteBudget']
    >>> [callback.method for callback in preset("low_rank", levels="ternary", mask="movement")]
    ['low_rank', 'movement', 'ternary']
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    slots = {"tying": tying, "mask": mask, "levels": levels}
    config = composed(compression, **{slot: method for slot, method in slots.items() if method is not None})
    allowed = [str(key) for key in config if key not in _NOT_OPTIONS]
    if threshold is not None:
        options["threshold"] = threshold
    for key, value in options.items():
        if key not in allowed:
            raise ValueError(
                f"{key}: compression={compression!r} has no such option; it has {', '.join(sorted(allowed))}"
                f"{hint(key, (*allowed, *slots, 'schedule')) or readers(key)}"
            )
        config[key] = patterns(key, value) if key in ("targets", "ignore") else value  # classes become names
    resolved = OmegaConf.to_container(OmegaConf.create({"compression": config}), resolve=True)
    assert isinstance(resolved, dict)
    parts = wanted(resolved["compression"])
    for part in parts.values():
        if "schedule" in part and (schedule is not None or part["schedule"] is None):
            part["schedule"] = schedule
    try:
        built = [instantiate(part, _convert_="all") for part in parts.values()]
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None  # the callback's own message names the argument
        raise
    return sorted(built, key=lambda one: SLOTS.index(one.slot) if isinstance(one, SlotCallback) else len(SLOTS))
