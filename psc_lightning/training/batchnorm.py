"""BatchNorm's statistics of the weights as they are, instead of a running average over weights that still moved.

A network of few levels feels the difference: a step of the optimizer moves a whole level, and a running average lags ten
steps behind. The statistics are taken anew, before each validation and at the end, from the inputs of the last training
batches, which are kept: no data loader is read again, no random number drawn, no training step called, no hook set.

Source: Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", §3 (PreciseBN); torch.optim.swa_utils.update_bn.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from psc_lightning.slots.live import compressed
from psc_lightning.training.batches import Call, call_of, on_device, shortened

__all__ = ["Inputs", "note_refreshed", "refresh_batchnorm"]

MOST = 8  # batches by default
SHARE = 0.06  # of an epoch's batches: a forward pass is a third of a step, and 2 % of an epoch's time are enough
_BYTES = 1 << 22  # of a batch that are kept: of larger ones, so many samples


def _statistics(module: nn.Module) -> list[_NormBase]:
    """The BatchNorms in it that keep statistics. (InstanceNorm is of the same base, and keeps none by default.)"""
    found = (one for one in module.modules() if isinstance(one, _NormBase))
    return [one for one in found if one.track_running_stats and one.running_mean is not None]


@contextmanager
def _renewing(model: nn.Module, norms: list[_NormBase]) -> Iterator[None]:
    """Within it these BatchNorms take the mean of all batches that they see; everything else is in eval."""
    modes = [(module, module.training) for module in model.modules()]
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    counts = [None if count is None else count.clone() for _, _, count in before]
    model.eval()
    for norm, _, count in before:
        norm.train()
        norm.momentum = None  # the mean of all, from the first on
        if count is not None:
            count.zero_()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for (norm, momentum, tracked), count in zip(before, counts, strict=True):
            norm.momentum = momentum
            if tracked is not None and count is not None:
                tracked.copy_(count)
        for module, mode in modes:
            module.training = mode


def refresh_batchnorm(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> int:
    """Take the statistics of all BatchNorms anew: their means over these batches, of the weights as they are now.

    Everything else is in eval meanwhile (no dropout); modes are put back.

    Args:
        model: any module; a LightningModule is called as `model(x)`.
        batches: of training: tensors; mappings, of which `forward` gets what it names; lists and tuples that begin with the
            inputs, as many as `forward` needs. They are moved to the model's device.
        forward: ``forward(model, batch)``, where a model is called otherwise.

    Returns:
        How many batches there were; 0 where the model has no statistics.

    Raises:
        ValueError: the signature of `forward` does not say what of a batch it takes.

    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1))
    >>> _ = nn.init.ones_(model[0].weight)
    >>> refresh_batchnorm(model, [torch.tensor([[0.0, 1.0], [2.0, 1.0]])]), model[1].running_mean.tolist()
    (1, [2.0])
    """
    norms = _statistics(model)
    if not norms:
        return 0
    device = next(model.parameters()).device
    number = 0

    def call(module: nn.Module, batch: Any) -> Any:
        try:
            args, kwargs = on_device(call_of(module, batch), device)
        except ValueError as error:
            raise ValueError(f"batches: {error}: give forward=lambda model, batch: …") from None
        return module(*args, **kwargs)

    with _renewing(model, norms):
        for batch in batches:
            (forward or call)(model, batch)
            number += 1
    note_refreshed(model, number)
    return number


def note_refreshed(model: nn.Module, batches: int) -> None:
    """Let the report of what is saved say from how many batches BatchNorm's statistics are."""
    for _, tensor, _ in compressed(model):
        tensor.refreshed = batches


class Inputs:
    """The inputs of the last training batches, and the module that takes them.

    That is the LightningModule, where its class has a `forward`; else its only child with BatchNorms.

    Args:
        model: the LightningModule.
        most: how many batches to keep.
    """

    def __init__(self, model: nn.Module, most: int) -> None:
        self.model, self.norms = model, _statistics(model)
        self.batches: deque[Call] = deque(maxlen=max(most, 1))
        self.fresh = False  # the statistics are those of the weights as they are
        self.problem = (
            "" if self._taker() is not None else "the class has no `forward`, and several parts with BatchNorm"
        )
        self.warned = False
        self._learning: set[nn.Module] = set()  # the BatchNorms that take statistics in training: frozen ones do not

    def _taker(self) -> nn.Module | None:
        if type(self.model).forward.__module__.split(".")[0] not in ("torch", "lightning", "pytorch_lightning"):
            return self.model
        parts = [child for child in self.model.children() if _statistics(child)]
        return parts[0] if len(parts) == 1 else None

    def see(self, batch: Any) -> None:
        """A training batch begins."""
        self.fresh = False
        taker = self._taker()
        if not self.norms or self.problem or taker is None:
            return
        try:
            self.batches.append(shortened(call_of(taker, batch), _BYTES))
        except ValueError as error:
            self.problem = str(error)
            return
        self._learning.update(norm for norm in self.norms if norm.training)

    def replay(self, batches: int | None = None) -> int:
        """Take the statistics anew from the last so many batches, None: all; how many there were."""
        chosen, taker = list(self.batches)[-(batches or len(self.batches)) :], self._taker()
        self.fresh = True
        if not chosen or not self._learning or taker is None or self.problem:
            return 0
        learning = [norm for norm in self.norms if norm in self._learning]
        with _renewing(self.model, learning), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # activation checkpointing warns of inputs without gradients
            for args, kwargs in chosen:
                taker(*args, **kwargs)
        return len(chosen)

    def statistics(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The statistics as they are, of the BatchNorms that have them in a state dict, by its keys."""
        names = {id(norm): name for name, norm in self.model.named_modules()}
        found = {f"{names[id(norm)]}.{key}": value for norm in self.norms for key, value in norm.named_buffers()}
        return {name: value.detach().clone() for name, value in found.items() if type(state.get(name)) is Tensor}

    def state_dict(self) -> list[Call]:
        """What is kept, for a checkpoint."""
        return list(self.batches)

    def load_state_dict(self, state: list[Call]) -> None:
        """Put it back."""
        device = next(self.model.parameters()).device
        self.batches.extend(on_device(state, device))
        self._learning.update(self.norms if state else ())
