"""CPU seconds of a training step, of a prediction and of a copy, each beside its twin in the same process."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from step.methods import Method
from step.nets import Fit, Net
from torch.utils.data import DataLoader

from psc_lightning import attach
from psc_lightning.slots.live import compressed

__all__ = ["WARM", "bandwidth", "machine", "pairs", "predictions", "spread"]

WARM = 4  # steps of a fit that are not measured: memory is laid out, labels are seen, a ramp begins


class Clock(Callback):
    """CPU time at the start of each batch of the last epoch: from one to the next is a whole step, with all callbacks."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_train_epoch_start(self, *args: Any) -> None:
        self.stamps.clear()

    def on_train_batch_start(self, *args: Any) -> None:
        self.stamps.append(time.process_time())

    def step(self) -> float:
        """The median step."""
        return statistics.median(after - before for before, after in zip(self.stamps[WARM:], self.stamps[WARM + 1 :]))


def fit(net: Net, method: Method, steps: int, before: int) -> float:
    """CPU seconds of the median step of a fit, after so many epochs that are not measured."""
    torch.manual_seed(0)
    built, batches, clock = net.build(), net.batches(), Clock()
    method.change(built)
    trainer = Trainer(
        max_epochs=1 + before,
        callbacks=[*method.callbacks(built), clock],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = [batches[index % len(batches)] for index in range(WARM + steps + 1)]
    gc.collect()
    trainer.fit(Fit(built, net.adam), DataLoader(data, batch_size=None))  # type: ignore[arg-type]
    return clock.step()


def pairs(net: Net, method: Method, plain: Method, steps: int, turns: int) -> Iterator[tuple[float, float]]:
    """CPU seconds of a step with a method and without, in turn; who is first takes turns, too."""
    for turn in range(turns):
        order = [method, plain] if turn % 2 else [plain, method]
        found = [fit(net, one, steps, method.before) for one in order]
        yield (found[0], found[1]) if turn % 2 else (found[1], found[0])


@torch.no_grad()
def predictions(net: Net, method: Method, steps: int, turns: int) -> list[tuple[float, float]]:
    """CPU seconds of a forward pass in eval of a live model, and of its plain twin, in turn."""
    torch.manual_seed(0)
    plain, x = net.build().eval(), net.batches()[0][0]
    live = deepcopy(plain)
    attach(live, method.callbacks(live))
    for _, tensor, parameter in compressed(live):
        tensor.harden(parameter)

    def seconds(model: torch.nn.Module, runs: int) -> float:
        times = []
        for _ in range(runs):
            start = time.process_time()
            model(x)
            times.append(time.process_time() - start)
        return statistics.median(times)

    seconds(live, steps)
    runs = max(steps, int(0.2 / seconds(plain, steps)))  # of a small net many
    found = []
    for turn in range(turns):
        order = [live, plain] if turn % 2 else [plain, live]
        times = [seconds(model, runs) for model in order]
        found.append((times[0], times[1]) if turn % 2 else (times[1], times[0]))
    return found


def bandwidth(repeats: int = 9) -> float:
    """Bytes a second, read and written, of copying 400 MB, much more than a cache holds."""
    source, target = torch.ones(100_000_000), torch.zeros(100_000_000)
    times = []
    for _ in range(repeats):
        start = time.process_time()
        target.copy_(source)
        times.append(time.process_time() - start)
    return 2 * source.nbytes / statistics.median(times)


def spread(found: list[tuple[float, float]]) -> tuple[float, float, float]:
    """The median, lowest and highest ratio of pairs."""
    ratios = [one / other for one, other in found]
    return statistics.median(ratios), min(ratios), max(ratios)


def machine() -> str:
    """What it ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    heap = "one untrimmed heap" if "MALLOC_TRIM_THRESHOLD_" in os.environ else "the allocator as it comes"
    return f"{names[0] if names else platform.processor() or platform.machine()}, torch {torch.__version__}, {heap}"
