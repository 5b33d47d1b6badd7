"""The dense weights that fine-tuning starts from: a user's checkpoint, or a network trained once.

The latter is shared by every run with the same setting.
"""

from __future__ import annotations

import hashlib
import io
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from psc_lightning.app.build import build_module, build_trainer, seed
from psc_lightning.app.errors import UsageError, check_finite
from psc_lightning.app.resume import ResumePoint
from psc_lightning.checkpoint import matched, read_tensors
from psc_lightning.files import write_atomic
from psc_lightning.strict_json import json_text

__all__ = ["baseline", "cached", "fingerprint", "make_cache", "read_checkpoint"]

log = logging.getLogger(__name__)


def read_checkpoint(path: Path, module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under the names of `module`'s state dict.

    Takes what `read_tensors` takes, and keys under `module.`, `model.` or `net.`. BatchNorm's `num_batches_tracked`, which
    old checkpoints lack, is taken from `module`.

    Raises:
        UsageError: no such file, not tensors, another architecture (the keys that differ are listed), a value that is not
            finite.
    """
    try:
        return matched(read_tensors(path), module.state_dict())
    except ValueError as error:
        raise UsageError(f"model.checkpoint={path}: {error}") from error


def fingerprint(settings: Mapping[str, Any], module: LightningModule) -> str:
    """Return a name for what determines a baseline.

    That is: the settings, the start (names, shapes and values of a freshly built module), the versions of torch and
    Lightning, and the number of threads, on which the last bits of a sum depend.
    """
    digest = hashlib.sha256()
    facts = {
        **settings,
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "threads": torch.get_num_threads(),
    }
    digest.update(json_text(facts, indent=None, sort_keys=True).encode())
    for name, value in module.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


def make_cache(root: str) -> Path:
    """Make the folder of baselines in a cache, if it is not there, and return it.

    Raises:
        OSError: it cannot be made, or nothing can be written to it.
    """
    folder = Path(root).expanduser() / "baselines"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    return folder


def cached(folder: Path, key: str, train: Callable[[Path], LightningModule]) -> dict[str, Tensor]:
    """Return the baseline named `key` from the cache, training it first if it is not there.

    Args:
        folder: see `make_cache`.
        key: see `fingerprint`.
        train: trains the baseline; gets a folder for what an interrupted training resumes from. While it runs, other
            processes that want the same baseline wait.
    """
    path = folder / f"{key}.pt"
    with FileLock(folder / f"{key}.lock"):
        if path.is_file():
            log.info("dense baseline: %s", path)
        else:
            log.info("dense baseline: training it once, for all runs with this setting")
            work = folder / key
            work.mkdir(exist_ok=True)
            buffer = io.BytesIO()
            torch.save(train(work).state_dict(), buffer)
            write_atomic(path, buffer.getvalue())
            shutil.rmtree(work, ignore_errors=True)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def baseline(cfg: DictConfig, fresh: LightningModule, data: LightningDataModule) -> dict[str, Tensor]:
    """Return the dense weights that fine-tuning starts from where no checkpoint gives them, trained once."""

    def train(work: Path) -> LightningModule:
        module = build_module(cfg, lr=cfg.baseline.lr)
        trainer = build_trainer(
            cfg,
            max_epochs=cfg.baseline.max_epochs,
            max_steps=-1,
            devices=1,
            num_nodes=1,
            strategy="auto",
            callbacks=[resume := ResumePoint(work, cfg.checkpoint.every_n_steps)],
            logger=False,
            default_root_dir=work,
        )
        seed(cfg)
        begun = resume.path if resume.path.is_file() else None
        trainer.fit(module, datamodule=data, ckpt_path=begun, weights_only=True)
        check_finite(module.state_dict(), "the dense baseline diverged", "baseline.lr")
        return module

    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    chosen: dict[str, Any] = {str(key): settings[key] for key in ("model", "data", "optimizer", "baseline", "seed")}
    of_fine_tuning = ("max_epochs", "max_steps", "devices", "num_nodes", "strategy", "enable_progress_bar")
    chosen["trainer"] = {key: value for key, value in settings["trainer"].items() if key not in of_fine_tuning}
    chosen["optimizer"] = chosen["optimizer"] | {"lr": None}
    return cached(make_cache(cfg.cache), fingerprint(chosen, fresh), train)
