"""A multirun: which sweepers it may have, and what it leaves behind, one table on the terminal and sweep.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from psc_lightning.app.errors import UsageError
from psc_lightning.app.run_folder import Run
from psc_lightning.files import write_atomic
from psc_lightning.report.notes import main_metric
from psc_lightning.strict_json import json_text

__all__ = ["SweepFolder", "check_sweeper", "summarise"]


class SweepFolder(Callback):
    """Tell `main` where a multirun went. (Hydra does not call `on_multirun_end` when a job failed.)"""

    current: ClassVar[Path | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember the folder."""
        SweepFolder.current = Path(config.hydra.sweep.dir).absolute()


def summarise(folder: Path) -> list[dict[str, Any]]:
    """Write `sweep.json`, print the table, and return the jobs: those that left a run.json in a folder of `folder`."""
    jobs = [entry(Run(path.parent)) for path in sorted(folder.glob("*/run.json"), key=job_order)]
    if jobs:
        write_atomic(folder / "sweep.json", f"{json_text({'jobs': jobs})}\n".encode())
        console = Console()
        console.width = console.width if console.is_terminal else 120
        console.print(table(jobs))
        for job in jobs:
            for said in [*job["notes"], *([job["error"]] if "error" in job else [])]:
                console.print(f"job {Path(job['run_dir']).name}: {said}", markup=False, highlight=False, soft_wrap=True)
    return jobs


def job_order(path: Path) -> tuple[int, str]:
    """Return what sorts Hydra's job folders: 2 before 10."""
    name = path.parent.name
    return int(name) if name.isdecimal() else -1, name


def entry(run: Run) -> dict[str, Any]:
    """Return one job's entry of sweep.json."""
    record = json.loads(run.record.read_text())
    report = json.loads(run.report.read_text()) if run.finished else {}
    job = {"overrides": record["overrides"], "run_dir": str(run.folder), "status": record["status"]}
    job |= {key: report.get(key) for key in ("file_bytes", "compression_ratio", "metrics")}
    config = OmegaConf.load(run.config) if run.config.is_file() else None
    job |= {"objective": OmegaConf.select(config, "objective") if config else None, "notes": report.get("notes", [])}
    return job | ({"error": record["error"]} if "error" in record else {})


def table(jobs: list[dict[str, Any]]) -> Table:
    """Return the jobs as a table: what was said of each and not of all, its size, and a metric of its three models."""
    names = {name: None for job in jobs for name in (job["metrics"] or {}).get("compressed", {})}
    metric = main_metric(names, jobs[0]["objective"]) or "accuracy"
    common = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    result = Table(title=" ".join(["jobs", *sorted(common)]), title_justify="left")
    result.add_column("job", justify="right")
    result.add_column("overrides", overflow="fold")
    for column in ("bytes", "ratio", f"dense {metric}", "one-shot", "compressed"):
        result.add_column(column, justify="right")
    result.add_column("status", overflow="fold")
    for job in jobs:
        metrics = job["metrics"] or {}
        values = [metrics.get(stage, {}).get(metric) for stage in ("dense", "one_shot", "compressed")]
        result.add_row(
            Path(job["run_dir"]).name,
            " ".join(override for override in job["overrides"] if override not in common),
            "" if job["file_bytes"] is None else f"{job['file_bytes']:,}",
            "" if job["compression_ratio"] is None else f"{job['compression_ratio']:.1f}",
            *("" if value is None else f"{value:.4f}" for value in values),
            job["status"],
        )
    return result


def check_sweeper(config: Any) -> None:
    """Refuse a sweeper that chooses as it goes in a distributed run: each process would train something else, silently."""
    basic = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
    if config.mode == RunMode.MULTIRUN and config.sweeper._target_ != basic:
        raise UsageError(
            f"hydra/sweeper: {config.sweeper._target_} with more than one process (trainer.devices, trainer.num_nodes) would "
            "give each process other values; use hydra/sweeper=basic or trainer.devices=1"
        )
