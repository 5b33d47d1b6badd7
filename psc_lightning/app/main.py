"""The command line of `train.py` and `psc-train`: Hydra's entry, one job of it, and how its errors are reported."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import hydra.utils
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from psc_lightning.app.errors import UsageError, one_line
from psc_lightning.app.run import is_main, run
from psc_lightning.app.run_folder import Run, register_resolvers
from psc_lightning.app.sweep import SweepFolder, summarise
from psc_lightning.configs import config_dir, quoted
from psc_lightning.terminal import closed_pipes

__all__ = ["main"]

log = logging.getLogger(__name__)


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
    if "" not in sys.path:
        sys.path.insert(0, "")  # as `python -m` does: `_target_=mine.Net` from the folder that the command is given in
    try:
        result = run(cfg, folder)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        if discard(this, hydra_config):
            sys.exit(130)
        resume = f"resume={shlex.quote(str(folder))}"
        print(f"stopped; to go on, repeat the command with {resume} or resume=auto", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = one_line(error)
        overrides = list(hydra_config.overrides.task)
        with contextlib.suppress(OSError):  # where the folder itself is what is wrong
            # What is finished is an older run's, and left alone.
            if not discard(this, hydra_config) and (hydra_config.mode == RunMode.MULTIRUN or not this.finished):
                this.note(status="failed", overrides=overrides, error=message or f"{type(error).__name__}: {error}")
        if hydra_config.mode == RunMode.MULTIRUN:
            log.error(message or "the job failed", exc_info=None if message and not full else error)
        elif message and not full:
            sys.exit(message)  # an exception would pass through Hydra, which adds a line of its own
        raise
    if is_main():
        this.note(status="completed")
    return result


def discard(this: Run, hydra_config: Any) -> bool:
    """Remove what Hydra put into the folder of a run that has not begun, and the folder where nothing else is in it.

    Returns:
        Whether that was so; of a multirun's jobs the folders stay, which the table tells of.
    """
    if this.config.is_file() or hydra_config.mode == RunMode.MULTIRUN:
        return False
    if is_main():
        hydra_folder = this.folder / str(hydra_config.output_subdir)
        theirs = [*(hydra_folder / f"{name}.yaml" for name in ("config", "hydra", "overrides"))]
        for path in [*theirs, this.folder / f"{hydra_config.job.name}.log"]:
            with contextlib.suppress(OSError):
                path.unlink()
        with contextlib.suppress(OSError):  # not empty: something of the user's is in it
            for folder in (hydra_folder, this.folder, this.folder.parent):
                if Path.cwd() in folder.absolute().parents:
                    folder.rmdir()
    return True


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


AGAIN = "--rerun"


def again(given: list[str]) -> tuple[Run, Run, list[str]]:
    """Return the run that is to be repeated, where that will be, and the arguments that do it.

    Raises:
        UsageError: there is no finished run, or other words on the command line.
    """
    place, *more = given[given.index(AGAIN) + 1 :] or [""]
    first = Run(Path(place))
    if more or given[0] != AGAIN or not (first.finished and first.record.is_file()):
        raise UsageError(
            f"{AGAIN}: expected the folder of a finished run, and nothing else, found {shlex.join(given)!r}"
        )
    second = Run(first.folder.absolute().with_name(f"{first.folder.absolute().name}-rerun"))
    overrides = [one for one in json.loads(first.record.read_text())["overrides"] if not one.startswith("resume=")]
    return first, second, [*overrides, f"hydra.run.dir={quoted(second.folder)}"]


def compare(first: Run, second: Run) -> int:
    """Say whether two runs gave the same file, and if not, what else differs; the exit status: 0 the same, 1 another."""
    runs = [(json.loads(run.record.read_text()), json.loads(run.report.read_text())) for run in (first, second)]
    (before, old), (now, new) = runs
    if old["sha256"] == new["sha256"]:
        print(f"the same file, byte for byte: sha256 {new['sha256']}")
        return 0
    facts = [{**record["versions"], "git": (record.get("git") or {}).get("commit")} for record in (before, now)]
    others = [
        f"{key} {facts[0].get(key)} then, {value} now" for key, value in facts[1].items() if facts[0].get(key) != value
    ]
    why = "; ".join(others) or "no version does: the machine, its number of threads, the data or the code may"
    print(f"another file: sha256 {old['sha256']} then, {new['sha256']} now. What differs: {why}", file=sys.stderr)
    return 1


@closed_pipes()
def main() -> None:
    """Run the command line; a mendable error is one line (HYDRA_FULL_ERROR=1 shows where it came from)."""
    runs: tuple[Run, Run] | None = None
    if AGAIN in sys.argv:
        try:
            first, second, sys.argv[1:] = again(sys.argv[1:])
            runs = first, second
        except UsageError as error:
            sys.exit(f"error: {error}")
    before = os.environ.get("HYDRA_FULL_ERROR", "0")
    full = before == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands errors on instead of printing them
    try:
        application(full)()
        if runs is not None and is_main():
            sys.exit(compare(*runs))
    except Exception as error:
        message = one_line(error)
        if full or message is None:
            raise
        sys.exit(message)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before
        if SweepFolder.current is not None and is_main():
            summarise(SweepFolder.current)
