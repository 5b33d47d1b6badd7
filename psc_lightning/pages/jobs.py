"""What a run folder tells of its run: one job of a sweep, finished or not."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Job", "common", "find_jobs", "read_job"]

_RECORD, _REPORT = "run.json", "report.json"
_CONFIGURED = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")


@dataclass(frozen=True)
class Job:
    """One run, as its folder has it.

    Attributes:
        folder: of the run.
        status: `completed`, `failed`, `unfinished`, or `unreadable`.
        overrides: what its command set, without `resume`.
        record: all of `run.json`.
        report: all of `report.json`; empty where the run has none.
        error: why it failed, or could not be read.
    """

    folder: Path
    status: str
    overrides: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def objective(self) -> str | None:
        """The metric that its configuration names."""
        return self.record.get("objective")

    @property
    def notes(self) -> list[str]:
        """What its report has to say."""
        return list(self.report.get("notes", ()))

    @property
    def setting(self) -> tuple[Any, ...]:
        """What its repetitions share: the overrides but for the seed, and the size of the network."""
        return *sorted(one for one in self.overrides if not is_seed(one)), self.report.get("dense_bytes")

    @property
    def seed(self) -> Any:
        """Its seed; None where it is not known."""
        return self.record.get("seed")

    def metric(self, name: str | None, stage: str = "compressed") -> float | None:
        """A metric of its `dense`, `one_shot` or `compressed` model; None where there is none, or no number."""
        value = ((self.report.get("metrics") or {}).get(stage) or {}).get(name)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def number(self, key: str) -> float | None:
        """A number of its report, as `file_bytes`; None where there is none."""
        value = self.report.get(key)
        return value if isinstance(value, int | float) and math.isfinite(value) else None

    def entry(self) -> dict[str, Any]:
        """Its entry of `sweep.json`."""
        found: dict[str, Any] = {"overrides": [*self.overrides], "run_dir": str(self.folder), "status": self.status}
        found |= {key: self.report.get(key) for key in ("file_bytes", "compression_ratio", "metrics")}
        found |= {"objective": self.objective, "seed": self.seed, "notes": self.notes}
        return found | ({} if self.error is None else {"error": self.error})

    def command(self) -> str:
        """The command that repeats it, for a shell.

        >>> job = Job(Path("0"), "completed", ("seed=1", "data.folder=a b"), {"command": "train.py -m seed=0,1"})
        >>> job.command()
        "python train.py seed=1 'data.folder=a b'"
        """
        said = shlex.split(self.record.get("command") or "psc-train")
        program = ["python", said[0]] if said[0].endswith(".py") else [Path(said[0]).name]
        if any(word.partition("=")[0] in _CONFIGURED for word in said):  # overrides alone are not what it was
            return shlex.join([*program, "--config-path", str(self.folder.absolute()), "--config-name", "config"])
        return shlex.join([*program, *self.overrides])


def is_seed(override: str) -> bool:
    """Whether an override only asks for another repetition."""
    return override.startswith("seed=")


def read_job(folder: Path) -> Job:
    """Read a run folder, whatever state it is in; a file that is no JSON makes the job `unreadable`."""
    try:
        record = _mapping(folder / _RECORD)
        report = _mapping(folder / _REPORT) if (folder / _REPORT).is_file() else {}
    except (OSError, ValueError) as error:
        return Job(folder, "unreadable", error=" ".join(str(error).split()))
    overrides = tuple(str(one) for one in record.get("overrides") or () if not str(one).startswith("resume="))
    return Job(folder, str(record.get("status", "unfinished")), overrides, record, report, record.get("error"))


def find_jobs(folders: Iterable[Path]) -> list[Job]:
    """Read the runs that folders are or hold (a run, a multirun, a folder of these), once each, in the order of jobs."""
    found: dict[Path, None] = {}
    for folder in folders:
        for depth in ("", "*/", "*/*/"):
            found.update({path.parent: None for path in sorted(folder.glob(depth + _RECORD), key=_order)})
    unique = {path.resolve(): path for path in reversed(found)}
    return [read_job(path) for path in found if unique[path.resolve()] == path]


def common(overrides: Sequence[Iterable[str]]) -> set[str]:
    """The overrides that all of several jobs share: what need not be said of each.

    >>> common([["a=1", "b=2"], ["a=1", "b=3"]]), common([["a=1"]])
    ({'a=1'}, set())
    """
    return set.intersection(*map(set, overrides)) if len(overrides) > 1 else set()


def _order(path: Path) -> tuple[Any, ...]:
    """What sorts folders by name, and Hydra's jobs by number: 2 before 10."""
    return tuple((0, int(part), "") if part.isdecimal() else (1, 0, part) for part in path.parent.parts)


def _mapping(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path.name}: expected an object, found {type(value).__name__}")
    return value
