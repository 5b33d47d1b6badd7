"""How a run goes on where it stopped: what it saves on the way, and which configuration goes on."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import DictConfig, OmegaConf

from psc_lightning.app.errors import UsageError
from psc_lightning.app.run_folder import Run

__all__ = ["ResumePoint", "resumed"]

log = logging.getLogger(__name__)


def resumed(cfg: DictConfig, this: Run) -> DictConfig:
    """Return the configuration to run: the run's own where `resume` is all that was said."""
    if cfg.resume is None:
        return cfg
    named = this.folder if cfg.resume == "auto" else Path(str(cfg.resume)).resolve()
    if named not in (this.folder, this.folder.resolve(), this.folder.resolve().parent):  # the parent: a multirun
        raise UsageError(f"resume={cfg.resume}: no run there, or hydra.run.dir names another folder ({this.folder})")
    if not this.config.is_file():
        log.info("resume=%s: nothing to go on with, starting in %s", cfg.resume, this.folder)
        return cfg
    if HydraConfig.initialized() and list(HydraConfig.get().overrides.task) == [f"resume={cfg.resume}"]:
        written = OmegaConf.merge(OmegaConf.load(this.config), {"resume": cfg.resume})
        assert isinstance(written, DictConfig)
        cfg = written
    if different := this.differences(cfg):
        raise UsageError(f"resume={cfg.resume}: the run in {this.folder} has other values of {', '.join(different)}")
    log.info("resuming %s", this.folder)
    return cfg


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
