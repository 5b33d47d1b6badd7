"""Reading a user's checkpoint, and writing those a run resumes from."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn

from psc_lightning.app.errors import UsageError
from psc_lightning.checkpoint import bare, read_tensors

__all__ = ["ResumePoint", "read_checkpoint"]


def read_checkpoint(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under the names of `module`'s state dict.

    Takes what `read_tensors` takes, and keys under `module.`, `model.` or `net.`. BatchNorm's `num_batches_tracked`, which
    old checkpoints lack, is taken from `module`.

    Raises:
        UsageError: no such file, not tensors, another architecture (the keys that differ are listed), a value that is not
            finite.
    """
    key = f"model.checkpoint={path}"
    try:
        content = read_tensors(path)
    except ValueError as error:
        raise UsageError(f"{key}: {error}") from error
    return match(content, module.state_dict(), key)


def match(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], key: str) -> dict[str, Tensor]:
    """Return the tensors of `found` under the names of `wanted`."""
    by_name = dict(zip(bare(found), found.values(), strict=True))
    state: dict[str, Tensor] = {}
    wrong: list[str] = []
    for name, plain in zip(wanted, bare(wanted), strict=True):
        value = by_name.pop(plain, None)
        if value is None and plain.endswith("num_batches_tracked"):
            value = wanted[name]
        if value is None:
            wrong.append(f"missing {plain}")
        elif value.shape != wanted[name].shape:
            wrong.append(f"{plain} is {tuple(value.shape)}, not {tuple(wanted[name].shape)}")
        else:
            state[name] = value
    wrong += [f"unexpected {plain}" for plain in by_name]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise UsageError(
            f"{key}: another architecture than the model: {'; '.join(wrong[:6])}{more}; "
            "give a checkpoint of this model, or choose the model it is of (model=…)"
        )
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise UsageError(f"{key}: NaN or infinity in {', '.join(broken)}; give one from before training diverged")
    return state


class ResumePoint(Checkpoint):
    """Save everything that a run needs to go on bit-equal after a crash: one file, replaced as a whole.

    Lightning's checkpoint holds model, optimizer, schedule, loop counters, the callbacks' and the loader's state; this adds
    the states of Python's, NumPy's and torch's random number generators.

    Args:
        folder: where `last.ckpt` goes.
        every_n_steps: optimizer steps between two saves, 1 or more; each epoch's end is saved, too.

    Raises:
        ValueError: `every_n_steps` is below 1.
    """

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be 1 or more, not {every_n_steps}")
        self.path = folder / "last.ckpt"
        self.every_n_steps = every_n_steps
        self._saved = 0
        self._random: dict[str, Any] | None = None
        self._loaders: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the generators' states, of types that load with `weights_only=True`."""
        name, keys, *rest = np.random.get_state(legacy=True)
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), *rest],
            "python": random.getstate(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training goes on."""
        self._random = state_dict

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the loader's position until training goes on."""
        self._loaders = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the loader back.

        Lightning does so itself, but not where the loader was built before the loops were restored, that is, where
        `configure_optimizers` asks for the number of steps.
        """
        self._saved = trainer.global_step
        states, self._loaders = self._loaders, []
        loader: Any = trainer.train_dataloader
        if len(states) == 1 and hasattr(loader, "load_state_dict"):
            loader.load_state_dict(states[0])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the generators back before the first batch after a resume (setting a run up may have drawn from them)."""
        if self._random is not None:
            state, self._random = self._random, None
            torch.set_rng_state(state["torch"].cpu())
            if state["cuda"]:
                torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
            name, keys, *rest = state["numpy"]
            np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
            version, numbers, gauss = state["python"]
            random.setstate((version, tuple(numbers), gauss))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save in mid-epoch, between two optimizer steps."""
        due = trainer.global_step >= self._saved + self.every_n_steps
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches != 0
        if due and not accumulating and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch, after its validation."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        part = self.path.with_name(f".{self.path.name}.part")
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            os.replace(part, self.path)
        self._saved = trainer.global_step
