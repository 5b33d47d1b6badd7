"""A run's own page: how small and how good, where the bytes are, how training went, how to use the file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from torch import Tensor

from psc_lightning.files import write_atomic
from psc_lightning.pages.drawing import drawing, file_of, inline, settled
from psc_lightning.pages.front import Point, Scale, falls
from psc_lightning.pages.jobs import Job, read_job
from psc_lightning.pages.render import page
from psc_lightning.pages.run_figures import bytes_figure, training_figure, weights_figure
from psc_lightning.report.notes import main_metric
from psc_lightning.strict_json import json_text

__all__ = ["write_run"]

#: what a run.json may lack
_UNKNOWN: dict[str, Any] = {
    "versions": {},
    "git": None,
    "seed": None,
    "command": "",
    "overrides": [],
    "dense_packed": None,
    "confusion": None,
}
_STAGES = {"dense": "dense start", "one_shot": "one-shot, without training", "compressed": "file"}


def write_run(
    folder: Path,
    report: Mapping[str, Any],
    dense: Mapping[str, Tensor] | None = None,
    stored: Mapping[str, Tensor] | None = None,
    file: str = "model.psc",
) -> None:
    """Write `report.html`, and `bytes.png` and `training.png` in `plots`.

    Args:
        folder: of the run, with its `run.json`, and `config.yaml` and `history.json` if there are.
        report: the content of `report.json`.
        dense: the weights that training started from; None: no histograms.
        stored: those in the file.
        file: its name.
    """
    job = read_job(folder)
    job = Job(folder, job.status, job.overrides, job.record, report)
    metrics: Mapping[str, Any] = report.get("metrics") or {}
    metric = main_metric(metrics.get("compressed") or {}, job.objective)
    (folder / "plots").mkdir(exist_ok=True)
    with drawing():
        size, training = settled(bytes_figure(report)), settled(training_figure(_history(folder), metric))
        pictures = {"bytes": (size, "bytes of each tensor in the file"), "training": (training, "how training went")}
        for name, (figure, _) in pictures.items():
            write_atomic(folder / "plots" / f"{name}.png", file_of(figure, "png"))
        slots = [row for row in report["tensors"] if row["method"] not in ("plain", "shared")]
        largest = [row["name"] for row in sorted(slots, key=lambda row: -row["dense_bytes"])]
        weights = weights_figure(dense or {}, stored or {}, largest)
        if weights is not None:
            pictures["weights"] = (weights, "weights before and after, with the levels in the file")
        drawn = {name: Markup(inline(figure, name, label)) for name, (figure, label) in pictures.items()}
    config = folder / "config.yaml"
    values = {
        "title": f"{report['file_bytes']:,} bytes: {folder.absolute().name}",
        "folder": folder.absolute().name,
        "report": report,
        "metric": metric,
        "cards": _cards(job, metric),
        "metrics": _table(metrics),
        "pictures": {"weights": "", **drawn},
        "kinds": _kinds(report),
        "record": _UNKNOWN | dict(job.record),
        "command": job.command(),
        "config": config.read_text(encoding="utf-8") if config.is_file() else "",
        "file": file,
        "example": _EXAMPLE.format(file=json_text(file)),
    }
    write_atomic(folder / "report.html", page("run.html", **values))


_EXAMPLE = """\
import psc_lightning

model = MyModel()  # your own class, as it was trained
psc_lightning.load_into(model, {file})

state = psc_lightning.load({file})  # or the plain state dict alone"""


def _cards(job: Job, metric: str | None) -> list[tuple[str, str, str]]:
    """What is to be seen at a glance: a number, what it is, and a remark."""
    report = job.report
    found = [
        (f"{report['file_bytes']:,}", "bytes", f"of {report['dense_bytes']:,} dense"),
        (
            f"{report['compression_ratio']:.1f} ×",
            "smaller",
            f"entropy of its symbols: {report['entropy_bytes']:,} bytes",
        ),
    ]
    value, dense = job.metric(metric), job.metric(metric, "dense")
    if metric is not None and value is not None:
        scale = Scale.of(metric, [value, dense or 0.0], falls(metric))
        change = scale.change(Point((0,), 1.0, value, dense=dense))
        remark = "" if change is None else f"{change:+.2f} {scale.word} to dense".replace("-", "−")
        found.append((f"{value:.4g}", f"{metric} of the file", remark))
    entries = _entries(report)
    if entries:
        zeros = sum(row["sparsity"] * size for row, size in entries) / sum(size for _, size in entries)
        bits = 8 * sum(row["stored_bytes"] for row, _ in entries) / sum(size for _, size in entries)
        found.append((f"{bits:.2f}", "bits a weight", f"in slots, {100 * zeros:.0f} % zeros"))
    return found


def _entries(report: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], int]]:
    """The tensors in slots, with the number of their entries."""
    found = []
    for row in report["tensors"]:
        if row["method"] not in ("plain", "shared"):
            size = 1
            for axis in row["shape"]:
                size *= axis
            found.append((row, size))
    return found


def _table(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Stages by metrics."""
    names = {name: None for values in metrics.values() for name in values}
    rows = [(_STAGES.get(stage, stage), [values.get(name) for name in names]) for stage, values in metrics.items()]
    return {"names": [*names], "rows": rows}


def _kinds(report: Mapping[str, Any]) -> list[tuple[str, int, float]]:
    """Bytes by what they are spent on, the largest first: layers in slots, layers outside of them, the rest."""
    sizes: dict[str, int] = {}
    for row in report["tensors"]:
        layer = row["layer_type"] or "tensors"
        kind = f"{layer}, outside of slots" if row["method"] in ("plain", "shared") else f"{layer} weights in slots"
        sizes[kind] = sizes.get(kind, 0) + row["stored_bytes"]
    sizes["names, header, checksum"] = report["overhead_bytes"]
    total = report["file_bytes"] or 1
    return [(kind, size, size / total) for kind, size in sorted(sizes.items(), key=lambda one: -one[1])]


def _history(folder: Path) -> dict[str, Sequence[tuple[float, float | None]]]:
    """What was recorded, if it was."""
    path = folder / "history.json"
    found: dict[str, Any] = json.loads(path.read_text())["series"] if path.is_file() else {}
    return found
