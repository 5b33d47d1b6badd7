"""How much faster a convolution under `separable` sharing runs in onnxruntime, exported as two convolutions.

    python recipes/benchmarks/separable_speed.py

A dense 3×3 or 5×5 convolution and its rank-1 form (depthwise, then pointwise), one thread, CPU time. Both sessions take
turns in one process, so that a drift of the machine's speed meets both; a row is the median over the repeats.
Writes recipes/results/separable_speed.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

import psc_lightning

WIDTHS = ((16, 32), (32, 32), (64, 16), (128, 16), (256, 8))  # channels, side of the image


def sessions(kernel: int, width: int, side: int) -> list[onnxruntime.InferenceSession]:
    """The dense convolution's session, and the separable one's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(width, width, kernel, padding=kernel // 2))
    example = torch.zeros(1, width, side, side)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for separable in (False, True):
            if separable:
                psc_lightning.compress(model, "separable", rank=1)
            psc_lightning.export_onnx(model, Path(folder, "model.onnx"), example)
            made.append(
                onnxruntime.InferenceSession(Path(folder, "model.onnx"), options, providers=["CPUExecutionProvider"])
            )
    return made


def cpu_time(session: onnxruntime.InferenceSession, x: np.ndarray, runs: int) -> float:
    """CPU seconds of so many runs."""
    feed = {session.get_inputs()[0].name: x}
    start = time.process_time()
    for _ in range(runs):
        session.run(None, feed)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="measurements a row (default: 15)")
    parser.add_argument("--seconds", type=float, default=0.05, help="CPU time of one measurement (default: 0.05)")
    args = parser.parse_args()
    rows = []
    for kernel in (3, 5):
        for width, side in WIDTHS:
            dense, separable = sessions(kernel, width, side)
            x = np.random.default_rng(0).standard_normal((1, width, side, side), dtype=np.float32)
            runs = max(1, int(args.seconds / max(cpu_time(dense, x, 5) / 5, 1e-6)))
            pairs = [(cpu_time(dense, x, runs), cpu_time(separable, x, runs)) for _ in range(args.repeats)]
            times = [1e6 * statistics.median(column) / runs for column in zip(*pairs)]
            ratios = [one / other for one, other in pairs]
            rows.append(
                f"| {kernel}×{kernel} | {width} | {side}×{side} | {times[0]:.0f} | {times[1]:.0f} | "
                f"{statistics.median(ratios):.1f} ({min(ratios):.1f} – {max(ratios):.1f}) |"
            )
            print(rows[-1], flush=True)
    lines = [
        "# Speed-up of a separable convolution in onnxruntime",
        "",
        f"CPU time of one image, one thread, median of {args.repeats} repeats; speed-up: median (lowest – highest) of the",
        f"pairs. onnxruntime {onnxruntime.__version__}.",
        f"By `python recipes/benchmarks/separable_speed.py --repeats {args.repeats}`.",
        "",
        "| kernel | channels | image | dense, µs | separable, µs | speed-up |",
        "|---|--:|--:|--:|--:|--:|",
        *rows,
    ]
    folder = Path(__file__).resolve().parents[1] / "results"
    folder.mkdir(exist_ok=True)
    (folder / "separable_speed.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
