"""A fit on a device, and what watches its steps: times, kernels, and where the CPU waits."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from step.methods import AT_ONCE, METHODS, PLAIN, Method, levels
from step.nets import Batch, Fit, Net, encoder, numbers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

__all__ = ["STEP", "Clock", "Losses", "Traced", "Window", "built", "fit", "large", "quiet", "syncs", "traced"]

#: what a step is measured with, the shortest names of a table
STEP: dict[str, Method] = {
    "plain again": PLAIN,
    **{name: METHODS[name] for name in ("uniform 8 bit", "binary", "ternary", "log", "magnitude 0.5", "movement 0.5")},
    "row + magnitude 0.5 + uniform": METHODS["row + magnitude 0.5 + uniform"],
    "clipping layer": METHODS["clipping layer"],
    "codebook 16": METHODS["codebook 16"],
}

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
ROOT = Path(__file__).resolve().parents[3]


def large(small: bool, layers: int = 12) -> Net:
    """The encoder that a step is measured on."""
    if small:
        net, batches = (64, 4, 2, 8), numbers(4, 8, 64)
    else:
        net, batches = (768, 12, layers, 128), numbers(32, 128, 768)
    width, heads, depth, length = net
    return Net(
        f"encoder {depth} × {width}, batch {4 if small else 32} × {length}",
        lambda: nn.Sequential(encoder(width, heads, depth), nn.Flatten(), nn.Linear(width * length, 10)),
        batches,
        adam=True,
    )


def built(net: Net, device: str) -> tuple[nn.Module, list[Batch]]:
    """The network and its batches, made where they are used, from one seed."""
    torch.manual_seed(0)
    with torch.device(device):
        return net.build(), net.batches()


class Stay(SingleDeviceStrategy):
    """Leaves model and optimizer on the device after a fit: to move a gigabyte takes longer than the steps."""

    def teardown(self) -> None:
        self.precision_plugin.teardown()


def fit(
    module: LightningModule,
    batches: Sequence[Batch],
    steps: int,
    device: str,
    callbacks: Sequence[Callback] = (),
    stay: bool = True,
    **options: Any,
) -> Trainer:
    """So many steps under a Trainer; batches repeat."""
    options.setdefault("deterministic", False)  # said, since None leaves what an earlier Trainer set
    trainer = Trainer(
        max_epochs=1,
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        strategy=Stay(torch.device(device, 0) if device == "cuda" else torch.device(device)) if stay else "auto",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    data = [batches[index % len(batches)] for index in range(steps)]
    loader = torch.utils.data.DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader)
    return trainer


def quiet() -> None:
    """No advice from Lightning."""
    import logging

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Window(Callback):
    """Holds a context open from the start of one batch to the start of another: whole steps, with all callbacks."""

    def __init__(self, first: int, last: int, manager: Callable[[], AbstractContextManager[Any]]) -> None:
        self.first, self.last, self.manager = first, last, manager
        self.open: AbstractContextManager[Any] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            wait(pl_module.device.type)
            self.open = self.manager()
            self.open.__enter__()
        elif batch_idx == self.last:
            wait(pl_module.device.type)
            self.close()

    def close(self) -> None:
        if self.open is not None:
            self.open.__exit__(None, None, None)
        self.open = None

    def on_exception(self, *args: Any) -> None:
        self.close()


class Clock(Callback):
    """Milliseconds of a step between two batches: by events on the device, by the wall's clock, and of all CPU threads."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.events: list[Any] = []
        self.stamps: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self.first <= batch_idx <= self.last:
            return
        cuda = pl_module.device.type == "cuda"
        if batch_idx in (self.first, self.last):
            wait(pl_module.device.type)
            self.stamps.append((time.perf_counter(), time.process_time()))
        if cuda:
            self.events.append(torch.cuda.Event(enable_timing=True))
            self.events[-1].record()

    def found(self) -> dict[str, float]:
        """Of a step: the median by events, the means of the others."""
        (wall, cpu), (wall_end, cpu_end) = self.stamps
        number = self.last - self.first
        times = {"wall": 1e3 * (wall_end - wall) / number, "cpu": 1e3 * (cpu_end - cpu) / number}
        if self.events:
            torch.cuda.synchronize()
            pairs = zip(self.events, self.events[1:])
            times["gpu"] = statistics.median(before.elapsed_time(after) for before, after in pairs)
        else:
            times["gpu"] = times["wall"]
        return times


class Losses(Callback):
    """Every step's loss, and where the Parameters lay."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.places: set[tuple[int, ...]] = set()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach().clone())
        self.places.add(tuple(parameter.data_ptr() for parameter in pl_module.parameters()))

    def numbers(self) -> list[float]:
        return torch.stack(self.losses).float().tolist()


@contextmanager
def syncs(found: Counter[str], device: str) -> Iterator[None]:
    """Count, by line, where the CPU waits for the device."""
    if device != "cuda":
        yield
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for one in seen:
        if "synchronizing CUDA operation" in str(one.message):
            path = Path(one.filename)
            inside = path.is_relative_to(ROOT) and "site-packages" not in path.parts
            short = path.relative_to(ROOT) if inside else Path(*path.parts[-3:])
            found[f"{short}:{one.lineno}"] += 1


class Traced:
    """Of some steps: the kernels by name, their time, launches and waits."""

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.busy = 0.0  # microseconds

    @property
    def launches(self) -> int:
        return sum(count for name, count in self.calls.items() if name.startswith(LAUNCHES))

    @property
    def waits(self) -> int:
        return sum(self.calls[name] for name in WAITS)


@contextmanager
def traced(found: Traced, device: str) -> Iterator[None]:
    """Record what the device does; on the CPU, to try the script, torch's operations stand for kernels."""
    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        yield
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    for event in events:
        kind, name = event.get("cat"), event.get("name", "")
        if kind in (("kernel", "gpu_memcpy", "gpu_memset") if cuda else ("cpu_op",)):
            found.kernels[name] += 1
            found.busy += event.get("dur", 0.0)
        elif kind in ("cuda_runtime", "cuda_driver"):
            found.calls[name] += 1


def compressed_fit(
    net: Net, method: Method, device: str, callbacks: Sequence[Callback], steps: int, **options: Any
) -> None:
    """A fit of a new network with a method."""
    model, batches = built(net, device)
    method.change(model)
    fit(Fit(model, net.adam), batches, steps, device, [*method.callbacks(model), *callbacks], **options)


#: on the layers that others can change, too
OURS_4_BIT = Method(lambda net: [levels("uniform", AT_ONCE, bits=4, targets=linear_names(net))])


def linear_names(net: nn.Module) -> list[str]:
    return [f"net.{name}.weight" for name, layer in net.named_modules() if type(layer) is nn.Linear]
