"""CPU seconds and memory of writing and reading a file, and whether both grow no faster than the model.

    python recipes/benchmarks/file_speed.py [--encoder model.safetensors] [--millions 1 10 100 200]

First a transformer of 22.7 million entries (`--encoder`: this one; else random numbers in the same shapes), half of them
zero, in 16 levels; then single matrices. Each is compressed once, then written and read in a process of its own, one
thread, several times; memory is the peak beyond what was held before, as a multiple of the dense tensors' bytes. Last,
what reading takes beside a copy of the dense tensor in memory, where symbols are read without the coder. Writes
recipes/results/file_speed.md; `--only copies` renews its last table alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import psc_lightning
from psc_lightning import MaskLearning, StraightThroughQuantization

_COPIES = "## Beside a copy in memory"


def transformer(weights: Path | None) -> dict[str, Tensor]:
    """The tensors of a six-layer encoder of width 384, with its table of 30,522 words."""
    if weights is not None:
        import safetensors.torch

        return {
            name: value for name, value in safetensors.torch.load_file(weights).items() if value.is_floating_point()
        }
    shapes = {"words.weight": (30522, 384), "positions.weight": (512, 384)}
    for i in range(6):
        shapes |= {f"{i}.{name}.weight": (384, 384) for name in ("query", "key", "value", "output")}
        shapes |= {f"{i}.up.weight": (1536, 384), f"{i}.down.weight": (384, 1536)}
    return {name: torch.randn(shape) * 0.05 for name, shape in shapes.items()}


def compressed(tensors: dict[str, Tensor]) -> nn.Module:
    """A model of these tensors, half of the entries of each matrix zero, in 16 levels."""
    model = nn.Module()
    for name, value in tensors.items():
        holder = nn.Module()
        holder.register_parameter("weight", nn.Parameter(value))
        model.add_module(name.replace(".", "_"), holder)
    mask, levels = MaskLearning("magnitude", threshold=0.5), StraightThroughQuantization("codebook", k=16)
    psc_lightning.compress(model, [mask, levels])
    return model


def matrix(millions: int) -> dict[str, Tensor]:
    return {"matrix": torch.randn(1000 * millions, 1000) * 0.05}


def watched(run: Callable[[], object], dense: int) -> tuple[float, float]:
    """CPU seconds of `run`, and how many times `dense` bytes the memory grew at its largest."""
    stop, peak = threading.Event(), [held()]
    watcher = threading.Thread(target=lambda: [peak.append(held()) for _ in iter(lambda: stop.wait(0.005), True)])
    watcher.start()
    start = time.process_time()
    run()
    seconds = time.process_time() - start
    stop.set()
    watcher.join()
    return seconds, (max(peak) - peak[0]) / dense


def held() -> int:
    """Bytes of memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def work(make: Callable[[], dict[str, Tensor]], folder: str, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """In a process of its own: write and read so often."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tensors = make()
    dense = sum(value.nbytes for value in tensors.values())
    model, path = compressed(tensors), Path(folder, "model.psc")
    del tensors
    psc_lightning.save(nn.Linear(2, 2), path)  # imports
    psc_lightning.load(path)
    found: dict[str, list[tuple[float, float]]] = {"save": [], "load": []}
    for _ in range(repeats):
        found["save"].append(watched(lambda: psc_lightning.save(model, path), dense))
        found["load"].append(watched(lambda: psc_lightning.load(path), dense))
    return found


def matrices() -> dict[str, nn.Module]:
    """Of 20 million entries each."""
    binary, sixteen, plain = (nn.Linear(1000, 20_000, bias=False) for _ in range(3))
    psc_lightning.compress(binary, [StraightThroughQuantization("binary")])
    psc_lightning.compress(sixteen, [StraightThroughQuantization("codebook", k=16)])
    return {
        "binary, 20 M, no mask": binary,
        "16 levels, 20 M, no mask": sixteen,
        "dense float32 leftovers, 20 M": plain,
    }


def copies(folder: str, repeats: int) -> list[str]:
    """In a process of its own: for each of them a row, load and copy in turn, CPU time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name, model in matrices().items():
        path = Path(folder, "model.psc")
        report = psc_lightning.save(model, path)
        (dense,) = psc_lightning.load(path).values()
        read = partial(psc_lightning.load, path)
        loads, clones = zip(*((timed(read), timed(dense.clone)) for _ in range(repeats)), strict=True)
        load, clone = statistics.median(loads), statistics.median(clones)
        cells = [
            name,
            f"{report.file_bytes / 1e6:.2f}",
            f"{1e3 * load:.0f}",
            f"{1e3 * clone:.0f}",
            f"{load / clone:.1f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return rows


def timed(run: Callable[[], object]) -> float:
    """CPU seconds of `run`."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--encoder", type=Path, help="a safetensors file of such a transformer (default: random numbers)"
    )
    parser.add_argument("--millions", type=int, nargs="*", default=[1, 10, 100], help="entries (default: 1 10 100)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements a row (default: 3)")
    parser.add_argument("--only", choices=("models", "copies"), help="one of the two tables, the other as it is")
    args = parser.parse_args()
    path = Path(__file__).parents[1] / "results" / "file_speed.md"
    first, _, second = path.read_text().partition(_COPIES) if path.exists() else ("", "", "")
    if args.only != "copies":
        first = models(args) + "\n"
    if args.only != "models":
        with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
            rows = pool.apply(copies, (folder, 5 * args.repeats))
        head = [
            f"CPU ms, one thread, median of {5 * args.repeats} repeats in turn; a copy is a clone of the dense tensor.",
            "",
            "| file | MB | load, ms | copy, ms | load / copy |",
            "|---|--:|--:|--:|--:|",
        ]
        second = "\n".join(["", "", *head, *rows, ""])
    path.write_text(first + _COPIES + second)
    print(path)


def models(args: argparse.Namespace) -> str:
    """The first table."""
    makes = {"transformer": partial(transformer, args.encoder)}
    makes |= {f"{n} M": partial(matrix, n) for n in args.millions}
    options = " --encoder WEIGHTS" * bool(args.encoder) + f" --millions {' '.join(map(str, args.millions))}"
    lines = [
        "# Writing and reading a file",
        "",
        f"CPU seconds, and peak memory beside the dense tensors' bytes, one thread, median of {args.repeats} repeats; half",
        f"of the entries zero, 16 levels. By `python recipes/benchmarks/file_speed.py{options} --repeats {args.repeats}`.",
        "",
        "| model | save, s | ns an entry | memory | load, s | ns an entry | memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, make in makes.items():
        entries = sum(value.numel() for value in make().values())
        with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(work, (make, folder, args.repeats))
        cells = [name]
        for kind in ("save", "load"):
            seconds, memory = (statistics.median(column) for column in zip(*found[kind], strict=True))
            cells += [f"{seconds:.2f}", f"{1e9 * seconds / entries:.0f}", f"{memory:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
