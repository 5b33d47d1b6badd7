"""`psc-search`: settings that nobody has thought of, by two goals at once: a better metric in fewer bytes.

Each trial is a `train.py` of its own, in a folder of its own; what has been tried is a study of Optuna's in a file beside
them, so that a search stops and goes on, in as many processes and on as many machines as share the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psc_lightning.configs import config_dir, quoted
from psc_lightning.files import write_atomic
from psc_lightning.pages.front import falls
from psc_lightning.pages.jobs import Job, find_jobs, read_job
from psc_lightning.pages.pareto import write_pareto
from psc_lightning.report.notes import main_metric
from psc_lightning.strict_json import json_text

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

__all__ = ["main", "read_space", "settings"]

EXAMPLES = """\
examples:
  psc-search --trials 30                                  what conf/search.yaml offers, on the digits
  psc-search experiment=mnist_lenet5 data.folder=DIR --space mine.yaml --dir searches/lenet5
  psc-search … --dir searches/lenet5                      goes on; a second process with the same folder helps

The metric is the validation one at the end of training (the page then shows the test's): nothing is chosen on test data.
"""
_TRAIN = "import sys; sys.argv[0] = 'psc-train'; from psc_lightning.app.main import main; main()"
_JOURNAL = "study.journal"
_FEW = 20  # trials; fewer do not tell what mattered
_SHOWN = 0.01

Space = list[dict[str, Any]]


def read_space(path: Path) -> Space:
    """The alternatives of a YAML file.

    Raises:
        ValueError: it is no list of mappings; a range that is none.
    """
    from omegaconf import OmegaConf

    found: Any = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) and one for one in found):
        raise ValueError(f"{path}: expected a list of alternatives, each a mapping of settings, found {found!r}")
    for branch in found:
        for key, value in branch.items():
            if not isinstance(value, dict):
                continue
            if unknown := set(value) - {"low", "high", "log", "unit"}:
                raise ValueError(f"{path}: {key}: expected low, high, log and unit, found {', '.join(sorted(unknown))}")
            low, high = value.get("low"), value.get("high")
            if not isinstance(low, int | float) or not isinstance(high, int | float) or not low < high:
                raise ValueError(f"{path}: {key}: expected low < high, found {low!r} and {high!r}")
    return found


def settings(trial: Trial, space: Space) -> list[str]:
    """The overrides of a trial: those of one alternative."""
    index = trial.suggest_categorical("alternative", range(len(space))) if len(space) > 1 else 0
    return [f"{key}={_value(trial, f'{index}.{key}', value)}" for key, value in space[index].items()]


def _value(trial: Trial, name: str, value: Any) -> str:
    if isinstance(value, list):
        return str(trial.suggest_categorical(name, value))
    if not isinstance(value, Mapping):
        return str(value)
    low, high, log = value["low"], value["high"], bool(value.get("log"))
    if isinstance(low, int) and isinstance(high, int):
        return f"{trial.suggest_int(name, low, high, log=log)}{value.get('unit', '')}"
    return f"{trial.suggest_float(name, low, high, log=log):.4g}{value.get('unit', '')}"


def validated(job: Job) -> tuple[str, float] | None:
    """The metric of validation data at the end of training; where there are none, of the test."""
    history = job.folder / "history.json"
    series = json.loads(history.read_text())["series"] if history.is_file() else {}
    ends = {name: points[-1][1] for name, points in series.items() if name.startswith("val") and points}
    name = main_metric({name.removeprefix("val_").removeprefix("val/"): None for name in ends}, job.objective)
    for full, value in ends.items():
        if value is not None and name is not None and full in (f"val_{name}", f"val/{name}"):
            return full, float(value)
    found = (job.report.get("metrics") or {}).get("compressed") or {}
    name = main_metric(found, job.objective)
    value = None if name is None else job.metric(name)
    return None if name is None or value is None else (name, value)


def study_of(folder: Path, seed: int | None) -> Study:
    """The study in a folder, made if it is not there; goals: the metric (as it falls, or rises times -1), the bytes' log."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / _JOURNAL))),
        study_name="psc",
        load_if_exists=True,
        directions=["minimize", "minimize"],
        sampler=optuna.samplers.TPESampler(seed=seed),
    )


def one_trial(study: Study, space: Space, folder: Path, given: Sequence[str]) -> str:
    """Train with what the study asks for, and tell it what came of that; a line about it."""
    from optuna.trial import TrialState

    trial = study.ask()
    chosen = settings(trial, space)
    place = folder / str(trial.number)
    place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", _TRAIN, *given, *chosen, f"hydra.run.dir={quoted(place)}"]
    with (place / "output.txt").open("w") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    head = f"trial {trial.number}: {' '.join(chosen)}:"
    job = read_job(place)
    found = validated(job) if job.report else None  # a file over its budget has a report, too
    if found is None or not math.isfinite(found[1]):
        study.tell(trial, state=TrialState.FAIL)
        why = ((place / "output.txt").read_text().strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        if not (place / "run.json").is_file():  # it failed before it had one: the page shows it, too
            record = {"status": "failed", "overrides": [*given, *chosen], "error": why}
            write_atomic(place / "run.json", f"{json_text(record)}\n".encode())
        return f"{head} failed: {why}"
    name, value = found
    size = job.report["file_bytes"]
    study.tell(trial, [value if falls(name) else -value, math.log(size)])
    return f"{head} {size:,} bytes, {name} {value:.4g}"


def importances(study: Study) -> list[str]:
    """What mattered, of each goal; empty where there is too little to tell."""
    from optuna.importance import get_param_importances
    from optuna.trial import TrialState

    if len(study.get_trials(states=(TrialState.COMPLETE,))) < _FEW:
        return []
    goals: dict[str, Callable[[FrozenTrial], float]] = {
        "the metric": lambda t: t.values[0],
        "bytes": lambda t: t.values[1],
    }
    lines = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some alternative was tried once
        for goal, target in goals.items():
            found = get_param_importances(study, target=target)
            shown = [f"{key.partition('.')[2] or key} {share:.0%}" for key, share in found.items() if share >= _SHOWN]
            lines.append(f"what mattered for {goal}: {', '.join(shown)}")
    return lines


def main(given: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 good, 2 wrong usage, 130 stopped.

    Args:
        given: arguments instead of those of the process.
    """
    parser = argparse.ArgumentParser(
        prog="psc-search",
        description="Search settings for a better metric in fewer bytes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = config_dir() / "search.yaml"
    parser.add_argument("settings", metavar="KEY=VALUE", nargs="*", help="settings of train.py that all trials have")
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="how many there shall be in all (20)")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="of the search; one that is there goes on")
    parser.add_argument("--space", type=Path, default=default, metavar="FILE", help="what to try (conf/search.yaml)")
    parser.add_argument("--seed", type=int, help="of the search, which is then the same again, in one process")
    options = parser.parse_intermixed_args(given)
    try:
        import optuna  # noqa: F401
    except ImportError:
        parser.error("it needs Optuna: pip install 'psc-lightning[search]'")
    try:
        space = read_space(options.space)
    except (OSError, ValueError) as error:
        parser.error(f"--space: {error}")
    if options.trials < 1 or any("=" not in one for one in options.settings):
        parser.error("expected settings as KEY=VALUE, and --trials of 1 or more")
    folder: Path = (options.dir or Path("searches") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    study = study_of(folder, options.seed)
    try:
        while (number := sum(trial.state.is_finished() for trial in study.trials)) < options.trials:
            print(f"[{number + 1} of {options.trials}] {one_trial(study, space, folder, options.settings)}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped; to go on, repeat the command with --dir {folder}", file=sys.stderr)
        return 130
    for line in importances(study):
        print(line)
    print(f"page: {write_pareto(find_jobs([folder]), folder)[-1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
