"""A multirun: which sweepers it may have, and what it leaves: a table on the terminal, sweep.json, a Pareto page."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from psc_lightning.app.errors import UsageError
from psc_lightning.app.run_folder import Run
from psc_lightning.pages.jobs import common, find_jobs
from psc_lightning.pages.pareto import write_pareto
from psc_lightning.report.notes import main_metric

__all__ = ["SweepFolder", "check_sweeper", "summarise"]


class SweepFolder(Callback):
    """Tell `main` where a multirun went. (Hydra does not call `on_multirun_end` when a job failed.)"""

    current: ClassVar[Path | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember the folder."""
        SweepFolder.current = Path(config.hydra.sweep.dir).absolute()


def summarise(folder: Path) -> list[dict[str, Any]]:
    """Write `sweep.json` and the Pareto page, print the table, return the jobs: those that left a run.json in `folder`."""
    found = find_jobs([folder])
    jobs = [job.entry() for job in found]
    if jobs:
        console = Console()
        console.width = console.width if console.is_terminal else 120
        console.print(table(jobs))
        for job in jobs:
            for said in [*job["notes"], *([job["error"]] if "error" in job else [])]:
                console.print(f"job {Path(job['run_dir']).name}: {said}", markup=False, highlight=False, soft_wrap=True)
        page = write_pareto(found, folder)[-1]
        console.print(f"page: {Run.shown(page)}", markup=False, highlight=False, soft_wrap=True)
    return jobs


def table(jobs: list[dict[str, Any]]) -> Table:
    """Return the jobs as a table: what was said of each and not of all, its size, and a metric of its three models."""
    names = {name: None for job in jobs for name in (job["metrics"] or {}).get("compressed", {})}
    metric = main_metric(names, jobs[0]["objective"]) or "accuracy"
    shared = common([job["overrides"] for job in jobs])
    result = Table(title=" ".join(["jobs", *sorted(shared)]), title_justify="left")
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
            " ".join(override for override in job["overrides"] if override not in shared),
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
