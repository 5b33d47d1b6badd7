"""What a compressed run costs beside one without compression, from start to report: CPU time of whole commands.

    python recipes/benchmarks/run_cost.py --data DIR --checkpoint resnet20-12fca82f.th

CIFAR-10, ResNet-20: `train.py compression=binary`, as in the table of accuracies, and `compression=none` take turns, each in
a process of its own, one thread. `--share` takes that much of an epoch, of BatchNorm's batches and of the test images, which
leaves what is done once a run (compressing, writing, reading) its full weight: the ratio is then a little too high. Writes
recipes/results/run_cost.md.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BATCHES = 391  # of 128 images in an epoch
TESTS = 10  # of 1,000 images
SETTLED = 256  # batches that BatchNorm's statistics are taken anew on, as for the table of accuracies


def seconds(overrides: list[str], folder: Path) -> float:
    """CPU seconds of a run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "train.py", *overrides, f"hydra.run.dir={folder}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar-10-batches-bin/")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the trained ResNet-20")
    parser.add_argument("--share", type=float, default=1.0, help="of an epoch, 0 … 1 (default: 1)")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs (default: 3)")
    args = parser.parse_args()
    batches, tests = max(1, round(args.share * BATCHES)), max(1, round(args.share * TESTS))
    common = ["experiment=cifar10_resnet20", f"model.checkpoint={args.checkpoint.resolve()}"]
    common += [f"data.folder={args.data.resolve()}/cifar-10-batches-bin", f"trainer.limit_train_batches={batches}"]
    common += [f"trainer.limit_test_batches={tests}"]
    settled = f"batchnorm={max(1, round(args.share * SETTLED))}"
    compressed = ["compression=binary", "schedule=constant", settled]
    ratios, seen = [], []
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(args.pairs):
            plain = seconds([*common, "compression=none"], Path(folder, f"{pair}-none"))
            ours = seconds([*common, *compressed], Path(folder, f"{pair}-binary"))
            ratios.append(ours / plain)
            seen.append(f"| {pair + 1} | {plain:.0f} s | {ours:.0f} s | {ratios[-1]:.3f} |")
            print(seen[-1], flush=True)
    lines = [
        "# CPU time of a compressed run over one without compression",
        "",
        f"CIFAR-10, ResNet-20, 3 epochs, from start to report, one thread; `compression=binary` {settled}; by",
        f"`python recipes/benchmarks/run_cost.py --data DIR --checkpoint FILE --share {args.share:g} --pairs {args.pairs}`.",
        "",
        "| pair | none | binary | ratio |",
        "|--:|--:|--:|--:|",
        *seen,
        f"| median | | | {statistics.median(ratios):.3f} |",
    ]
    path = ROOT / "recipes" / "results" / "run_cost.md"
    path.write_text("\n".join(lines) + "\n")
    print(path)


if __name__ == "__main__":
    main()
