"""How coarsely a file may store what is outside the slots, so that the loss does not feel it: tried, not guessed."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from psc_lightning.artifact import load_into, to_bytes
from psc_lightning.artifact.leftovers import Precisions
from psc_lightning.copies import copied
from psc_lightning.folding import fold_batchnorm as folded
from psc_lightning.slots.live import detach

__all__ = ["AUTO", "Coarsest", "coarsest", "foldable", "told"]

AUTO = "auto"
_PRECISIONS = ("log8", "float16", "float32")
_SHARE = 0.01  # of the loss: a rise that is allowed
_NOISE = 0.25  # of the loss's standard error over these batches: likewise

Folding = bool | str | dict[str, str]


@dataclass(frozen=True)
class Coarsest:
    """How to save a model, and what that does to the loss.

    Attributes:
        writing: keywords of `save`: `leftovers` and `fold_batchnorm`.
        loss: the mean over the batches, of what the file will hold.
        exact: of what it would hold without rounding or folding.
        batches: how many there were.
    """

    writing: dict[str, Any]
    loss: float
    exact: float
    batches: int

    def __str__(self) -> str:
        chosen = f"chosen on {self.batches} training batches"
        return f"{told(self.writing)}, {chosen} (loss {self.loss:.4g}, of exact numbers {self.exact:.4g})"


def told(writing: Mapping[str, Any]) -> str:
    """Keywords of `save` as a sentence has them.

    >>> told({"leftovers": "log8", "fold_batchnorm": True})
    'leftovers log8, BatchNorm folded'
    """
    return f"leftovers {writing['leftovers']}, BatchNorm {'folded' if writing['fold_batchnorm'] else 'not folded'}"


def coarsest(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    leftovers: Precisions = AUTO,
    fold_batchnorm: Folding = AUTO,
    plain: nn.Module | None = None,
) -> Coarsest:
    """Find the smallest way to store biases, BatchNorm and all else outside the slots that the loss allows.

    Folded `log8`, folded `float16`, then the same unfolded, then `float32`: the first whose mean loss over the batches, of a
    plain model in eval that has read the file, is at most 1 % above that of exact numbers, or a quarter of that mean's
    standard error, if this is more. Of a distributed run all processes must call this; each brings batches of its own.

    Args:
        model: compressed, live or not; it is not changed.
        batches: of training data; never of what the file will be judged by.
        loss: ``loss(model, batch)`` gives a scalar.
        leftovers, fold_batchnorm: `"auto"`, or as for `save`: then that is kept.
        plain: a module of the same class to read the files into; None: a detached copy of the model.

    Raises:
        ValueError: no batches, or the model cannot be saved.

    >>> from psc_lightning.oneshot import compress
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))
    >>> _ = compress(model, "binary", min_size=1)
    >>> batches = [torch.randn(16, 3, 3, 3) for _ in range(2)]
    >>> coarsest(model, batches, lambda model, x: model(x).square().mean()).writing
    {'leftovers': 'log8', 'fold_batchnorm': True}
    """
    given = list(batches)
    if not given:
        raise ValueError("batches: expected one or more, found none")
    plain = detach(copied(model)) if plain is None else plain
    finest = {
        "leftovers": "float32" if leftovers == AUTO else leftovers,
        "fold_batchnorm": False if fold_batchnorm == AUTO else fold_batchnorm,
    }

    def losses(writing: dict[str, Any]) -> Tensor | None:
        try:
            data, _ = to_bytes(model, **writing)
        except ValueError:
            if writing is finest:
                raise
            return None  # numbers beyond float16, scales that can take no factor
        load_into(plain, io.BytesIO(data))
        return _everywhere(_losses(plain, given, loss))

    exact = losses(finest)
    assert exact is not None
    number = len(exact)
    error = float(exact.std()) / math.sqrt(number) if number > 1 else 0.0
    allowed = float(exact.mean()) + max(_SHARE * abs(float(exact.mean())), _NOISE * error)
    for writing in _candidates(model, leftovers, fold_batchnorm):
        found = exact if writing == finest else losses(writing)
        if found is not None and float(found.mean()) <= allowed:
            return Coarsest(writing, float(found.mean()), float(exact.mean()), number)
    return Coarsest(finest, float(exact.mean()), float(exact.mean()), number)


def _candidates(model: nn.Module, leftovers: Precisions, fold_batchnorm: Folding) -> Iterator[dict[str, Any]]:
    """From the smallest file to the largest: four numbers a channel in eight bits are more than one in sixteen."""
    foldings: list[Folding] = [fold_batchnorm]
    if fold_batchnorm == AUTO:
        foldings = [True, False] if foldable(model) else [False]
    precisions: tuple[Precisions, ...] = _PRECISIONS if leftovers == AUTO else (leftovers,)
    pairs = [(folding, precision) for folding in foldings for precision in precisions]
    for folding, precision in sorted(pairs, key=lambda pair: pair[1] == "float32"):
        yield {"leftovers": precision, "fold_batchnorm": folding}


def foldable(model: nn.Module) -> bool:
    """Whether each BatchNorm that a convolution feeds can go into it, as the model is now."""
    if not any(isinstance(module, _NormBase) for module in model.modules()):
        return False
    try:
        folded(model)
    except ValueError:
        return False
    return True


@torch.no_grad()
def _losses(model: nn.Module, batches: list[Any], loss: Callable[[nn.Module, Any], Tensor]) -> list[float]:
    model.eval()
    return [float(loss(model, batch)) for batch in batches]


def _everywhere(losses: list[float]) -> Tensor:
    """Those of all processes: they must choose alike."""
    each = [losses]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        each = [[] for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather_object(each, losses)
    return torch.tensor([loss for part in each for loss in part], dtype=torch.float64)
