"""The dense network that fine-tuning starts from: trained once, then shared by every run with the same setting."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from lightning import LightningModule
from torch import Tensor

from psc_lightning.files import write_atomic

__all__ = ["cached", "fingerprint", "make_cache"]

log = logging.getLogger(__name__)


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
    digest.update(json.dumps(facts, sort_keys=True).encode())
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
