"""`python train.py compression=binary`, installed as `psc-train`: from a configuration to a verified small file.

`run` is the whole story from top to bottom, and an example of how the callbacks are used.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import logging
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
import hydra.utils
import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import psc_lightning
from psc_lightning.app.baseline import cached, fingerprint, make_cache
from psc_lightning.app.checkpoint import ResumePoint, read_checkpoint
from psc_lightning.app.errors import UsageError, explain, one_line
from psc_lightning.app.runs import Run, register_resolvers
from psc_lightning.app.settings import check_settings
from psc_lightning.app.sweep import SweepFolder, summarise
from psc_lightning.app.task import Classifier
from psc_lightning.artifact import to_bytes
from psc_lightning.configs import config_dir
from psc_lightning.report.plots import Curve, draw

__all__ = ["main", "run"]

log = logging.getLogger(__name__)

CALIBRATION_BATCHES = 16
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
    writing = {key: to_plain(cfg, key) for key in ("leftovers", "fold_batchnorm")}
    callbacks = build_callbacks(cfg)
    data = build_data(cfg)
    fresh = build_module(cfg)
    check_plan(fresh, callbacks)
    given = None if cfg.model.checkpoint is None else read_checkpoint(Path(cfg.model.checkpoint).expanduser(), fresh)
    if given is not None:
        fresh.load_state_dict(given)
    curve = Curve()
    trainer = build_trainer(
        cfg,
        callbacks=[*callbacks, curve, ResumePoint(this.checkpoints, cfg.checkpoint.every_n_steps)],
        logger=build_logger(cfg, folder),
        default_root_dir=folder,
    )
    if is_main():
        rehearse(cfg, fresh, data, writing)
        if given is None:
            make_cache(cfg.cache)
        if cfg.resume is None:
            this.clear()  # not before: a wrong setting costs no older run
        this.begin(cfg, list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else [])

    dense = baseline(cfg, fresh, data) if given is None else given
    metrics: dict[str, dict[str, float]] = {}
    if is_main():  # in a distributed run, the other processes only help to fit
        fresh.load_state_dict(dense)
        metrics, _ = before_training(cfg, fresh, data)

    module = build_module(cfg)
    module.load_state_dict(dense)
    seed(cfg)
    with processes():
        trainer.fit(module, datamodule=data, ckpt_path=this.checkpoint, weights_only=True)
        check_finite(module.state_dict(), "training diverged", "optimizer.lr")
        if cfg.batchnorm:
            settle(module, islice(data.train_dataloader(), cfg.batchnorm))
        report = psc_lightning.save(module, this.model, **writing)
    if not is_main():
        return math.nan

    reloaded = build_module(cfg)  # the reported numbers are the file's
    psc_lightning.load_into(reloaded, this.model)
    metrics["compressed"] = evaluate(cfg, reloaded, data)
    check_finite({f"metrics.{name}": torch.tensor(value) for name, value in metrics["compressed"].items()}, "test", "")
    report.metrics = metrics
    draw(report, curve, this.plots)
    report.save(this.report)
    print(report)
    return objective(cfg, report.to_dict())


def rehearse(cfg: DictConfig, module: LightningModule, data: LightningDataModule, writing: Mapping[str, Any]) -> None:
    """Find with one batch what would fail later, when it has cost a dense baseline, or an older run in the same folder."""
    try:
        build_trainer(cfg, fast_dev_run=1, **ALONE).fit(copy.deepcopy(module), datamodule=data)
        metrics, compressed = before_training(cfg, copy.deepcopy(module), data, calibration=1, limit_test_batches=1)
    except (RuntimeError, IndexError) as error:  # what torch has for tensors that do not fit
        raise UsageError(f"model, data: a batch fails: {error} (HYDRA_FULL_ERROR=1 shows where)") from error
    objective(cfg, {"file_bytes": 0, "compression_ratio": 0, "metrics": {"compressed": metrics["dense"]}})
    with explain("leftovers, fold_batchnorm"):
        to_bytes(compressed, **writing)


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
        update_bn(batches, module)


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Let a distributed run be over at the end: one process alone tests the file; the next job of a sweep meets anew."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # none leaves while another still needs it
        torch.distributed.destroy_process_group()


def to_plain(cfg: DictConfig, key: str) -> Any:
    """A setting that is a value or a mapping, as Python has it."""
    return OmegaConf.to_container(cfg[key], resolve=True) if isinstance(cfg[key], DictConfig) else cfg[key]


def is_main() -> bool:
    """Whether this is the first process of a distributed run, or the only one."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0


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


def build_callbacks(cfg: DictConfig) -> list[Callback]:
    """Return the callbacks of the preset, of the clipping, and the user's own."""
    nodes = {f"compression.callbacks.{name}": node for name, node in cfg.compression.callbacks.items()}
    if cfg.clipping:
        nodes["clipping"] = cfg.clipping
    nodes |= {f"callbacks.{name}": node for name, node in cfg.callbacks.items()}
    if "mask" not in cfg.compression.callbacks and cfg.compression.get("threshold"):
        log.info("compression has no mask, and ignores compression.threshold=%s", cfg.compression.threshold)
    return [build(node, key) for key, node in nodes.items()]


def build_data(cfg: DictConfig) -> LightningDataModule:
    """Return the data, read."""
    data = build(cfg.data, "data")
    if not isinstance(data, LightningDataModule):
        raise UsageError(f"data._target_: {cfg.data._target_} gives a {type(data).__name__}, not a LightningDataModule")
    data.prepare_data()
    data.setup("fit")
    return data


def build_module(cfg: DictConfig, **optimizer: Any) -> LightningModule:
    """Return a freshly initialised module: the user's LightningModule, or a `Classifier` around the user's network."""
    seed(cfg)
    net = build(cfg.model.net, "model.net")
    if isinstance(net, LightningModule):
        return net
    if not isinstance(net, nn.Module):
        raise UsageError(f"model.net._target_: {cfg.model.net._target_} gives a {type(net).__name__}, not an nn.Module")
    make = build(cfg.optimizer, "optimizer", **optimizer)
    with explain("optimizer"):
        make([nn.Parameter(torch.zeros(1))])  # a wrong value shows now, not after the data are read
    with explain("model"):
        return Classifier(net, make, cfg.model.classes, cfg.model.decay, cfg.model.channels_last)


def build_trainer(cfg: DictConfig, **settings: Any) -> Trainer:
    """Return a Trainer with the configuration's arguments, overridden by `settings`."""
    if settings.get("enable_progress_bar", cfg.trainer.enable_progress_bar) is None:
        settings["enable_progress_bar"] = sys.stderr.isatty()
    make = build(cfg.trainer, "trainer", _partial_=True)
    with explain("trainer"):
        try:
            trainer: Trainer = make(**settings)
        except lightning.fabric.utilities.exceptions.MisconfigurationException as error:
            raise UsageError(f"trainer: {error}") from error
    if trainer.world_size > 1 and HydraConfig.initialized():
        check_sweeper(HydraConfig.get())
    return trainer


def build_logger(cfg: DictConfig, folder: Path) -> Any:
    """Return the logger, or False for none."""
    return build(cfg.logger, "logger", save_dir=str(folder)) if cfg.logger else False


def build(node: DictConfig, key: str, **settings: Any) -> Any:
    """Instantiate one node of the configuration, as plain Python values; its errors name `key`."""
    with explain(key):
        return instantiate(node, _convert_="all", **settings)


def seed(cfg: DictConfig) -> None:
    """Seed Python, NumPy and torch."""
    lightning.seed_everything(cfg.seed, verbose=False)


def check_plan(module: LightningModule, callbacks: list[Callback]) -> None:
    """Find wrong targets before time is spent on training (a module that builds its layers later is checked in fit)."""
    if next(module.parameters(), None) is not None:
        with explain("compression"):
            psc_lightning.plan(module, callbacks)


def check_sweeper(config: Any) -> None:
    """Refuse a sweeper that chooses as it goes in a distributed run: each process would train something else, silently."""
    basic = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
    if config.mode == RunMode.MULTIRUN and config.sweeper._target_ != basic:
        raise UsageError(
            f"hydra/sweeper: {config.sweeper._target_} with more than one process (trainer.devices, trainer.num_nodes) would "
            "give each process other values; use hydra/sweeper=basic or trainer.devices=1"
        )


def check_finite(state: Mapping[str, Tensor], what: str, key: str) -> None:
    """Raise for NaN and infinity."""
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        hint = f"; a lower {key} may help" if key else ""
        raise UsageError(f"{what}: NaN or infinity in {', '.join(broken[:3])}{' and more' * (len(broken) > 3)}{hint}")


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


def one_shot(cfg: DictConfig, dense: LightningModule, data: LightningDataModule, calibration: int) -> LightningModule:
    """Return a copy of the dense module, compressed without training, by labels of so many batches."""
    module = copy.deepcopy(dense)
    if not cfg.compression.callbacks:
        return module
    seed(cfg)  # the same batches whether the baseline was trained just now or lay in the cache
    batches = list(islice(data.train_dataloader(), calibration))
    with explain("compression"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"You are trying to `self\.log\(\)`")  # a training step without a Trainer
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
    values = {key: report[key] for key in ("file_bytes", "compression_ratio")} | report["metrics"]["compressed"]
    if cfg.objective not in values:
        raise UsageError(f"objective={cfg.objective}: not one of {', '.join(values)}")
    return float(values[cfg.objective])


def job(cfg: DictConfig, full: bool) -> float:
    """Run one job of Hydra's, and note in run.json how it ended.

    Args:
        cfg: of the job.
        full: whether the user asked for tracebacks.
    """
    quiet()
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    this = Run(folder)
    try:
        result = run(cfg, folder)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        resume = f"resume={shlex.quote(str(folder))}"
        print(f"stopped; to go on, repeat the command with {resume} or resume=auto", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = one_line(error)
        overrides = list(hydra_config.overrides.task)
        with contextlib.suppress(OSError):  # where the folder itself is what is wrong
            if hydra_config.mode == RunMode.MULTIRUN or not this.finished:  # else it is an older run's, left alone
                this.note(status="failed", overrides=overrides, error=message or f"{type(error).__name__}: {error}")
        if hydra_config.mode == RunMode.MULTIRUN:
            log.error(message or "the job failed", exc_info=None if message and not full else error)
        elif message and not full:
            sys.exit(message)  # an exception would pass through Hydra, which adds a line of its own
        raise
    if is_main():
        this.note(status="completed")
    return result


def quiet() -> None:
    """Leave out what Lightning says of itself; anything about the user's run stays."""
    # One speaks for both, once a user's module imports the other.
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).* is deprecated")  # its own use of torch
    warnings.filterwarnings("ignore", r"The '\w+_dataloader' does not have many workers")  # batches come from memory
    warnings.filterwarnings("ignore", r"Total length of `list` across ranks is zero")  # data.validation=0
    warnings.filterwarnings("ignore", r"Checkpoint directory .* exists and is not empty")  # a resumed run's


def application(full: bool) -> Callable[[], None]:
    """Return `job` under Hydra's command line."""
    register_resolvers()
    settings: dict[str, Any] = {"version_base": None}
    if "execution_whitelist" in inspect.signature(hydra.main).parameters:
        # Hydra 1.4 asks which targets a configuration may name. Here it is the user's own: to name any class is its point.
        settings = {"execution_whitelist": vars(hydra.utils)["UNSAFE_DISABLE_EXECUTION_CHECKS"]}

    @hydra.main(config_path=str(config_dir()), config_name="train", **settings)
    def train(cfg: DictConfig) -> float:
        return job(cfg, full)

    command: Callable[[], None] = train  # Hydra's decorator is untyped
    return command


def main() -> None:
    """Run the command line; a mendable error is one line (HYDRA_FULL_ERROR=1 shows where it came from)."""
    full = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of printing them
    try:
        application(full)()
    except Exception as error:
        message = one_line(error)
        if full or message is None:
            raise
        sys.exit(message)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if SweepFolder.current is not None and is_main():
            summarise(SweepFolder.current)
