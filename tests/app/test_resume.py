"""A process killed in mid-epoch, and resumed by the same command: the same file, byte for byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str]]

BUDGET = ["baseline.max_epochs=2", "trainer.max_epochs=3", "checkpoint.every_n_steps=4", "logger=none"]
# A shell lets what it runs in the background, this test perhaps, ignore Ctrl-C; a user's terminal does not.
MAIN = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from psc_lightning.app.main import main; main()"
)


def start(cache: Path, folder: Path, arguments: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PSC_CACHE": str(cache), "HYDRA_FULL_ERROR": "0"}
    command = [sys.executable, "-c", MAIN, *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


def wait_for_saves(process: subprocess.Popen[bytes], folder: Path, saves: int) -> None:
    """Return once `last.ckpt` was replaced that often: somewhere in mid-epoch, at a moment that nobody planned."""
    seen = set()
    while len(seen) < saves:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        for path in folder.glob("runs/*/checkpoints/last.ckpt"):
            seen.add(path.stat().st_mtime_ns)
        time.sleep(0.0005)


@pytest.mark.parametrize(("name", "saves"), [("binary", 2), ("mask", 5)])
def test_killed_in_mid_epoch(cli: Command, cache: Path, tmp_path: Path, name: str, saves: int) -> None:
    arguments = [f"compression={name}", *BUDGET]
    assert cli(*arguments, "hydra.run.dir=whole")[0] == 0
    with start(cache, tmp_path, arguments) as process:
        wait_for_saves(process, tmp_path, saves)
        process.kill()
    (run,) = (tmp_path / "runs").iterdir()
    assert not (run / "report.json").exists()
    status, said = cli(*arguments, "resume=auto")
    assert status == 0, said
    assert "resuming" in said
    assert list((tmp_path / "runs").iterdir()) == [run]
    assert (run / "model.psc").read_bytes() == (tmp_path / "whole/model.psc").read_bytes()


def test_ctrl_c_says_how_to_go_on(cli: Command, cache: Path, tmp_path: Path) -> None:
    arguments = ["compression=none", *BUDGET]
    with start(cache, tmp_path, arguments) as process:
        wait_for_saves(process, tmp_path, 2)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    (run,) = (tmp_path / "runs").iterdir()
    assert process.returncode == 130
    assert f"resume={Path('runs') / run.name}" in said.decode() or str(run) in said.decode()
    status, output = cli(f"resume={run}")  # a run knows its own settings
    assert status == 0, output
    assert (run / "report.json").is_file()


def test_other_settings_do_not_resume(cli: Command, tmp_path: Path) -> None:
    arguments = ["compression=none", "baseline.max_epochs=2", "trainer.max_epochs=1", "logger=none"]
    assert cli(*arguments, "hydra.run.dir=runs/a")[0] == 0
    (tmp_path / "runs/a/report.json").unlink()
    status, said = cli(*arguments, "seed=3", "resume=runs/a")
    assert status == 1
    assert "seed" in said
    assert "other values" in said
    assert cli(*arguments, "seed=3", "resume=auto")[0] == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2
