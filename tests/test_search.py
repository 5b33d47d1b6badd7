"""`psc-search`: alternatives, ranges, validation metrics; a search goes on in its folder, and what fails is a marked row."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from optuna.trial import FixedTrial, TrialState

from psc_lightning.configs import config_dir
from psc_lightning.pages.jobs import read_job
from psc_lightning.search import main, read_space, settings, study_of, validated

ROOT = Path(__file__).parents[1]
SPACE = """
- compression: [binary, ternary]
  compression.threshold: {low: 0.1, high: 0.9}
- compression: small
  compression.budget: {low: 1, high: 9, unit: "%"}
"""


def written(folder: Path, text: str) -> Path:
    (folder / "space.yaml").write_text(text)
    return folder / "space.yaml"


def test_a_trial_is_one_alternative(tmp_path: Path) -> None:
    space = read_space(written(tmp_path, SPACE))
    first = FixedTrial({"alternative": 0, "0.compression": "ternary", "0.compression.threshold": 0.25})
    assert settings(first, space) == ["compression=ternary", "compression.threshold=0.25"]
    second = FixedTrial({"alternative": 1, "1.compression.budget": 3})
    assert settings(second, space) == ["compression=small", "compression.budget=3%"]


def test_the_default_space_is_of_settings_that_there_are() -> None:
    presets = {path.stem for path in (config_dir() / "compression").glob("*.yaml")}
    for branch in read_space(config_dir() / "search.yaml"):
        chosen = branch["compression"] if isinstance(branch["compression"], list) else [branch["compression"]]
        assert set(chosen) <= presets
        assert set(branch) <= {"compression", "compression.budget", "compression.threshold"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", "expected a list of alternatives"),
        ("- x: {low: 2, high: 1}", "x: expected low < high, found 2 and 1"),
        ("- x: {low: 1, high: 2, step: 3}", "x: expected low, high, log and unit, found step"),
    ],
)
def test_a_space_that_is_none(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--space", str(written(tmp_path, text))])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_metric_is_the_validation_one(tmp_path: Path) -> None:
    """The test's is 0.9: it must not choose."""
    (tmp_path / "run.json").write_text(json.dumps({"status": "completed", "overrides": [], "objective": None}))
    (tmp_path / "report.json").write_text(json.dumps({"file_bytes": 9, "metrics": {"compressed": {"accuracy": 0.9}}}))
    assert validated(read_job(tmp_path)) == ("accuracy", 0.9)
    series = {"val_loss": [[1, 0.4]], "val_accuracy": [[1, 0.1], [2, 0.7]], "train_loss": [[1, 0.0]]}
    (tmp_path / "history.json").write_text(json.dumps({"series": series}))
    assert validated(read_job(tmp_path)) == ("val_accuracy", 0.7)


def test_a_search_goes_on_in_its_folder(tmp_path: Path) -> None:
    """In processes of its own: two trials, then a third; a setting that nobody reads fails, and is told."""
    space = written(tmp_path, "- compression: binary\n  compression.threshold: {low: 0.0, high: 0.5}\n")
    tiny = ["baseline.max_epochs=1", "trainer.max_epochs=1", "logger=none", "data.batch_size=256"]
    environment = {**os.environ, "PSC_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def search(trials: int, *more: str) -> str:
        command = [sys.executable, "-m", "psc_lightning.search", *tiny, *more, "--dir", "it's found"]
        command += ["--trials", str(trials), "--space", str(space), "--seed", "0"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = search(2)
    assert "[1 of 2] trial 0: compression=binary compression.threshold=" in said
    assert said.rstrip().endswith("pareto.html")
    said = search(3, "compression.nobody=1")
    assert said.startswith("[3 of 3] trial 2:")
    assert "failed: error: Could not override 'compression.nob" in said
    study = study_of(tmp_path / "it's found", None)
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.FAIL]
    for trial in study.trials[:2]:
        report = json.loads((tmp_path / f"it's found/{trial.number}/report.json").read_text())
        history = json.loads((tmp_path / f"it's found/{trial.number}/history.json").read_text())
        assert trial.values == [-history["series"]["val_accuracy"][-1][1], math.log(report["file_bytes"])]
    jobs = json.loads((tmp_path / "it's found/sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["completed", "completed", "failed"]
