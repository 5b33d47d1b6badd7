"""What a compressed training step costs: CPU time of a fit over that of the same fit without our callbacks.

    python recipes/benchmarks/step_cost.py

ResNet-20 (batch 64) and a 6-layer, 384-wide transformer encoder (batch 8 × 64), one thread, random inputs (the numbers do
not depend on them). Plain and compressed fits take turns in one process, so that a drift of the machine's speed meets
both; a row is the median ratio over the pairs. A quiet machine and one untrimmed heap (MALLOC_ARENA_MAX=1
MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=4294967296) make it repeatable to about 2 %.
Writes recipes/results/step_cost.md.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from psc_lightning import MaskLearning, StraightThroughQuantization, WeightSharing
from psc_lightning.app.models import ResNet20

METHODS: dict[str, Callable[[], list[Callback]]] = {
    "plain again": list,
    "mask magnitude 0.8": lambda: [MaskLearning("magnitude", 0.8, schedule="constant")],
    "mask movement 0.8": lambda: [MaskLearning("movement", 0.8, schedule="constant")],
    "uniform 8 bit": lambda: [StraightThroughQuantization("uniform", schedule="constant")],
    "binary": lambda: [StraightThroughQuantization("binary", schedule="constant")],
    "ternary": lambda: [StraightThroughQuantization("ternary", schedule="constant")],
    "log": lambda: [StraightThroughQuantization("log", schedule="constant")],
    "codebook 16": lambda: [StraightThroughQuantization("codebook", schedule="constant")],
    "row + mask + uniform": lambda: [
        WeightSharing("row", schedule="constant"),
        MaskLearning("magnitude", 0.5, schedule="constant"),
        StraightThroughQuantization("uniform", schedule="constant"),
    ],
    "binary, ramped": lambda: [StraightThroughQuantization("binary", schedule="linear")],
}


class Fit(LightningModule):
    """A network and SGD."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def resnet20() -> tuple[nn.Module, torch.Tensor, int]:
    return ResNet20(10).to(memory_format=torch.channels_last), torch.randn(64, 3, 32, 32), 64


def transformer() -> tuple[nn.Module, torch.Tensor, int]:
    layer = nn.TransformerEncoderLayer(384, 6, 1536, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Flatten(), nn.Linear(384 * 64, 10)), torch.randn(8, 64, 384), 8


def fit(model: Callable[[], tuple[nn.Module, torch.Tensor, int]], callbacks: list[Callback], steps: int) -> float:
    """CPU seconds of a fit of so many steps."""
    torch.manual_seed(0)
    net, x, batch = model()
    data = TensorDataset(x.repeat(steps, *[1] * (x.dim() - 1)), torch.randint(0, 10, (steps * batch,)))
    trainer = Trainer(
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.process_time()
    trainer.fit(Fit(net), DataLoader(data, batch_size=batch))
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=7, help="pairs of fits a row (default: 7)")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps a fit (default: 8)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    ratios: dict[str, dict[str, list[float]]] = {}
    for model in (resnet20, transformer):
        fit(model, [], 2)
        for name, callbacks in METHODS.items():
            pairs = []
            for turn in range(args.pairs):
                order = [[], callbacks()] if turn % 2 else [callbacks(), []]
                times = (
                    {bool(chosen): fit(model, chosen, args.steps) for chosen in order}
                    if name != "plain again"
                    else {
                        True: fit(model, [], args.steps),
                        False: fit(model, [], args.steps),
                    }
                )
                pairs.append(times[True] / times[False])
            ratios.setdefault(name, {})[model.__name__] = pairs
            print(f"{model.__name__:12} {name:24} {statistics.median(pairs):.3f}", flush=True)
    lines = [
        "# CPU time of a compressed fit over a plain one",
        "",
        f"Median (lowest – highest) of {args.pairs} pairs, {args.steps} steps a fit, one thread, torch {torch.__version__},",
        f"by `python recipes/benchmarks/step_cost.py --pairs {args.pairs} --steps {args.steps}`.",
        "",
        "| method | ResNet-20, batch 64 | transformer 6 × 384, batch 8 × 64 |",
        "|---|--:|--:|",
    ]
    for name, row in ratios.items():
        shown = [f"{statistics.median(r):.3f} ({min(r):.2f} – {max(r):.2f})" for r in row.values()]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    folder = Path(__file__).resolve().parents[1] / "results"
    folder.mkdir(exist_ok=True)
    (folder / "step_cost.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
