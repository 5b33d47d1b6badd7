"""Run folders: their names, what they hold, and which one a resumed command goes on in."""

from __future__ import annotations

import inspect
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from psc_lightning.app.errors import UsageError
from psc_lightning.files import write_atomic
from psc_lightning.strict_json import json_text

__all__ = ["Run", "register_resolvers"]

PACKAGES = ("torch", "lightning", "hydra-core", "numpy")


class Run:
    """One run's folder: exactly Hydra's run directory.

    Args:
        folder: of the run; made if missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model.psc"
        self.over_budget = folder / "model.over-budget.psc"
        self.report = folder / "report.json"
        self.config = folder / "config.yaml"
        self.record = folder / "run.json"
        self.checkpoints = folder / "checkpoints"
        self.page = folder / "report.html"
        self.history = folder / "history.json"

    @staticmethod
    def shown(path: Path) -> str:
        """A path as a user would type it: from the working directory, where it lies below."""
        here = Path.cwd()
        return str(path.relative_to(here)) if here in path.parents else str(path)

    @property
    def finished(self) -> bool:
        """Whether the report, the last thing a run writes, is there."""
        return self.report.is_file()

    @property
    def checkpoint(self) -> Path | None:
        """The file to resume from, if one was written."""
        path = self.checkpoints / "last.ckpt"
        return path if path.is_file() else None

    def differences(self, cfg: DictConfig) -> list[str]:
        """Return the keys in which `cfg` differs from the configuration the run was started with."""
        if not self.config.is_file():
            return ["config.yaml is missing"]
        before, now = flat(OmegaConf.load(self.config)), flat(cfg)
        return sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))

    def begin(self, cfg: DictConfig, overrides: list[str]) -> None:
        """Write config.yaml (resolved) and run.json."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_atomic(self.config, OmegaConf.to_yaml(plain(cfg), resolve=True).encode())
        self.note(
            status="unfinished",
            overrides=overrides,
            command=shlex.join(sys.argv),
            seed=cfg.seed,
            objective=cfg.objective,
            versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            git=git_state(),
        )

    def clear(self) -> None:
        """Delete what says that an older run in this folder is finished, and where it stood."""
        for path in (self.report, self.page, self.history):
            path.unlink(missing_ok=True)
        self.over_budget.unlink(missing_ok=True)
        (self.checkpoints / "last.ckpt").unlink(missing_ok=True)

    def note(self, **entries: Any) -> None:
        """Add entries to run.json."""
        record = json.loads(self.record.read_text()) if self.record.is_file() else {}
        write_atomic(self.record, f"{json_text(record | entries)}\n".encode())


def plain(cfg: DictConfig) -> DictConfig:
    """Return the configuration without `resume`: what determines a run, however often it is interrupted."""
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in ("resume", "hydra")])


def flat(cfg: Any) -> dict[str, Any]:
    """Return a configuration's values by dotted key, without `resume`."""
    values: dict[str, Any] = {}

    def walk(node: Any, key: str) -> None:
        children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
        if not children:  # an empty mapping or list is a value, too
            values[key] = node
            return
        for name, child in children:
            walk(child, f"{key}.{name}" if key else str(name))

    walk(OmegaConf.to_container(plain(cfg), resolve=True), "")
    return values


def git_state() -> dict[str, Any] | None:
    """Return commit and cleanness of the repository around the working directory, None outside of one."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "clean": not status.strip()}


def unique_name() -> str:
    """Return a name no other run has: time to the microsecond, and process."""
    return f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}_{os.getpid()}"


def run_dir(root: str, *, _root_: DictConfig) -> str:
    """Return the folder a run works in: a new one below `root`, or the one that `resume` names or finds.

    Raises:
        UsageError: `resume` names a folder that holds no run.
    """
    if chosen := OmegaConf.select(_root_, "hydra.runtime.output_dir"):
        return str(chosen)
    resume = _root_.get("resume")
    if resume is None or resume == "auto":
        found = (Run(folder) for folder in newest_first(Path(root)) if resume)
        same = (str(run.folder) for run in found if not run.finished and not run.differences(_root_))
        return next(same, None) or str(Path(root) / unique_name())
    if not Run(Path(str(resume))).config.is_file():
        raise UsageError(f"resume={resume}: no run there (no config.yaml); give a run's folder, or auto")
    return str(resume)


def sweep_dir(root: str, *, _root_: DictConfig) -> str:
    """Return the folder of a multirun: a new one below `root`, or the one of the same command that `resume` names or finds.

    Raises:
        UsageError: `resume` names a folder that holds no multirun of this command.
    """
    resume = _root_.get("resume")
    if resume is not None:
        wanted = said(_root_)
        for folder in newest_first(Path(root)) if resume == "auto" else [Path(str(resume))]:
            path = folder / "multirun.yaml"
            if path.is_file() and said(OmegaConf.load(path)) == wanted:
                return str(folder)
        if resume != "auto":
            raise UsageError(f"resume={resume}: not the folder of a multirun with these overrides")
    return str(Path(root) / unique_name())


def said(cfg: Any) -> list[str]:
    """Return the overrides of a command, without `resume`."""
    return sorted(one for one in cfg.hydra.overrides.task if not one.startswith("resume="))


def newest_first(root: Path) -> list[Path]:
    """Return the folders in `root`, the newest name first."""
    return sorted((path for path in root.iterdir() if path.is_dir()), reverse=True) if root.is_dir() else []


def register_resolvers() -> None:
    """Make `${run_dir:ROOT}` and `${sweep_dir:ROOT}` known to OmegaConf."""
    register: Any = OmegaConf.register_resolver  # its name from OmegaConf 2.4 on; before, that was an older function
    if "replace" not in inspect.signature(register).parameters:
        register = OmegaConf.register_new_resolver
    for resolver in (run_dir, sweep_dir):
        register(resolver.__name__, once(resolver), replace=True)


def once(resolver: Callable[..., str]) -> Callable[..., str]:
    """Let a resolver keep its first answer for a composed configuration; Hydra hands these answers from sweep to job."""

    def answer(root: str, *, _root_: DictConfig) -> str:
        cache = OmegaConf.get_cache(_root_)[resolver.__name__]
        if root not in cache:
            cache[root] = resolver(root, _root_=_root_)
        return str(cache[root])

    return answer
