"""Peak memory beyond a plain run's, in multiples of the weights' bytes: the fits of step_memory.py, on the device."""

from __future__ import annotations

from typing import Any

import torch
from device.board import Board, Row
from device.fits import fit
from lightning import Callback
from step.methods import METHODS, Method
from step_memory import CHOSEN, GOALS, LAYERS, Plain
from torch import nn

from psc_lightning.training.conductor import Conductor

__all__ = ["measure"]

MILLIONS = 20
STEPS = 6
FIRST = ("plain", "uniform 8 bit", "codebook 16", "movement 0.5")


class Steady(Callback):
    """Looks at the peak of what comes before the third step, and forgets it."""

    def __init__(self, device: str) -> None:
        self.device, self.first = device, 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and self.device == "cuda":
            self.first = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()


def measure(board: Board) -> None:
    plain: dict[str, float] = {}

    def run(row: Row, name: str, method: Method, millions: float) -> None:
        side = int((millions * 1e6 / LAYERS) ** 0.5)
        dense = 4 * LAYERS * side * side
        before, steady = 0, Steady(board.device)
        if board.device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        with torch.device(board.device):
            net = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(LAYERS)))
            batch = (torch.randn(1, side), torch.zeros(1, dtype=torch.long))
        trainer = fit(Plain(net, adam=False), [batch], STEPS, board.device, [*method.callbacks(net), steady])
        later = torch.cuda.max_memory_allocated() if board.device == "cuda" else 0
        sidecars = Conductor.of(trainer).cast.sidecars
        states = sidecars.optimizer.state.values() if sidecars.optimizer is not None else []
        tensors = [*sidecars.parameters, *(value for state in states for value in state.values() if value.numel() > 1)]
        beside = sum(tensor.nbytes for tensor in tensors) / dense
        peaks = {"start": (steady.first - before) / dense, "steps": (later - before) / dense}
        row |= {f"peak, {key}": round(value, 3) for key, value in peaks.items()}
        if name == "plain":
            plain.update(peaks)
            return
        row |= {f"extra, {key}": round(value - plain[key] - beside, 3) for key, value in peaks.items()}
        row["trained beside the weights, with its optimizer's state"] = round(beside, 3)
        row["goal"] = "{} + {}".format(*GOALS.get(name, (0, 0)))

    # What libraries take for themselves at their first use is not a method's.
    board.row("(warm-up)", lambda row: run({}, "plain", METHODS["uniform 8 bit"], 0.01))
    millions = 0.01 if board.small else MILLIONS
    for name, method in CHOSEN.items() if board.all else [(name, CHOSEN[name]) for name in FIRST]:
        board.row(name, lambda row, name=name, method=method: run(row, name, method, millions))  # type: ignore[misc]
