"""Kernels of a step, beside a plain one's, and where the CPU waits for the device."""

from __future__ import annotations

from collections import Counter

from device.board import Board, Row
from device.fits import STEP, Traced, Window, compressed_fit, large, syncs, traced
from step.methods import PLAIN, Method

__all__ = ["measure"]

WARM = 4
FIRST = ("uniform 8 bit", "binary", "movement 0.5", "codebook 16")


def measure(board: Board) -> None:
    net = large(board.small)
    plain, steps = Traced(), 3 if board.all else 1

    def count(row: Row, method: Method, found: Traced) -> None:
        lines: Counter[str] = Counter()
        middle, last = WARM + steps, WARM + 2 * steps
        windows = [
            Window(WARM, middle, lambda: traced(found, board.device)),
            Window(middle, last, lambda: syncs(lines, board.device)),
        ]
        compressed_fit(net, method, board.device, windows, last + 1, precision="bf16-mixed")
        row["kernels a step"] = round(sum(found.kernels.values()) / steps, 1)
        row["busy ms a step"] = round(found.busy / steps / 1e3, 3)
        row["launch calls a step"] = round(found.launches / steps, 1)
        row["waits a step (profiler)"] = round(found.waits / steps, 1)
        row["syncs a step (debug mode)"] = round(sum(lines.values()) / steps, 1)
        row["syncs by line"] = {line: round(number / steps, 1) for line, number in lines.most_common(20)}
        names = Counter(found.kernels)
        if found is not plain:
            weights = tensors_of(board)
            more = sum(found.kernels.values()) - sum(plain.kernels.values())
            row["more kernels a step"] = round(more / steps, 1)
            row["more kernels a tensor"] = round(more / steps / weights, 2)
            row["more syncs a tensor"] = round((found.waits - plain.waits) / steps / weights, 2)
            row["more busy ms a step"] = round((found.busy - plain.busy) / steps / 1e3, 3)
            names.subtract(plain.kernels)
        row["kernels by name"] = {name[:120]: round(number / steps, 1) for name, number in names.most_common(15)}

    board.row("plain", lambda row: count(row, PLAIN, plain))
    for name, method in STEP.items() if board.all else [(name, STEP[name]) for name in FIRST]:
        board.row(name, lambda row, method=method: count(row, method, Traced()))


def tensors_of(board: Board) -> int:
    """How many tensors the slots take."""
    return 4 * (2 if board.small else 12) + 1
