"""`train.py` in two processes: they meet for each job of a sweep, rank zero tests the file and reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psc_lightning


def test_a_sweep_in_two_processes(tmp_path):
    budget = ["baseline.max_epochs=1", "trainer.max_epochs=1", "logger=none", "hydra.sweep.dir=sweep"]
    arguments = ["-m", "compression=binary,deep", "trainer=ddp", "trainer.accelerator=cpu", *budget]
    train = Path(psc_lightning.__file__).parents[1] / "train.py"
    environment = {**os.environ, "PSC_CACHE": str(tmp_path / "cache")}
    with open(tmp_path / "said", "wb") as said:
        command = [sys.executable, str(train), *arguments]
        subprocess.run(command, cwd=tmp_path, env=environment, timeout=300, check=True, stdout=said, stderr=said)
    jobs = json.loads((tmp_path / "sweep/sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["completed", "completed"]
    for job in jobs:
        folder = Path(job["run_dir"])
        assert json.loads((folder / "report.json").read_text())["metrics"]["compressed"] == job["metrics"]["compressed"]
        assert (folder / "model.psc").stat().st_size == job["file_bytes"]
        psc_lightning.verify(folder / "model.psc")
    output = (tmp_path / "said").read_text()
    assert output.count("│ completed │") == 2, output  # one table
