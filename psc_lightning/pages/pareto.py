"""The Pareto page: how small a network can get before it hurts, of any set of runs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from markupsafe import Markup

from psc_lightning.files import write_atomic
from psc_lightning.pages.drawing import drawing, file_of, inline
from psc_lightning.pages.front import Point, Scale, falls, front_of, points_of, smallest
from psc_lightning.pages.heat import heat_of
from psc_lightning.pages.jobs import Job, common, is_seed
from psc_lightning.pages.pareto_figure import Reference, pareto_figure
from psc_lightning.pages.render import link, page
from psc_lightning.report.notes import main_metric
from psc_lightning.strict_json import json_text

__all__ = ["metric_of", "write_pareto"]

_ENLARGED = 500  # settings that get a second picture: a page stays under a megabyte
_OTHERS = 4  # metrics beside the main one that have a column
_WIDE, _NARROW = (8.4, 4.4), (4.2, 4.2)  # inches


def metric_of(jobs: Sequence[Job]) -> str | None:
    """The metric to compare jobs by: the first objective that is one, else the main one of them all."""
    names = {name: None for job in jobs for name in (job.report.get("metrics") or {}).get("compressed") or {}}
    return main_metric(names, next((job.objective for job in jobs if job.objective in names), None))


def write_pareto(
    jobs: Sequence[Job], folder: Path, metric: str | None = None, falling: bool | None = None
) -> list[Path]:
    """Write `pareto.html`, `pareto.png`, `pareto.svg` and `sweep.json`.

    Args:
        jobs: of one sweep or of several, in order.
        folder: to write to; links to runs are relative to it.
        metric: to compare by; None: see `metric_of`.
        falling: whether less of it is better; None: by its name.

    Returns:
        The files.
    """
    record = f"{json_text({'jobs': [job.entry() for job in jobs]})}\n".encode()
    write_atomic(folder / "sweep.json", record)  # before any picture
    view = _View(jobs, folder, metric or metric_of(jobs), falling)
    with drawing():
        label = f"{view.metric} of the file{' (lower is better)' if view.falling else ''}"
        drawn = (view.points, view.front, view.references, label)
        alone = pareto_figure(*drawn, _WIDE, [view.name(index) for index in view.front])
        pictures = {f"pareto.{kind}": file_of(alone, kind) for kind in ("png", "svg")}
        told = f"{view.metric} against bytes of the file, {len(view.points)} settings"
        shown = [
            (
                name,
                [
                    Markup(inline(pareto_figure(*drawn, size, prefix=f"{kind}-", limits=limits), kind, told))
                    for kind, size in ((f"{name}-wide", _WIDE), (f"{name}-narrow", _NARROW))
                ],
            )
            for name, limits in view.parts().items()
        ]
    files = {
        **pictures,
        "pareto.html": page("pareto.html", **view.values(), pictures=shown),
    }
    for name, content in files.items():
        write_atomic(folder / name, content)
    return [folder / name for name in ("sweep.json", *files)]


class _View:
    """What the page and the pictures show of the jobs."""

    def __init__(self, jobs: Sequence[Job], folder: Path, metric: str | None, falling: bool | None) -> None:
        self.jobs, self.folder, self.metric = jobs, folder, metric
        self.falling = falls(metric) if falling is None else falling
        self.points = points_of(jobs, metric)
        self.front = front_of(self.points, self.falling)
        values = [one for point in self.points for one in (point.value, point.dense or 0.0)]
        self.scale = Scale.of(metric or "", values, self.falling)
        self.common = common([job.overrides for job in jobs])
        self.references = _references(jobs, metric)
        self.number = {index: number for number, index in enumerate(self.front, 1)}  # on the front
        self.point_of = {job: index for index, point in enumerate(self.points) for job in point.jobs}

    def name(self, index: int) -> str:
        """What to call a setting: what is not said of all."""
        job = self.jobs[self.points[index].jobs[0]]
        own = [one for one in job.overrides if one not in self.common and not is_seed(one)]
        return " ".join(own) or " ".join(one for one in job.overrides if not is_seed(one)) or "as configured"

    def measured(self, point: Point) -> str:
        """A point's metric, with its deviation."""
        spread = f" ± {point.value_deviation:.2g}" if len(point.jobs) > 1 else ""
        return f"{point.value:.4g}{spread}"

    def change(self, point: Point) -> str:
        """How far a point is from dense, in words."""
        change = self.scale.change(point)
        return "" if change is None else f"{change:+.2f} {self.scale.word}".replace("-", "−")

    def ratio(self, point: Point) -> float | None:
        """How many times smaller than dense a point is."""
        dense = self.jobs[point.jobs[0]].number("dense_bytes")
        return dense / point.size if dense else None

    def told(self, point: Point) -> str:
        """A point in a line."""
        ratio = self.ratio(point)
        parts = [f"{point.size:,.0f} bytes", f"{ratio:.1f} times smaller" if ratio else ""]
        parts += [f"{self.metric} {self.measured(point)}", f"{one} to dense" if (one := self.change(point)) else ""]
        parts += [f"{len(point.jobs)} seeds" if len(point.jobs) > 1 else ""]
        return ", ".join(filter(None, parts))

    def words(self) -> list[Markup]:
        """What the page says at the top."""
        if not self.points:
            return [Markup("No run has a file and a metric yet.")]
        lines = [
            Markup("Dense: <b>{:,.0f} bytes</b>, {} {:.4g}{}.").format(
                one.size, self.metric, one.value, self._general(one)
            )
            for one in self.references
            if one.name == "dense"
        ]
        if all(self.scale.change(point) is None for point in self.points):
            return [*lines, Markup("How far files are from dense is not known: no dense network was measured.")]
        answers: dict[int | None, list[float]] = {}
        for limit, found in smallest(self.points, self.scale):
            answers.setdefault(found, []).append(limit)
        for found, limits in answers.items():
            unit = self.scale.word if limits != [1.0] else self.scale.word.removesuffix("s")
            *most, last = (f"{limit:g}" for limit in limits)
            within = f"{', '.join(most)}{' and ' * bool(most)}{last} {unit} of dense"
            if found is None:
                lines.append(Markup("Nothing is within {}.").format(within))
            else:
                line = Markup("The smallest within {}: <b>{:,.0f} bytes</b>{}: {}.")
                point = self.points[found]
                told = self.told(point).partition(" bytes")[2]
                lines.append(
                    line.format(within, point.size, told, Markup("<span class=code>{}</span>").format(self.name(found)))
                )
        return lines

    def _general(self, dense: Reference) -> str:
        found = [
            one
            for one in self.references
            if one.name != "dense" and one.value == dense.value and one.size <= dense.size
        ]
        return f"; {found[0].name.removeprefix('dense + ')} makes {found[0].size:,.0f} bytes of it" if found else ""

    def parts(self) -> dict[str, tuple[float, float] | None]:
        """The pictures of the page: all settings; of those near dense a second one, where others are far from it."""
        if not self.points:
            return {}
        dense = [one.value for one in self.references if one.name == "dense"]
        few = len(dense) == 1 and len(self.points) <= _ENLARGED
        near = self.scale.near(dense[0], [point.value for point in self.points]) if few else None
        return {"all": None} | ({} if near is None else {"near": near})

    def values(self) -> dict[str, Any]:
        """What the template asks for."""
        names = {name: None for job in self.jobs for name in (job.report.get("metrics") or {}).get("compressed") or {}}
        others = [name for name in names if name != self.metric][:_OTHERS]
        words: dict[str, int] = {}
        rows = [self._row(index, job, others, words) for index, job in enumerate(self.jobs)]
        heat = heat_of(self.jobs, self.points, self.front)
        points = [{"name": self.name(index), "front": self.number.get(index)} for index in range(len(self.points))]
        marks = [
            {"jobs": point.jobs} | ({"told": self.told(point)} if len(point.jobs) > 1 else {}) for point in self.points
        ]
        bits = [value for row in heat.bits for value in row if value is not None]
        series = {
            "front": self.front,
            "other": [index for index in range(len(self.points)) if index not in self.number],
        }
        return {
            "title": f"{self.metric or 'runs'} against bytes",
            "heading": "How small can it get before it hurts?",
            "metric": self.metric,
            "falling": self.falling,
            "unit_word": "points (hundredths)" if self.scale.unit == 0.01 else self.scale.word,
            "unit": self.scale.unit,
            "common": sorted(self.common),
            "failed": sum(row["kind"] == "failed" for row in rows),
            "settings": len(self.points),
            "words": self.words(),
            "caption": self._caption(),
            "front": [self._front_row(index) for index in self.front],
            "jobs": rows,
            "others": others,
            "heat": heat,
            "bits_top": max(bits, default=0.0) or 1.0,
            "points": points,
            "data": {"metric": self.metric, "points": marks, **series, "words": list(words)},
        }

    def _caption(self) -> str:
        repeated = any(len(point.jobs) > 1 for point in self.points)
        bars = " Bars are one standard deviation over the seeds, of the metric and of the size." if repeated else ""
        return (
            f"{self.metric} of a fresh model loaded from each file, against the file's length. Numbers are those of the "
            f"front, below.{bars} Point at a mark to see what it is; click to open its run."
        )

    def _row(self, index: int, job: Job, others: Sequence[str], words: dict[str, int]) -> dict[str, Any]:
        value, dense = job.metric(self.metric), job.metric(self.metric, "dense")
        size = job.number("file_bytes")
        good = bool(size) and value is not None
        number = self.number.get(self.point_of.get(index, -1))
        missing = "" if good else f"no {self.metric or 'metric'}" if job.report else "no file"
        return {
            "name": self._folder_name(job),
            "link": self._link(job),
            "overrides": " ".join(one for one in job.overrides if one not in self.common) or " ".join(job.overrides),
            "error": job.error or ("" if good or job.status == "failed" else missing),
            "size": size,
            "ratio": job.number("compression_ratio"),
            "value": value,
            "change": None if value is None else self.scale.change(Point((index,), 1.0, value, dense=dense)),
            "one_shot": job.metric(self.metric, "one_shot"),
            "others": [job.metric(name) for name in others],
            "status": job.status,
            "front": number,
            "kind": f"done{' front' * (number is not None)}" if good else "failed",
            "words": " ".join(
                str(words.setdefault(shlex.quote(word), len(words))) for word in shlex.split(job.command())
            ),
        }

    def _front_row(self, index: int) -> dict[str, Any]:
        point = self.points[index]
        ratio = self.ratio(point)
        return {
            "name": self.name(index),
            "size": f"{point.size:,.0f}",
            "ratio": f"{ratio:.1f} ×" if ratio else "",
            "value": self.measured(point),
            "change": self.change(point),
            "runs": [(self._link(self.jobs[job]), self._folder_name(self.jobs[job])) for job in point.jobs],
        }

    def _folder_name(self, job: Job) -> str:
        """Its folder, from the one that all runs are in."""
        parents = {str(one.folder.absolute().parent) for one in self.jobs}
        return os.path.relpath(job.folder.absolute(), os.path.commonpath(parents))

    def _link(self, job: Job) -> str:
        """Its page, or what it has instead."""
        found = next(
            (one for name in ("report.html", "report.json") if (one := job.folder / name).is_file()), job.folder
        )
        return link(found, self.folder)


def _references(jobs: Sequence[Job], metric: str | None) -> list[Reference]:
    """Each dense network that runs started from, by its size, and what a general compressor makes of it."""
    networks: dict[float, list[Job]] = {}
    for job in jobs:
        if (size := job.number("dense_bytes")) and job.metric(metric, "dense") is not None:
            networks.setdefault(size, []).append(job)
    found: list[Reference] = []
    for size, runs in networks.items():
        value = fmean([*{job.seed: job.metric(metric, "dense") or 0.0 for job in runs}.values()])
        found.append(Reference("dense", size, value))
        packed: list[Mapping[str, Any]] = [job.record["dense_packed"] for job in runs if job.record.get("dense_packed")]
        if packed:
            found.append(Reference(f"dense + {packed[0]['name']}", fmean([one["bytes"] for one in packed]), value))
    return found
