"""How a run went: what the pages draw, and what a logger may show while it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from psc_lightning.artifact import measure
from psc_lightning.artifact.leftovers import Precisions
from psc_lightning.callbacks.budget import ByteBudget
from psc_lightning.files import Place, write_atomic
from psc_lightning.options import whole
from psc_lightning.sharding import is_sharded
from psc_lightning.strict_json import json_text
from psc_lightning.training.cast import Cast
from psc_lightning.training.conductor import Conductor
from psc_lightning.training.run import callbacks_of

__all__ = ["History"]

_MEASURED = 1 << 20  # compressed entries of a model that is measured each time: some hundredths of a second


class History(Callback):
    """Record how training went; goes through checkpoints, so that a resumed run has it all.

    The loss and the learning rate every few steps; after each validation (each epoch, where there is none) what validation
    logged, and under `psc/…`, which the Trainer's loggers get as well:

    * `psc/sparsity`: share of zeros among all entries of compressed tensors, 0 … 1;
    * `psc/strength/mask`, `…/levels`, `…/tying`: how hard these act, 0 … 1;
    * `psc/bytes`: what `save` would write: of a `ByteBudget` its estimate, else measured where at most a million entries
      are compressed;
    * `psc/price`: the loss a byte costs, of a `ByteBudget`.

    Args:
        every: optimizer steps between two points of the loss, 1 or more.
        leftovers, names, fold_batchnorm: what `save` will be given, for `psc/bytes`.
    """

    def __init__(
        self,
        every: int = 10,
        leftovers: Precisions = "float32",
        names: bool = True,
        fold_batchnorm: bool | Mapping[str, str] = False,
    ) -> None:
        self.every = whole("every", every, 1)
        self.writing: dict[str, Any] = {"leftovers": leftovers, "names": names, "fold_batchnorm": fold_batchnorm}
        self.series: dict[str, list[tuple[int, float]]] = {}
        self._seen = -1  # the step of the last look

    def state_dict(self) -> dict[str, Any]:
        """The points so far."""
        return {"series": self.series}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from these points."""
        self.series = {name: list(points) for name, points in state_dict["series"].items()}

    def save(self, place: Place) -> None:
        """Write `history.json`: by name the points, `[step, value]` each."""
        write_atomic(place, f"{json_text({'series': self.series}, indent=None)}\n".encode())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look anew."""
        self._seen = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss and the learning rates."""
        if trainer.global_step % self.every or trainer.global_step == self._last("train_loss"):
            return  # a step of several batches is noted once
        if isinstance(outputs, Mapping) and "loss" in outputs:
            self._note("train_loss", trainer, float(outputs["loss"]))
        for index, optimizer in enumerate(trainer.optimizers):
            name = "learning_rate" + (f"/{index}" if index else "")
            self._note(name, trainer, float(optimizer.param_groups[0]["lr"]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what validation logged, and how far compression is."""
        if not trainer.sanity_checking:
            self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same where there was no validation."""
        if trainer.global_step != self._seen:
            self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        self._seen = trainer.global_step
        for name, value in trainer.callback_metrics.items():
            if name.startswith("val") and value.numel() == 1:
                self._note(name, trainer, float(value))
        conductor = next((one for one in callbacks_of(trainer) if isinstance(one, Conductor)), None)
        if conductor is None or not trainer.is_global_zero:  # what other processes would find is the same
            return
        found = _compression(conductor.cast, module, self.writing)
        for name, number in found.items():
            self._note(name, trainer, number)
        for logger in trainer.loggers if found else ():
            logger.log_metrics(found, step=trainer.global_step)

    def _note(self, name: str, trainer: Trainer, value: float) -> None:
        self.series.setdefault(name, []).append((trainer.global_step, value))

    def _last(self, name: str) -> int:
        return self.series[name][-1][0] if self.series.get(name) else -1


def _compression(cast: Cast, module: LightningModule, writing: Mapping[str, Any]) -> dict[str, float]:
    """How far compression is, under the names that loggers see."""
    places = [place for place in cast.everywhere() if not is_sharded(place.parameter)]
    entries = sum(place.parameter.numel() for place in places)
    found: dict[str, float] = {}
    if entries:
        zeros = sum((place.parameter.numel() - place.parameter.count_nonzero()) for place in places)
        found["psc/sparsity"] = float(zeros) / entries
    for filler in cast.fillers:
        name = f"psc/strength/{filler.slot}"
        found[name] = max(found.get(name, 0.0), cast.reached.get(filler.state_key, 0.0))
    budget = next((one for one in cast.penalties if isinstance(one, ByteBudget)), None)
    if budget is not None:
        if math.isfinite(size := budget.size()) and size > 0:
            found["psc/bytes"] = size
        if budget.weight is not None:
            found["psc/price"] = budget.weight
    elif 0 < entries <= _MEASURED and len(places) == len(cast.everywhere()):
        found["psc/bytes"] = float(measure(module, **writing).file_bytes)
    return found
