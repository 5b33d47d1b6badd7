"""What clipping measures reaches whatever logger a user has; a run under each leaves a model that is its file."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import loggers
from training import COMBINATIONS, QUIET, Net, fit

from psc_lightning import GradientClipping
from psc_lightning.artifact import to_bytes

pytestmark = QUIET


def needs(package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is an optional logger; the zoo's environment has it")


def tensorboard(folder: Path) -> Any:
    needs("tensorboard")
    return loggers.TensorBoardLogger(folder)


def mlflow(folder: Path) -> Any:
    needs("mlflow")
    return loggers.MLFlowLogger(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


def wandb(folder: Path) -> Any:
    needs("wandb")
    return loggers.WandbLogger(save_dir=folder, mode="offline")


LOGGERS = {"csv": loggers.CSVLogger, "tensorboard": tensorboard, "mlflow": mlflow, "wandb": wandb}


@pytest.mark.parametrize("name", LOGGERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the loggers' own packages
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_run_under_a_logger(name, tmp_path):
    plain, _ = fit([*COMBINATIONS["float"]("constant"), GradientClipping(max_norm=0.1)], Net("sgd"))
    logger = LOGGERS[name](tmp_path)
    seen: dict[str, float] = {}
    log = logger.log_metrics
    logger.log_metrics = lambda metrics, step=None: (seen.update(metrics), log(metrics, step))
    callbacks = [*COMBINATIONS["float"]("constant"), GradientClipping(max_norm=0.1)]
    model, _ = fit(callbacks, Net("sgd"), logger=logger, log_every_n_steps=4)
    assert any("clip" in key or "grad" in key for key in seen), seen
    assert to_bytes(model)[0] == to_bytes(plain)[0]  # a logger moves nothing
    if name == "wandb":
        importlib.import_module("wandb").finish()
    if name == "csv":
        (path,) = tmp_path.rglob("metrics.csv")
        with path.open() as lines:
            assert any("grad" in column or "clip" in column for column in csv.DictReader(lines).fieldnames or ())
