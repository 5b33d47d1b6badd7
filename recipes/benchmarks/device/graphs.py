"""torch.compile of the network, without and with CUDA graphs: equal losses, no recompilation, and how long a step takes."""

from __future__ import annotations

from typing import Any

import torch
from device.board import Board, Row
from device.fits import STEP, Clock, Losses, Traced, Window, built, fit, large, traced
from step.methods import PLAIN
from step.nets import Fit

__all__ = ["measure"]

WARM, STEPS, TRACED = 10, 16, 2
LAYERS = 6  # half of what the other sections take: to compile twelve is half a minute each time
METHODS = {"plain": PLAIN, "uniform 8 bit": STEP["uniform 8 bit"], "codebook 16": STEP["codebook 16"]}
MODES: tuple[str | None, ...] = (None, "default", "reduce-overhead")
FIRST = ("plain", "uniform 8 bit")


def measure(board: Board) -> None:
    net = large(board.small, LAYERS)
    warm, steps = (4, 4) if board.small else (WARM, STEPS) if board.all else (6, 8)
    eager: dict[str, list[float]] = {}
    plain_ms: dict[str | None, dict[str, float]] = {}

    def run(row: Row, mode: str | None, name: str) -> None:
        from torch._dynamo.utils import counters

        torch._dynamo.reset()
        counters.clear()
        model, batches = built(net, board.device)
        compiled: Any = model
        if mode is not None:
            options = {"backend": "aot_eager"} if board.device == "cpu" else {"mode": mode}
            compiled = torch.compile(model, **options)
        clock, losses, trace, graphs = Clock(warm, warm + steps), Losses(), Traced(), []
        last = warm + steps + TRACED

        class Count(Window):
            """How many graphs there are after the warm-up."""

            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                if batch_idx in (warm, last):
                    graphs.append(counters["stats"]["unique_graphs"])

        watch = [
            clock,
            losses,
            Window(warm + steps, last, lambda: traced(trace, board.device)),
            Count(0, 0, lambda: None),
        ]
        module = Fit(compiled, net.adam)
        fit(module, batches, last + 1, board.device, [*METHODS[name].callbacks(model), *watch], precision="bf16-mixed")
        found, numbers = clock.found(), losses.numbers()
        row["loss, first and last"] = f"{numbers[0]:.4f}, {numbers[-1]:.4f}"
        if mode is None:
            eager[name] = numbers
        elif name in eager:
            off = [abs(one - other) / max(abs(other), 1e-6) for one, other in zip(numbers, eager[name])]
            row["largest relative difference from eager, 1 / 8 / all steps"] = (
                f"{off[0]:.1e} / {max(off[:8]):.1e} / {max(off):.1e}"
            )
        row["addresses unchanged"] = len(losses.places) == 1
        row["graphs after warm-up, at the end"] = f"{graphs[0]}, {graphs[-1]}"
        row["CUDA graph launches a step"] = trace.calls["cudaGraphLaunch"] / TRACED
        row["kernels a step"] = sum(trace.kernels.values()) / TRACED
        row["launch calls a step"] = trace.launches / TRACED
        row |= {f"{key} ms": round(value, 3) for key, value in found.items()}
        if name == "plain":
            plain_ms[mode] = found
        elif mode in plain_ms:
            row |= {f"{key} ratio": round(value / plain_ms[mode][key], 3) for key, value in found.items()}
        row["counters"] = {
            key: dict(value) for key, value in counters.items() if key in ("stats", "inductor", "frames")
        }

    for mode in MODES if board.all else MODES[-1:]:
        for name in METHODS if board.all else FIRST:
            board.row(f"{mode or 'eager'}: {name}", lambda row, mode=mode, name=name: run(row, mode, name))
