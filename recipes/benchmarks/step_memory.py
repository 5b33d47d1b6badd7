"""What compression costs in memory while a network is trained: peak beyond the plain run's, in multiples of the weights.

    python recipes/benchmarks/step_memory.py [--millions 1 10 100] [--methods movement] [--repeats 3]

Ten equal linear layers, SGD without momentum, a batch of one: a plain step holds the weights and their gradients. Each fit
has a process of its own, in which a small one comes first, so that everything is imported; then the peak of the resident
set is set back (Linux). Large tensors go back to the system as they are freed (MALLOC_MMAP_THRESHOLD_), so that the peak is
that of what is alive. Scores and their optimizer's state are told apart. Writes recipes/results/step_memory.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import statistics
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from lightning import Trainer
from rich.progress import Progress
from step.fits import machine
from step.methods import METHODS, PLAIN, Method, levels
from step.nets import Fit
from torch import nn
from torch.utils.data import DataLoader

from psc_lightning.strict_json import json_text
from psc_lightning.training.conductor import Conductor

LAYERS = 10
STEPS = 3
CHOSEN: dict[str, Method] = {
    "plain": PLAIN,
    "plain again": PLAIN,
    **{name: METHODS[name] for name in ("uniform 8 bit", "binary", "codebook 16")},
    "codebook 256": Method(lambda net: [levels("codebook", k=256)]),
    **{name: METHODS[name] for name in ("magnitude 0.5", "movement 0.5", "row + magnitude 0.5 + uniform")},
}
#: multiples of the weights' bytes: beside scores, and of scores with their optimizer's state
GOALS = {name: (2, 0) for name in CHOSEN if not name.startswith("plain")}
GOALS |= {"movement 0.5": (2, 3), "row + magnitude 0.5 + uniform": (3, 0)}


class Plain(Fit):
    """Trained by SGD without momentum."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def train(method: Method, millions: float) -> Trainer:
    side = int((millions * 1e6 / LAYERS) ** 0.5)
    net = nn.Sequential(*(nn.Linear(side, side, bias=False) for _ in range(LAYERS)))
    trainer = Trainer(
        max_epochs=1,
        callbacks=method.callbacks(net),
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = [(torch.randn(1, side), torch.zeros(1, dtype=torch.long))] * STEPS
    trainer.fit(Plain(net, adam=False), DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    return trainer


def resident(key: str) -> int:
    """Bytes of memory of this process: `VmRSS` now, `VmHWM` at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def measure(method: Method, millions: float) -> dict[str, int]:
    """In a process of its own: by how much memory grew at most, and the bytes of what is trained beside the weights."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    train(method, 0.01)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    trainer = train(method, millions)
    peak = resident("VmHWM") - before
    sidecars = Conductor.of(trainer).cast.sidecars
    states = sidecars.optimizer.state.values() if sidecars.optimizer is not None else []
    tensors = [*sidecars.parameters, *(value for state in states for value in state.values() if value.numel() > 1)]
    return {"peak": peak, "sidecars": sum(tensor.nbytes for tensor in tensors)}


def fresh(name: str, millions: float) -> dict[str, int]:
    """`measure` in a new process."""
    command = [sys.executable, __file__, "--one", name, "--millions", str(millions)]
    heap = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env={**os.environ, **heap}, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", nargs="+", type=float, default=[1, 10, 100], help="weights (default: 1 10 100)")
    parser.add_argument("--methods", nargs="+", metavar="PART", help="rows with one of these in their names")
    parser.add_argument("--repeats", type=int, default=3, help="processes a cell (default: 3)")
    results = Path(__file__).resolve().parents[1] / "results"
    parser.add_argument("--out", type=Path, default=results / "step_memory.md", help="the table's file")
    parser.add_argument("--one", choices=CHOSEN, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json_text(measure(CHOSEN[args.one], args.millions[0]), indent=None))
        return
    chosen = [name for name in CHOSEN if name != "plain" and any(part in name for part in args.methods or [""])]
    cells: dict[str, list[str]] = {name: [] for name in chosen}
    with Progress() as progress:
        task = progress.add_task("", total=(1 + len(chosen)) * len(args.millions) * args.repeats)
        for millions in args.millions:
            dense = 4 * LAYERS * int((millions * 1e6 / LAYERS) ** 0.5) ** 2
            plain = 0.0
            for name in ["plain", *chosen]:
                progress.update(task, description=f"{millions:g} M: {name}")
                found = []
                for _ in range(args.repeats):
                    found.append(fresh(name, millions))
                    progress.advance(task)
                peak = statistics.median(one["peak"] for one in found)
                if name == "plain":
                    plain = peak
                    progress.console.print(f"{millions:g} M: plain {plain / dense:.2f} times the weights")
                    continue
                beside = found[0]["sidecars"] / dense
                extra = (peak - plain) / dense
                cells[name].append(f"{extra - beside:.2f}" + (f" + {beside:.2f}" if beside >= 0.005 else ""))
                progress.console.print(f"{millions:g} M: {name:32} {cells[name][-1]}", highlight=False)
    lines = [
        "# Extra peak memory of a training step",
        "",
        "Multiples of the weights' bytes beyond a plain run (weights and gradients: SGD without momentum); + what is trained",
        f"beside them (scores) with its optimizer's state. Median of {args.repeats} processes a cell; {LAYERS} equal linear",
        f"layers, batch of one; {machine().rsplit(',', 1)[0]}. By",
        f"`{shlex.join(['python', 'recipes/benchmarks/step_memory.py', *sys.argv[1:]])}`.",
        "",
        f"| method | {' | '.join(f'{millions:g} M' for millions in args.millions)} | goal |",
        "|---|" + "--:|" * (1 + len(args.millions)),
    ]
    for name, row in cells.items():
        rest, scores = GOALS.get(name, (0, 0))  # plain again: none
        lines.append(f"| {name} | {' | '.join(row)} | {rest}{f' + {scores}' if scores else ''} |")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
