"""The story of `python train.py compression=binary`: from a configuration to a verified small file.

`run` goes from top to bottom, and is an example of how the callbacks are used.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import psc_lightning
from psc_lightning.app.baseline import baseline, make_cache, read_checkpoint
from psc_lightning.app.build import (
    build_callbacks,
    build_data,
    build_logger,
    build_module,
    build_trainer,
    check_plan,
    check_settings,
    seed,
)
from psc_lightning.app.errors import UsageError, check_finite, explain
from psc_lightning.app.resume import ResumePoint, resumed
from psc_lightning.app.run_folder import Run
from psc_lightning.artifact import to_bytes
from psc_lightning.callbacks import ByteBudget
from psc_lightning.callbacks.presets import wanted
from psc_lightning.coarseness import AUTO, coarsest, told
from psc_lightning.oneshot import costly_masks
from psc_lightning.pages.general import general_size
from psc_lightning.pages.history import History
from psc_lightning.pages.run_page import write_run
from psc_lightning.report.notes import main_metric, notes_of, predictions
from psc_lightning.words import hint

__all__ = ["is_main", "run"]

log = logging.getLogger(__name__)

CALIBRATION_BATCHES = 16
#: of a file that loses nothing
WHOLE: dict[str, Any] = {"leftovers": "float32", "fold_batchnorm": False}
#: arguments of a Trainer beside the run's own: in this process alone, without a trace
ALONE = {"devices": 1, "num_nodes": 1, "strategy": "auto", "logger": False}
ALONE |= {"enable_checkpointing": False, "enable_progress_bar": False}


def run(cfg: DictConfig, folder: Path) -> float:
    """Fine-tune under a compression, write the file, test the file, report; return the objective.

    Args:
        cfg: what `conf/train.yaml` composes to.
        folder: of the run; what was begun there goes on if `cfg.resume` is set.

    Raises:
        UsageError: a setting is wrong, or training diverged.
    """
    this = Run(folder)
    if "resume" not in cfg:  # a run's own config.yaml, which has all but this
        OmegaConf.update(cfg, "resume", None, force_add=True)
    cfg = resumed(cfg, this)
    check_settings(cfg)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    if cfg.resume is not None and this.finished:
        log.info("%s is finished already", folder)
        return objective(cfg, json.loads(this.report.read_text()))
    callbacks = build_callbacks(cfg)
    data = build_data(cfg)
    fresh = build_module(cfg)
    check_plan(fresh, callbacks)
    given = None if cfg.model.checkpoint is None else read_checkpoint(Path(cfg.model.checkpoint).expanduser(), fresh)
    if given is not None:
        fresh.load_state_dict(given)
    history = History(**{key: value for key, value in asked(cfg).items() if value != AUTO})
    trainer = build_trainer(
        cfg,
        callbacks=[*callbacks, history, ResumePoint(this.checkpoints, cfg.checkpoint.every_n_steps)],
        logger=build_logger(cfg, folder),
        default_root_dir=folder,
    )
    if is_main():
        rehearse(cfg, fresh, data)
        if given is None:
            make_cache(cfg.cache)
        if cfg.resume is None:
            this.clear()  # not before: a wrong setting costs no older run
        this.begin(cfg, list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else [])
        log.info("run folder: %s", this.shown(folder))

    dense = baseline(cfg, fresh, data) if given is None else given
    metrics: dict[str, dict[str, float]] = {}
    if is_main():  # in a distributed run, the other processes only help to fit
        fresh.load_state_dict(dense)
        metrics, _ = before_training(cfg, fresh, data)
        this.note(dense_packed=general_size(dense))
        log.info("fine-tuning under compression=%s", cfg.compression.get("name"))

    module = build_module(cfg)
    module.load_state_dict(dense)
    seed(cfg)
    steered = next((callback for callback in callbacks if isinstance(callback, ByteBudget)), None)
    with processes():
        trainer.fit(module, datamodule=data, ckpt_path=this.checkpoint, weights_only=True)
        check_finite(module.state_dict(), "training diverged", "optimizer.lr")
        if cfg.batchnorm:
            settle(module, islice(data.train_dataloader(), cfg.batchnorm))
        file = this.model
        with warnings.catch_warnings():
            if not callbacks:  # then it was asked for
                warnings.filterwarnings("ignore", "save: nothing in this file")
            writing, why = how_to_write(cfg, module, data, steered)
            report = psc_lightning.save(module, file, **writing)
    if not is_main():
        return math.nan
    if steered is not None and report.file_bytes > steered.budget:
        file.replace(this.over_budget)
        file = this.over_budget

    reloaded = build_module(cfg)  # the reported numbers are the file's
    psc_lightning.load_into(reloaded, file)
    with predictions(reloaded) as predicted:
        metrics["compressed"] = evaluate(cfg, reloaded, data)
    check_finite({f"metrics.{name}": torch.tensor(value) for name, value in metrics["compressed"].items()}, "test", "")
    if (confusion := getattr(reloaded, "confusion", None)) is not None:
        this.note(confusion=confusion.compute().tolist())
    report.metrics = metrics
    report.stored_as = why
    report.notes = notes_of(metrics, predicted, tries(cfg, report)) + costly_masks(module, report.file_bytes, **writing)
    history.save(this.history)
    write_run(folder, report.to_dict(), dense, reloaded.state_dict(), file.name)
    report.save(this.report)
    with contextlib.suppress(BrokenPipeError):  # whoever listened has heard enough; the run is good
        print(report)
        print(f"file: {this.shown(file)} (psc_lightning.load_into(model, path) puts it into a plain model)")
    if steered is not None and file is this.over_budget:
        raise UsageError(
            f"compression.budget={cfg.compression.budget}: {file} has {report.file_bytes:,} bytes, {steered.budget:,} were "
            "allowed; give more epochs or a larger budget, or leave leftovers and fold_batchnorm at auto"
        )
    return objective(cfg, report.to_dict())


def rehearse(cfg: DictConfig, module: LightningModule, data: LightningDataModule) -> None:
    """Find with one batch what would fail later, when it has cost a dense baseline, or an older run in the same folder."""
    try:
        build_trainer(cfg, fast_dev_run=1, **ALONE).fit(copy.deepcopy(module), datamodule=data)
        metrics, compressed = before_training(cfg, copy.deepcopy(module), data, calibration=1, limit_test_batches=1)
    except (RuntimeError, IndexError) as error:  # what torch has for tensors that do not fit
        raise UsageError(f"model, data: a batch fails: {error} (HYDRA_FULL_ERROR=1 shows where)") from error
    objective(cfg, {"file_bytes": 0, "compression_ratio": 0, "metrics": {"compressed": metrics["dense"]}})
    with explain("leftovers, fold_batchnorm"):
        to_bytes(compressed, **(WHOLE | {key: value for key, value in asked(cfg).items() if value != AUTO}))


def before_training(
    cfg: DictConfig,
    dense: LightningModule,
    data: LightningDataModule,
    calibration: int = CALIBRATION_BATCHES,
    **limits: Any,
) -> tuple[dict[str, dict[str, float]], LightningModule]:
    """Return the metrics of the dense module, and of it compressed without training; and this one."""
    metrics = {"dense": evaluate(cfg, dense, data, **limits)}
    compressed = one_shot(cfg, dense, data, calibration)
    metrics["one_shot"] = evaluate(cfg, compressed, data, **limits)
    return metrics, compressed


def settle(module: LightningModule, batches: Iterable[Any]) -> None:
    """Take BatchNorm's statistics anew, now that the weights are final: their means over some training batches.

    Training leaves a running average of the last few batches, of weights that still moved; networks of few levels feel it.
    """
    with explain("batchnorm"):
        psc_lightning.refresh_batchnorm(module, batches)


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Let a distributed run be over at the end: one process alone tests the file; the next job of a sweep meets anew."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # none leaves while another still needs it
        torch.distributed.destroy_process_group()


def asked(cfg: DictConfig) -> dict[str, Any]:
    """Return the keywords of `save` as they are set."""
    return {key: to_plain(cfg, key) for key in (*WHOLE, "names")}


def how_to_write(
    cfg: DictConfig, module: LightningModule, data: LightningDataModule, steered: ByteBudget | None
) -> tuple[dict[str, Any], str]:
    """Return the keywords of `save`, with what is `auto` found on training batches, and what to say of it."""
    given = asked(cfg)
    if AUTO not in given.values():
        return given, ""
    exact = given | {key: value for key, value in WHOLE.items() if given[key] == AUTO}
    if not wanted(cfg.compression):
        return exact, ""
    if steered is not None:
        return given | steered.writing, f"{told(steered.writing)}, for the budget"
    seed(cfg)
    try:
        batches = list(islice(data.train_dataloader(), CALIBRATION_BATCHES))
        with untrained():
            found = coarsest(
                module, batches, step_loss, given["leftovers"], given["fold_batchnorm"], plain=build_module(cfg)
            )
    except Exception as error:  # the user's code; what has been trained is not to be lost for it
        return exact, f"{told(exact)}: the training step cannot be called by itself, for a loss ({error})"
    return given | found.writing, str(found)


@contextlib.contextmanager
def untrained() -> Iterator[None]:
    """Let a training step be called without a Trainer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"You are trying to `self\.log\(\)`")
        yield


def to_plain(cfg: DictConfig, key: str) -> Any:
    """A setting that is a value or a mapping, as Python has it."""
    return OmegaConf.to_container(cfg[key], resolve=True) if isinstance(cfg[key], DictConfig) else cfg[key]


def is_main() -> bool:
    """Whether this is the first process of a distributed run, or the only one."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def one_shot(cfg: DictConfig, dense: LightningModule, data: LightningDataModule, calibration: int) -> LightningModule:
    """Return a copy of the dense module, compressed without training, by labels of so many batches."""
    module = copy.deepcopy(dense)
    if not wanted(cfg.compression):
        return module
    seed(cfg)  # the same batches whether the baseline was trained just now or lay in the cache
    batches = list(islice(data.train_dataloader(), calibration))
    with explain("compression"), untrained():
        psc_lightning.compress(module, build_callbacks(cfg), batches=batches, loss=step_loss)
    return module


def step_loss(module: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a module's own training step."""
    assert isinstance(module, LightningModule)
    result = module.training_step(batch, 0)
    loss = result["loss"] if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor):
        raise UsageError(f"model: training_step gives {loss!r} instead of a loss when called by itself, for labels")
    return loss


def evaluate(cfg: DictConfig, module: LightningModule, data: LightningDataModule, **limits: Any) -> dict[str, float]:
    """Return the test metrics, without `test_` in front of their names; `limits` are arguments of the Trainer."""
    results = build_trainer(cfg, **ALONE, **limits).test(module, datamodule=data, verbose=False)
    return {
        name.removeprefix("test_").removeprefix("test/"): float(value)
        for result in results
        for name, value in result.items()
    }


def objective(cfg: DictConfig, report: Mapping[str, Any]) -> float:
    """Return what a sweeper is to see."""
    metrics = report["metrics"]["compressed"]
    values = {key: report[key] for key in ("file_bytes", "compression_ratio")} | metrics
    chosen = cfg.objective or main_metric(metrics) or "file_bytes"
    if chosen not in values:
        raise UsageError(f"objective={chosen}: not one of {', '.join(values)}{hint(chosen, values)}")
    return float(values[chosen])


def tries(cfg: DictConfig, report: psc_lightning.Report) -> list[str]:
    """Return what may help a run whose file is worse than its start."""
    found = [f"longer training (trainer.max_epochs is {cfg.trainer.max_epochs})"]
    if "mask" in cfg.compression.callbacks and cfg.compression.threshold:
        found.append(f"a lower compression.threshold (it is {cfg.compression.threshold})")
    if report.batchnorm_batches == 0:
        found.append("BatchNorm's statistics taken anew (compression.refresh_batchnorm=8, or batchnorm=64)")
    return [*found, "another preset"]
