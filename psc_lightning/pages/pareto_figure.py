"""The Pareto picture: metric against bytes of the file, all settings, the front marked, dense for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psc_lightning.pages.drawing import ACCENT, MUTED, PAPER, SECOND, THIRD, size_text, verbatim
from psc_lightning.pages.front import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Reference", "pareto_figure"]

_NAMED = 14  # of the front, in words
_NUMBERED = 40  # of the front, by number
_BARS = 60  # settings beside the front that have their error bars drawn


@dataclass(frozen=True)
class Reference:
    """What a file is to be compared with: the dense network, or it under a general compressor."""

    name: str
    size: float
    value: float


def pareto_figure(
    points: Sequence[Point],
    front: Sequence[int],
    references: Sequence[Reference],
    label: str,
    size: tuple[float, float],
    names: Sequence[str] | None = None,
    prefix: str = "",
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Draw it.

    Args:
        points: all settings.
        front: indices of those on the front, from the smallest.
        references: dense networks, and these under a general compressor.
        label: of the vertical axis.
        size: width and height in inches; names go below.
        names: of the points on the front, for a picture that stands alone.
        prefix: before the `id` of each group of marks: `front`, `other`, `reference`.
        limits: of the vertical axis; None: all is in.
    """
    from matplotlib.figure import Figure

    lines = [f"{n}  {verbatim(name, 95)}" for n, name in enumerate(names or (), 1)]
    if len(lines) > _NAMED:
        lines = [*lines[:_NAMED], f"… and {len(lines) - _NAMED} more"]
    figure = Figure(figsize=(size[0], size[1] + 0.18 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    _marks(axes, points, front, references, prefix)
    _byte_axis(axes)
    axes.set_ylabel(label)
    axes.margins(0.07, 0.1)
    if limits is not None:
        axes.set_ylim(limits)
    if points or references:
        axes.legend(loc="best", fontsize=8, frameon=True, framealpha=0.8, facecolor=PAPER, edgecolor="none")
    if lines:
        figure.supxlabel("\n".join(["file size, bytes (log scale)", "", *lines]), fontsize=8, x=0.02, ha="left")
        axes.set_xlabel("")
    return figure


def _marks(
    axes: Axes, points: Sequence[Point], front: Sequence[int], references: Sequence[Reference], prefix: str
) -> None:
    on_front = set(front)
    other = [index for index in range(len(points)) if index not in on_front]
    for group, color in ((other, MUTED), (front, ACCENT)):
        repeated = [points[index] for index in group if len(points[index].jobs) > 1]
        if repeated and (group is front or len(repeated) <= _BARS):
            axes.errorbar(
                [one.size for one in repeated],
                [one.value for one in repeated],
                xerr=[min(one.size_deviation, 0.99 * one.size) for one in repeated],
                yerr=[one.value_deviation for one in repeated],
                fmt="none",
                ecolor=color,
                elinewidth=0.9,
                capsize=2,
                alpha=0.6,
            )
    style: dict[str, Any] = {"linewidths": 0.8, "edgecolors": PAPER}
    if other:
        _scatter(
            axes,
            [points[i] for i in other],
            s=26,
            color=MUTED,
            gid=f"{prefix}other",
            label="setting",
            zorder=3,
            **style,
        )
    if front:
        best = [points[index] for index in front]
        axes.step([p.size for p in best], [p.value for p in best], where="post", color=ACCENT, linewidth=1.2, alpha=0.5)
        _scatter(axes, best, s=48, color=ACCENT, gid=f"{prefix}front", label="Pareto front", zorder=4, **style)
        for number, point in enumerate(best[:_NUMBERED], 1):
            above: dict[str, Any] = {
                "xytext": (-5, 4),
                "textcoords": "offset points",
                "ha": "right",
                "fontsize": 8,
                "zorder": 5,
            }
            axes.annotate(str(number), (point.size, point.value), color=ACCENT, weight="bold", **above)
    for which, (marker, color) in {"dense": ("*", SECOND), "other": ("D", THIRD)}.items():
        chosen = [one for one in references if (one.name == "dense") == (which == "dense")]
        if chosen:
            names = ", ".join(dict.fromkeys(one.name for one in chosen))
            size = 110 if which == "dense" else 36
            _scatter(
                axes,
                chosen,
                s=size,
                marker=marker,
                color=color,
                gid=f"{prefix}{which}-reference",
                label=names,
                zorder=3,
            )


def _scatter(axes: Axes, marks: Sequence[Point | Reference], gid: str, **style: Any) -> None:
    axes.scatter([one.size for one in marks], [one.value for one in marks], **style).set_gid(gid)


def _byte_axis(axes: Axes) -> None:
    """A logarithmic axis in bytes that has at least two numbers on it."""
    from matplotlib.ticker import AutoLocator, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)) if high > 6 * low else AutoLocator()
    )
    axes.xaxis.set_major_formatter(size_text)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("file size, bytes (log scale)")
