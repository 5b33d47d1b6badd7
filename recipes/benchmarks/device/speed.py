"""How long a step takes beside a plain one, in turn, in one process."""

from __future__ import annotations

import statistics
from functools import partial

import torch
from device.board import Board, Row
from device.fits import OURS_4_BIT, STEP, Clock, compressed_fit, large
from step.methods import PLAIN, Method
from step.peers import torchao

__all__ = ["measure"]

WARM, STEPS, TURNS = 6, 20, 3
OURS = "ours: uniform 4 bit, the same layers"
FIRST = ("uniform 8 bit", "binary", "movement 0.5", "torchao QAT, int4", OURS, "codebook 16")

PEERS = {
    "torchao QAT, int4": Method(change=partial(torchao, dtype=torch.int4)),
    "torchao QAT, int8": Method(change=partial(torchao, dtype=torch.int8)),
    OURS: OURS_4_BIT,
}


def measure(board: Board) -> None:
    net = large(board.small)
    warm, steps, turns = (2, 4, 1) if board.small else (WARM, STEPS, TURNS) if board.all else (4, 10, 2)

    def one(method: Method) -> dict[str, float]:
        clock = Clock(warm, warm + steps)
        compressed_fit(net, method, board.device, [clock], warm + steps + 1, precision="bf16-mixed")
        return clock.found()

    def compare(row: Row, method: Method) -> None:
        pairs = []
        while len(pairs) < turns and not (pairs and board.late):
            order = [method, PLAIN] if len(pairs) % 2 else [PLAIN, method]
            found = [one(each) for each in order]
            pairs.append((found[0], found[1]) if len(pairs) % 2 else (found[1], found[0]))
        row["pairs"] = len(pairs)
        for clock in ("gpu", "cpu", "wall"):
            ratios = [ours[clock] / plain[clock] for ours, plain in pairs]
            row[f"{clock} ratio"] = round(statistics.median(ratios), 3)
            row[f"{clock} low – high"] = f"{min(ratios):.2f} – {max(ratios):.2f}"
            row[f"{clock} ms"] = round(statistics.median(ours[clock] for ours, _ in pairs), 3)
            row[f"{clock} ms, plain"] = round(statistics.median(plain[clock] for _, plain in pairs), 3)

    board.row("(the first fits, which load libraries)", lambda row: row.update({"times": one(PLAIN)}))
    methods = {**STEP, **PEERS}
    methods["codebook 16"] = methods.pop("codebook 16")  # last: its start takes longer than the steps
    for name, method in methods.items() if board.all else [(name, methods[name]) for name in FIRST]:
        board.row(name, lambda row, method=method: compare(row, method))
