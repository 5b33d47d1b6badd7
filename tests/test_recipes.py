"""Recipes are run, so that they do not rot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str, cwd: Path, **environment: str) -> str:
    one_thread = {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **one_thread, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


HELPS = """
import runpy, sys
folder, *names = sys.argv[1:]
for name in names:
    sys.argv = [f"{folder}/{name}", "--help"]
    sys.path[0] = folder
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as done:
        assert not done.code, name
    else:
        raise AssertionError(f"{name} ran")
"""


def test_fine_tuning_with_callbacks(tmp_path: Path) -> None:
    said = run(str(ROOT / "recipes/finetune.py"), cwd=tmp_path)
    assert "cross_channel+movement+ternary" in said
    accuracy = float(said.rsplit("accuracy", 1)[1].split("│")[1])
    assert accuracy > 0.95


def test_one_shot(tmp_path: Path) -> None:
    said = run(str(ROOT / "recipes/one_shot.py"), cwd=tmp_path)
    assert "magnitude+uniform" in said
    assert "x smaller" in said


def test_benchmarks_start(tmp_path: Path) -> None:
    """Each says how it is used; all in one process, which imports torch once."""
    names = sorted(path.name for path in (ROOT / "recipes/benchmarks").glob("*.py"))
    names.remove("file_size.py")  # takes no options
    (tmp_path / "helps.py").write_text(HELPS)
    said = run("helps.py", str(ROOT / "recipes/benchmarks"), *names, cwd=tmp_path)
    for name in names:
        assert f"usage: {name} " in said


def test_the_accuracy_benchmark_runs_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    # From a copy, so that the committed results stay as they are.
    for name in ("train.py", "conf"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "recipes" / "benchmarks").mkdir(parents=True)
    script = tmp_path / "recipes" / "benchmarks" / "accuracy.py"
    script.write_text((ROOT / "recipes/benchmarks/accuracy.py").read_text())
    command = [str(script), "digits", "--only", "^row$", "--seeds", "1", "--runs", str(tmp_path / "runs")]
    run(*command, cwd=tmp_path, PSC_CACHE=str(tmp_path / "cache"))
    table = (tmp_path / "recipes/results/digits.md").read_text()
    assert "| row | 1 |" in table
    assert "python train.py compression=row seed=0" in table
    before = (tmp_path / "runs/digits/row/0/report.json").stat().st_mtime_ns
    run(*command, cwd=tmp_path, PSC_CACHE=str(tmp_path / "cache"))
    assert (tmp_path / "runs/digits/row/0/report.json").stat().st_mtime_ns == before


def test_records_hold() -> None:
    """Bytes and accuracy of each digits record, measured again by networks of the recipe's own."""
    said = run("-m", "recipes.evaluate", "--only", "digits", cwd=ROOT)
    assert said.count("digits_cnn_") == 6
