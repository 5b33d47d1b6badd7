"""What a step is measured with: our callbacks, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lightning import Callback
from torch import nn

from psc_lightning import GradientClipping, MaskLearning, Schedule, StraightThroughQuantization, WeightSharing

__all__ = ["LIMITS", "METHODS", "PLAIN", "Method", "limit"]

RAMP = Schedule("linear", 0.0, 1.0)  # over all of a run
AT_ONCE = Schedule("constant")
SMALL = 1e-3  # a norm that every gradient exceeds, so that clipping clips


@dataclass(frozen=True)
class Method:
    """Callbacks for a network, or what else is done to it before the fit; epochs before the one that is measured."""

    callbacks: Callable[[nn.Module], list[Callback]] = lambda net: []
    change: Callable[[nn.Module], None] = lambda net: None
    before: int = 0


PLAIN = Method()


def levels(name: str, schedule: Schedule = AT_ONCE, **options: object) -> StraightThroughQuantization:
    return StraightThroughQuantization(name, schedule=schedule, **options)  # type: ignore[arg-type]


def mask(name: str, threshold: float = 0.5, schedule: Schedule = AT_ONCE) -> MaskLearning:
    return MaskLearning(name, threshold, schedule=schedule, calibration_steps=1 if name == "saliency" else None)


def sharing(name: str) -> WeightSharing:
    return WeightSharing(name, schedule=AT_ONCE, calibration_steps=1 if name == "cross_channel" else None)


METHODS: dict[str, Method] = {
    "plain again": PLAIN,
    "uniform 8 bit": Method(lambda net: [levels("uniform")]),
    "binary": Method(lambda net: [levels("binary")]),
    "ternary": Method(lambda net: [levels("ternary")]),
    "log": Method(lambda net: [levels("log")]),
    "codebook 16": Method(lambda net: [levels("codebook", k=16)]),
    "magnitude 0.5": Method(lambda net: [mask("magnitude")]),
    "movement 0.5": Method(lambda net: [mask("movement")]),
    "saliency 0.5": Method(lambda net: [mask("saliency")]),
    "row + magnitude 0.5 + uniform": Method(lambda net: [sharing("row"), mask("magnitude"), levels("uniform")]),
    "cross_channel": Method(lambda net: [sharing("cross_channel")]),
    "low_rank": Method(lambda net: [sharing("low_rank")]),
    "separable": Method(lambda net: [sharing("separable")]),
    "movement 0.9 + codebook": Method(lambda net: [mask("movement", 0.9), levels("codebook", k=16)]),
    "uniform, in the ramp": Method(lambda net: [levels("uniform", RAMP)]),
    "movement 0.9 + codebook, in the ramp": Method(
        lambda net: [mask("movement", 0.9, RAMP), levels("codebook", RAMP, k=16)]
    ),
    "clipping weight": Method(lambda net: [GradientClipping(max_norm=SMALL, scope="weight")]),
    "clipping layer": Method(lambda net: [GradientClipping(max_norm=SMALL, scope="layer")]),
    "clipping global": Method(lambda net: [GradientClipping(max_norm=SMALL)]),
    "clipping global, log=False": Method(lambda net: [GradientClipping(max_norm=SMALL, log=False)]),
    "clipping agc": Method(lambda net: [GradientClipping(adaptive=0.01)]),
}

#: what a ratio must not exceed, and what it aims at
LIMITS: dict[str, dict[str, tuple[float, float]]] = {
    "encoder": {
        "uniform 8 bit": (1.10, 1.05),
        "binary": (1.10, 1.05),
        "ternary": (1.12, 1.07),
        "log": (1.12, 1.07),
        "codebook 16": (1.12, 1.06),
        "magnitude 0.5": (1.25, 1.12),
        "movement 0.5": (1.40, 1.25),
        "row + magnitude 0.5 + uniform": (1.35, 1.20),
        "clipping layer": (1.04, 1.02),
    },
    "minilm": {
        "uniform 8 bit": (1.25, 1.12),
        "binary": (1.25, 1.12),
        "ternary": (1.30, 1.15),
        "codebook 16": (1.30, 1.15),
        "movement 0.9 + codebook": (2.0, 1.4),
    },
}


def limit(net: str, method: str) -> tuple[float, float] | None:
    """What a method's ratio on a net must not exceed, and its goal; None where nothing is asked."""
    if net == "resnet20" and method != "plain again":
        return 1.05, 1.05
    return LIMITS.get(net, {}).get(method)
