"""Multirun: one baseline, one table, sweep.json; a job that fails does not take the others with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.types import RunMode

import psc_lightning
from psc_lightning.app.errors import UsageError
from psc_lightning.app.run_folder import unique_name
from psc_lightning.app.sweep import check_sweeper

Command = Callable[..., tuple[int, str]]

TINY = ["baseline.max_epochs=2", "trainer.max_epochs=1", "logger=none", "data.batch_size=256", "hydra.sweep.dir=sweep"]


def test_jobs_that_fail_or_diverge_are_reported_and_the_others_go_on(cli: Command, tmp_path: Path) -> None:
    status, said = cli(
        "-m", "compression=binary", "compression.threshold=0.0,1.5,0.9", "optimizer.lr=0.003,1e30", *TINY
    )
    assert status == 1
    jobs = json.loads((tmp_path / "sweep/sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["completed", "failed", "failed", "failed", "completed", "failed"]
    assert jobs[0]["overrides"][:2] == ["compression=binary", "compression.threshold=0.0"]
    assert jobs[0]["file_bytes"] == (Path(jobs[0]["run_dir"]) / "model.psc").stat().st_size
    assert jobs[0]["metrics"]["dense"] == jobs[4]["metrics"]["dense"]
    assert jobs[4]["compression_ratio"] > jobs[0]["compression_ratio"] > 1
    assert "NaN" in jobs[1]["error"]
    assert "threshold" in jobs[2]["error"]
    assert said.count("training it once") <= 1
    assert "job 2: error" in said
    assert "page: sweep/pareto.html" in said
    page = (tmp_path / "sweep/pareto.html").read_text()
    assert page.count('class="failed"') == 4
    assert page.count('href="4/report.html"') >= 1
    assert {"pareto.png", "pareto.svg"} <= {path.name for path in (tmp_path / "sweep").iterdir()}


def test_the_table_has_a_row_for_each_job(cli: Command, tmp_path: Path) -> None:
    status, said = cli("-m", "compression=none,binary", *TINY)
    assert status == 0
    jobs = json.loads((tmp_path / "sweep/sweep.json").read_text())["jobs"]
    table = said[said.rindex("jobs ") :].splitlines()
    assert "trainer.max_epochs=1" in table[0]  # said of all jobs, and said once
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table if line.startswith("│")]
    assert rows == [
        [
            str(number),
            f"compression={name}",
            f"{job['file_bytes']:,}",
            f"{job['compression_ratio']:.1f}",
            *(f"{job['metrics'][stage]['accuracy']:.4f}" for stage in ("dense", "one_shot", "compressed")),
            "completed",
        ]
        for number, (name, job) in enumerate(zip(("none", "binary"), jobs, strict=True))
    ]


SWEEPER = """
import json
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

class Sweeper(BasicSweeper):
    def sweep(self, arguments):
        batches = super().sweep(arguments)
        with open("seen.json", "w") as file:
            json.dump([job.return_value for batch in batches for job in batch], file)
"""


@pytest.fixture
def sweep(cache: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a multirun under a sweeper of another package, which writes what it sees to seen.json."""
    plugin = tmp_path / "plugins/hydra_plugins/mine.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(SWEEPER)
    root = Path(psc_lightning.__file__).parents[1]
    paths = os.pathsep.join(map(str, (plugin.parents[1], root)))
    environment = {**os.environ, "PYTHONPATH": paths, "PSC_CACHE": str(cache), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        own = ["-m", "hydra.sweeper._target_=hydra_plugins.mine.Sweeper", *arguments, *TINY]
        command = [sys.executable, str(root / "train.py"), *own]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_a_sweeper_sees_the_objective(sweep: Any, tmp_path: Path) -> None:
    """Each job's own number: what `accuracy` of the compressed model is in its report, or `file_bytes`."""
    done = sweep("compression=float", "objective=accuracy,file_bytes")
    assert done.returncode == 0, done.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())
    jobs = json.loads((tmp_path / "sweep/sweep.json").read_text())["jobs"]
    assert seen == [jobs[0]["metrics"]["compressed"]["accuracy"], jobs[1]["file_bytes"]]


def test_a_sweep_goes_on_where_it_was_stopped(cli: Command, tmp_path: Path) -> None:
    command = [
        "-m",
        "compression=none,float",
        "baseline.max_epochs=2",
        "trainer.max_epochs=1",
        "logger=none",
        "data.batch_size=256",
    ]
    assert cli(*command)[0] == 0
    (folder,) = (tmp_path / "multirun").iterdir()
    before = [(folder / name / "model.psc").read_bytes() for name in ("0", "1")]
    (folder / "1/report.json").unlink()  # as if it had been killed
    status, said = cli(*command, "resume=auto")
    assert status == 0
    assert list((tmp_path / "multirun").iterdir()) == [folder]
    assert "finished already" in said
    assert before == [(folder / name / "model.psc").read_bytes() for name in ("0", "1")]


def test_a_sweeper_that_chooses_as_it_goes_is_refused_in_a_distributed_run() -> None:
    basic = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
    check_sweeper(SimpleNamespace(mode=RunMode.MULTIRUN, sweeper=SimpleNamespace(_target_=basic)))
    check_sweeper(SimpleNamespace(mode=RunMode.RUN, sweeper=SimpleNamespace(_target_="optuna.Sweeper")))
    with pytest.raises(UsageError, match=r"hydra/sweeper: optuna\.Sweeper"):
        check_sweeper(SimpleNamespace(mode=RunMode.MULTIRUN, sweeper=SimpleNamespace(_target_="optuna.Sweeper")))


def test_it_is_refused_where_it_would_run(sweep: Any, tmp_path: Path) -> None:
    """Before anything is trained, in as many processes as were asked for."""
    done = sweep("compression=binary", "trainer=ddp", "trainer.accelerator=cpu")
    assert done.returncode == 1
    assert "hydra/sweeper: hydra_plugins.mine.Sweeper with more than one process" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("sweep/*/checkpoints/*"))
    assert not (tmp_path / "seen.json").exists()


def test_names_of_runs_differ_in_the_same_second() -> None:
    assert len({unique_name() for _ in range(100)}) == 100


def test_the_objective_is_what_the_job_returns(cli: Command, tmp_path: Path) -> None:
    status, said = cli("objective=nothing", "hydra.run.dir=run", "baseline.max_epochs=2", "trainer.max_epochs=1")
    assert status == 1
    assert "objective=nothing: not one of file_bytes, compression_ratio, accuracy, loss" in said
