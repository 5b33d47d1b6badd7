"""What compression costs before the first step: imports, attaching to a model of many layers, the start of a codebook.

    python recipes/benchmarks/start_up.py [--repeats 5]

CPU seconds, one thread, medians; imports in processes of their own. Writes recipes/results/start_up.md.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.progress import track
from step.fits import machine
from torch import nn

from psc_lightning import StraightThroughQuantization, attach, plan
from psc_lightning.slots.live import compressed


def imported(modules: str) -> float:
    """CPU seconds of a new Python that imports these."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def timed(run: Callable[[], object]) -> float:
    """CPU seconds."""
    start = time.process_time()
    run()
    return time.process_time() - start


def layers() -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(1000)))


def planned() -> float:
    """A plan of 1,000 layers."""
    model = layers()
    return timed(lambda: plan(model, [StraightThroughQuantization("uniform")]))


def attached() -> float:
    """The slots of 1,000 layers."""
    model = layers()
    return timed(lambda: attach(model, [StraightThroughQuantization("uniform")]))


def begun(model: nn.Module, callback: StraightThroughQuantization) -> float:
    """From attached slots, still off, to hard weights."""
    attach(model, [callback])
    return timed(lambda: [tensor.harden(parameter) for _, tensor, parameter in compressed(model)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measurements a row (default: 5)")
    results = Path(__file__).resolve().parents[1] / "results"
    parser.add_argument("--out", type=Path, default=results / "start_up.md", help="the table's file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, tuple[Callable[[], float], str]] = {
        "`import lightning`": (lambda: imported("lightning"), ""),
        "`import lightning, psc_lightning.callbacks`": (
            lambda: imported("lightning, psc_lightning.callbacks"),
            "0.3 s more",
        ),
        "plan of 1,000 × Linear(64, 64)": (planned, "1 s with attaching"),
        "attaching to it": (attached, ""),
        "start of 1,000 × Linear(64, 64), uniform": (
            lambda: begun(layers(), StraightThroughQuantization("uniform")),
            "",
        ),
        "start of a codebook of 16, 10 M entries": (
            lambda: begun(nn.Sequential(nn.Linear(3200, 3125)), StraightThroughQuantization("codebook", k=16)),
            "1 s",
        ),
        "the same, of 256": (
            lambda: begun(nn.Sequential(nn.Linear(3200, 3125)), StraightThroughQuantization("codebook", k=256)),
            "",
        ),
    }
    found: dict[str, list[float]] = {name: [] for name in rows}
    for _ in track(range(args.repeats), description="starting"):  # in turn, so that all meet a drift of the machine
        for name, (measure, _) in rows.items():
            found[name].append(measure())
    lines = [
        "# What compression costs before the first step",
        "",
        f"CPU seconds, one thread, median (lowest – highest) of {args.repeats}; {machine()}.",
        f"By `{shlex.join(['python', 'recipes/benchmarks/start_up.py', *sys.argv[1:]])}`.",
        "",
        "| what | s | goal |",
        "|---|--:|--:|",
    ]
    for name, (_, goal) in rows.items():
        times = found[name]
        lines.append(f"| {name} | {statistics.median(times):.2f} ({min(times):.2f} – {max(times):.2f}) | {goal} |")
    plain, ours = (statistics.median(found[name]) for name in list(rows)[:2])
    lines += ["", f"Importing ours adds {ours - plain:.2f} s."]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[6:]), args.out, sep="\n")


if __name__ == "__main__":
    main()
