"""The pictures of one run: where its bytes are, how training went, what became of the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from psc_lightning.pages.drawing import ACCENT, MUTED, SECOND, THIRD, verbatim
from psc_lightning.report.notes import main_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Series", "bytes_figure", "chosen", "training_figure", "weights_figure"]

#: what was recorded: (optimizer step, value)
Series = Sequence[tuple[float, float | None]]

_WIDTH = 6.0  # inches
_BARS = 18  # tensors with a bar of their own
_WEIGHTS = 6  # tensors with a histogram
_SAMPLE = 200_000  # entries of a tensor in it, evenly spread
_LEVELS = 40  # distinct values that are drawn in


def bytes_figure(report: Mapping[str, Any]) -> Figure:
    """Draw the bytes of each tensor in the file, on a linear scale: bars have the lengths that the parts have.

    Args:
        report: the content of `report.json`.
    """
    from matplotlib.figure import Figure

    tensors = sorted(report["tensors"], key=lambda row: -row["stored_bytes"])
    shown, rest = tensors[:_BARS], tensors[_BARS:]
    rows = [(verbatim(row["name"], 34), row["stored_bytes"], row["method"] in ("plain", "shared")) for row in shown]
    if rest:
        rows.append(
            (f"{len(rest)} others", sum(row["stored_bytes"] for row in rest), all(r["method"] == "plain" for r in rest))
        )
    figure = Figure(figsize=(_WIDTH, 1.1 + 0.2 * (len(rows) + 1)), layout="constrained")
    axes = figure.add_subplot()
    kinds = [
        ("in slots", ACCENT, {i: size for i, (_, size, plain) in enumerate(rows) if not plain}),
        ("outside of slots", SECOND, {i: size for i, (_, size, plain) in enumerate(rows) if plain}),
        ("names, header, checksum", MUTED, {len(rows): report["overhead_bytes"]}),
    ]
    total = report["file_bytes"]
    for label, color, sizes in kinds:
        if sizes:
            share = 100 * sum(sizes.values()) / total if total else 0
            bars = axes.barh([*sizes], [*sizes.values()], height=0.72, color=color, label=f"{label}: {share:.0f} %")
            axes.bar_label(bars, [f"{size:,}" for size in sizes.values()], padding=3, fontsize=7.5)
    names = [*(name for name, _, _ in rows), "names, header, checksum"]
    axes.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12, y=0.01)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_locator(_few())
    axes.set_xlabel(f"bytes of {total:,} in the file (linear scale)")
    axes.legend(loc="lower right", fontsize=8)
    return figure


def chosen(series: Mapping[str, Series], metric: str | None) -> str | None:
    """The validation metric to show: that of this name, after `val_`, `val/` and the like, or else the main one.

    >>> found = {"val_loss": [], "val/mae": [(10, 0.5)], "train_loss": []}
    >>> chosen(found, "mae"), chosen(found, None), chosen(found, "loss")
    ('val/mae', 'val/mae', 'val_loss')
    """
    names = {_bare(name): name for name in series if name.startswith("val")}
    found = main_metric(names, metric)
    return None if found is None else names[found]


def training_figure(series: Mapping[str, Series], metric: str | None = None) -> Figure:
    """Draw loss, metric, compression and learning rate against optimizer steps, a panel each.

    Args:
        series: of `history.json`.
        metric: of validation, without `val_`; None: the main one.
    """
    from matplotlib.figure import Figure

    validation = chosen(series, metric)
    losses = [name for name in series if name == "train_loss" or (name.startswith("val") and _bare(name) == "loss")]
    shares = [name for name in series if name == "psc/sparsity" or name.startswith("psc/strength")]
    panels = [
        ("loss", losses),
        (_bare(validation or ""), [validation] if validation and validation not in losses else []),
    ]
    panels += [("share", shares), ("bytes", [name for name in series if name == "psc/bytes"])]
    panels += [("price", [name for name in series if name == "psc/price"])]
    panels += [("learning rate", [name for name in series if name.startswith("learning_rate")])]
    panels = [(label, names) for label, names in panels if any(series[name] for name in names)]
    figure = Figure(figsize=(_WIDTH, 0.6 + 1.45 * max(1, len(panels))), layout="constrained")
    every = figure.subplots(max(1, len(panels)), sharex=True, squeeze=False)[:, 0]
    for axes, (label, names) in zip(every, panels):
        colors = [MUTED, ACCENT, SECOND, THIRD] if "train_loss" in names else [ACCENT, SECOND, THIRD, MUTED]
        for name, color, line in zip(names, colors, ("-", "-", "--", ":")):  # strengths are often the same
            _curve(axes, series[name], name, color, line)
        axes.set_ylabel(label)
        axes.legend(fontsize=7.5, loc="best")
        if label == "bytes":
            axes.yaxis.set_major_formatter("{x:,.0f}")
    if not panels:
        every[0].text(0.5, 0.5, "nothing was recorded", ha="center", color=MUTED, transform=every[0].transAxes)
    every[-1].set_xlabel("optimizer step")
    return figure


def weights_figure(dense: Mapping[str, Tensor], stored: Mapping[str, Tensor], names: Sequence[str]) -> Figure | None:
    """Draw the weights of some tensors before and after, with the levels that they have in the file.

    Args:
        dense: of the network that training started from, by name.
        stored: of the file.
        names: of the tensors in slots, the largest first.
    """
    from matplotlib.figure import Figure

    names = [name for name in names if name in dense and name in stored][:_WEIGHTS]
    if not names:
        return None
    lines = (len(names) + 1) // 2
    height = 0.5 + 1.65 * lines
    figure = Figure(figsize=(_WIDTH, height))
    every = figure.subplots(lines, min(2, len(names)), squeeze=False).reshape(-1)
    room = {
        "left": 0.09,
        "right": 0.98,
        "top": 1 - 0.5 / height,
        "bottom": 0.3 / height,
    }  # a layout engine takes a second
    figure.subplots_adjust(**room, hspace=0.45, wspace=0.22)
    for axes, name in zip(every, names):
        _histogram(axes, _sample(dense[name]), _sample(stored[name]))
        axes.set_title(verbatim(name, 34), fontsize=8)
    for axes in every[len(names) :]:
        axes.set_axis_off()
    marks = {label: mark for axes in every for mark, label in zip(*axes.get_legend_handles_labels())}
    figure.legend([*marks.values()], [*marks], loc="upper center", ncols=len(marks), fontsize=8)
    return figure


def _curve(axes: Axes, points: Series, name: str, color: str, line: str) -> None:
    known = [(step, value) for step, value in points if value is not None]
    steps, values = [step for step, _ in known], [value for _, value in known]
    dots: dict[str, Any] = {"marker": "."} if len(known) < 40 else {}
    axes.plot(steps, values, line, color=color, linewidth=1.2, label=name.removeprefix("psc/"), **dots)


def _histogram(axes: Axes, dense: np.ndarray[Any, Any], stored: np.ndarray[Any, Any]) -> None:
    """Both as shares of their entries, on one axis; zeros are many, so the shares are on a logarithmic one."""
    values = np.concatenate((dense, stored))
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1.0, 61)
    before: dict[str, Any] = {"color": MUTED, "alpha": 0.35, "label": "dense start", "fill": True}
    after: dict[str, Any] = {"color": ACCENT, "linewidth": 1.1, "label": "file", "fill": False}
    for numbers, style in ((dense, before), (stored, after)):
        counts, _ = np.histogram(numbers, edges)
        axes.stairs(100 * counts / max(1, numbers.size), edges, **style)
    levels = np.unique(stored)
    if levels.size <= _LEVELS:
        place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(levels, np.zeros(levels.size), "|", color=SECOND, markersize=9, label="levels", zorder=5, **place)
    axes.set_yscale("log")
    axes.set_ylim(bottom=50 / max(1, stored.size))
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.minorticks_off()
    axes.xaxis.set_major_locator(_few())
    axes.tick_params(labelsize=7)


def _sample(tensor: Tensor) -> np.ndarray[Any, Any]:
    flat = tensor.detach().reshape(-1)
    return flat[:: 1 + flat.numel() // _SAMPLE].float().cpu().numpy()


def _bare(name: str) -> str:
    return re.sub("^val(id(ation)?)?[_/]?", "", name) or name


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5)
