"""How much the loss minds what: one tensor compressed at a time, without training."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from psc_lightning.artifact import measure
from psc_lightning.callbacks.presets import preset
from psc_lightning.callbacks.slot import SlotCallback
from psc_lightning.copies import copied
from psc_lightning.files import Place, write_atomic
from psc_lightning.report.table import render
from psc_lightning.slots.live import detach
from psc_lightning.slots.targets import select

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Probe", "Sensitivity", "sensitivity"]

#: what each tensor goes through by default: options of `preset("none", …)`
SETTINGS: dict[str, dict[str, Any]] = {
    "8 bit": {"levels": "uniform", "bits": 8},
    "4 bit": {"levels": "uniform", "bits": 4},
    "ternary": {"levels": "ternary"},
    "binary": {"levels": "binary"},
    "90 % zeros": {"mask": "magnitude", "threshold": 0.9},
}
_MARKS, _COLOURS = "osD^vP*X", 10


@dataclass(frozen=True)
class Probe:
    """One tensor under one setting, all others as they are.

    Attributes:
        tensor: its name.
        setting: the setting's name.
        rise: of the mean loss; below zero, it fell.
        stored_bytes: of the tensor in a file.
        entries: how many it has.
    """

    tensor: str
    setting: str
    rise: float
    stored_bytes: int
    entries: int


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` found; ``str()`` is a table, the tensors that mind most first.

    Attributes:
        loss: mean over the batches, of the model as it is.
        batches: how many there were.
        probes: of each tensor under each setting, tensors in the model's order.
    """

    loss: float
    batches: int
    probes: tuple[Probe, ...]

    def __str__(self) -> str:
        settings = list(dict.fromkeys(probe.setting for probe in self.probes))
        rows: dict[str, dict[str, Probe]] = {}
        for probe in self.probes:
            rows.setdefault(probe.tensor, {})[probe.setting] = probe
        columns = [("tensor", "all others as they are", "left"), ("entries", "", "right")]
        columns += [(f"{setting}: bytes, loss", "", "right") for setting in settings]
        order = sorted(rows, key=lambda name: -max(probe.rise for probe in rows[name].values()))
        cells = [
            [name, f"{next(iter(rows[name].values())).entries:,}"]
            + [f"{rows[name][setting].stored_bytes:,}  {rows[name][setting].rise:+.4f}" for setting in settings]
            for name in order
        ]
        return f"{render(columns, cells)}\nloss {self.loss:.4g}, mean over {self.batches} batches"

    def figure(self) -> Figure:
        """A colour a tensor, a mark a setting: the loss's rise over bits a weight."""
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        tensors = list(dict.fromkeys(probe.tensor for probe in self.probes))
        settings = list(dict.fromkeys(probe.setting for probe in self.probes))
        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.add_subplot()
        for probe in self.probes:
            colour = f"C{tensors.index(probe.tensor)}" if len(tensors) <= _COLOURS else "C0"
            mark = _MARKS[settings.index(probe.setting) % len(_MARKS)]
            axes.plot(8 * probe.stored_bytes / probe.entries, probe.rise, mark, color=colour, alpha=0.8)
        step = max(1e-4, 1e-2 * abs(self.loss))
        axes.set(
            xlabel="bits a weight, stored", ylabel="rise of the loss", title="One tensor at a time, without training"
        )
        axes.set_yscale("symlog", linthresh=step)
        axes.set_ylim(bottom=1.5 * min(-step, *(probe.rise for probe in self.probes)))
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.grid(alpha=0.3)
        marks = [
            Line2D([], [], color="grey", marker=_MARKS[i % len(_MARKS)], ls="", label=s) for i, s in enumerate(settings)
        ]
        if len(tensors) <= _COLOURS:
            marks += [Line2D([], [], color=f"C{i}", lw=3, label=name) for i, name in enumerate(tensors)]
        figure.legend(handles=marks, loc="outside right upper", fontsize="small")
        return figure

    def draw(self, path: Place) -> None:
        """Write the picture as a PNG."""
        import io

        stream = io.BytesIO()
        self.figure().savefig(stream, format="png", dpi=120)
        write_atomic(path, stream.getvalue())


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    targets: str | list[str] | None = None,
    ignore: str | list[str] | None = None,
    min_size: int = 64,
) -> Sensitivity:
    """See which tensor can be made how small: each is compressed alone, at once, and the loss is taken in eval.

    A guide, not a promise: training heals much of it, and what several tensors do together is more than their sum.

    Args:
        model: any module; it is not changed (a copy is, tensor by tensor).
        batches: of training or validation data.
        loss: ``loss(model, batch)`` gives a scalar.
        settings: name → options of `preset("none", …)`: `tying`, `mask`, `levels`, and theirs; None: 8 and 4 bit, ternary,
            binary, 90 % zeros.
        targets, ignore, min_size: which tensors; as for the callbacks.

    Raises:
        ValueError: no batches, a pattern that matches nothing, a wrong option, or a method that a tensor cannot take.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> x = torch.randn(64, 16)
    >>> y = model(x).detach()
    >>> found = sensitivity(model, [(x, y)], lambda model, batch: (model(batch[0]) - batch[1]).square().mean())
    >>> [probe.setting for probe in found.probes if probe.tensor == "2.weight"]
    ['8 bit', '4 bit', 'ternary', 'binary', '90 % zeros']
    >>> rises = [probe.rise for probe in found.probes if probe.tensor == "2.weight"]
    >>> rises[0] < rises[1] < rises[2]
    True
    """
    from rich.progress import track

    given = list(batches)
    if not given:
        raise ValueError("batches: expected one or more, found none; a generator can be read only once")
    copy = detach(copied(model)).eval()
    settings = SETTINGS if settings is None else settings
    names = [target.name for target in select(copy, targets, ignore, min_size).targets]
    as_it_is = _mean(copy, given, loss)
    pairs = [(name, setting) for name in names for setting in settings]
    shown = track(pairs, description="probing", transient=True, disable=not sys.stdout.isatty())
    probes = tuple(
        _probe(copy, name, setting, settings[setting], lambda: _mean(copy, given, loss) - as_it_is)
        for name, setting in shown
    )
    return Sensitivity(as_it_is, len(given), probes)


def _probe(model: nn.Module, name: str, setting: str, options: Mapping[str, Any], rise: Callable[[], float]) -> Probe:
    """Compress one tensor, look, and put it back."""
    parameter = model.get_parameter(name)
    before = parameter.detach().clone()
    try:
        for callback in _callbacks(name, options):
            for place in callback.attach(model):
                place.tensor.harden(place.parameter)
        (row,) = [row for row in measure(model, only=[name]).tensors if row.name == name]
        return Probe(name, setting, rise(), row.stored_bytes, before.numel())
    finally:
        detach(model)
        with torch.no_grad():
            parameter.copy_(before)


def _callbacks(name: str, options: Mapping[str, Any]) -> Iterator[SlotCallback]:
    for callback in preset("none", targets=[name], min_size=0, **options):
        if isinstance(callback, SlotCallback):
            yield callback


@torch.no_grad()
def _mean(model: nn.Module, batches: list[Any], loss: Callable[[nn.Module, Any], Tensor]) -> float:
    return sum(float(loss(model, batch)) for batch in batches) / len(batches)
