"""Accuracy and bytes of fine-tuned models, each run a `train.py` of its own.

    python recipes/benchmarks/accuracy.py digits
    python recipes/benchmarks/accuracy.py mnist --data DIR
    python recipes/benchmarks/accuracy.py cifar10 --data DIR --checkpoint resnet20-12fca82f.th

Writes recipes/results/STUDY.md and STUDY.json: a row a setting, mean ± standard deviation over its seeds, and the command
that makes a run. What is finished is not run again, so that it may be stopped at any time; `--only` and `--seeds` narrow
it. Settings were chosen without the test sets, each of which is read once a run.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from psc_lightning.strict_json import json_text

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ["none", "float", "binary", "ternary", "mask", "cross_channel", "row", "column", "separable", "low_rank"]
PRESETS += ["log", "codebook", "deep"]


@dataclass
class Study:
    """Overrides common to all runs, and those of each row, with the number of seeds."""

    title: str
    common: list[str]
    rows: dict[str, tuple[list[str], int]] = field(default_factory=dict)


def studies(args: argparse.Namespace) -> dict[str, Study]:
    at = [f"compression.threshold={args.threshold}"]
    digits = Study(
        "digits_cnn on scikit-learn's digits, each preset's default threshold",
        [],
        {name: ([f"compression={name}"], 3) for name in PRESETS},
    )
    # 2, 1, 0.5 and 0.25 times what binary takes
    for budget in (5800, 2900, 1450, 730):
        digits.rows[f"small, {budget:,} bytes"] = (["compression=small", f"compression.budget={budget}"], 3)
    mnist = Study(f"MNIST, threshold {args.threshold}", [f"data.folder={args.data}/mnist"])
    for model in ("lenet_300_100", "lenet5"):
        for name in ("none", "float", "binary", "mask", "deep"):
            overrides = [f"experiment=mnist_{model}", f"compression={name}"] + (at if name != "none" else [])
            mnist.rows[f"{model} {name}"] = (overrides, 3)
    # Of 391 batches in an epoch: all of them cost an eighth of the three epochs, and the run more than 1.15 of one without.
    binary = ["compression=binary", "schedule=constant", "batchnorm=256"]
    cifar10 = Study(
        "ResNet-20 on CIFAR-10 from the 91.73 % checkpoint, 3 epochs",
        [
            "experiment=cifar10_resnet20",
            f"model.checkpoint={args.checkpoint}",
            f"data.folder={args.data}/cifar-10-batches-bin",
        ],
        {
            "none": (["compression=none", "optimizer.lr=0.001"], 3),
            "binary": (binary, 3),
            "binary, float16 leftovers": ([*binary, "leftovers=float16"], 3),
            "binary, folded, log8 leftovers": ([*binary, "fold_batchnorm=true", "leftovers=log8"], 3),
            "ternary": (["compression=ternary", "schedule=constant"], 3),
            "codebook": (["compression=codebook", "schedule=constant"], 3),
            "mask 0.8": (["compression=mask", "compression.threshold=0.8"], 3),
        },
    )
    return {"digits": digits, "mnist": mnist, "cifar10": cifar10}


def run(folder: Path, overrides: list[str]) -> dict[str, object]:
    """One run in its folder, or what it wrote before."""
    report = folder / "report.json"
    if not report.is_file():
        command = [sys.executable, str(ROOT / "train.py"), *overrides, f"hydra.run.dir={folder}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    values: dict[str, object] = json.loads(report.read_text())
    return values


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, in percent."""
    mean = f"{100 * statistics.mean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["digits", "mnist", "cifar10"])
    parser.add_argument("--data", default="data", help="folder with mnist/ and cifar-10-batches-bin/ (default: data)")
    parser.add_argument("--checkpoint", default="resnet20-12fca82f.th", help="the trained ResNet-20")
    parser.add_argument("--threshold", type=float, default=0.9, help="of the MNIST runs (default: 0.9)")
    parser.add_argument("--only", help="a regular expression: which rows to run")
    parser.add_argument("--seeds", type=int, help="fewer seeds than the study asks for")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmarks", help="where the run folders go")
    args = parser.parse_args()
    study = studies(args)[args.study]
    rows = {name: row for name, row in study.rows.items() if re.search(args.only or "", name)}
    jobs = {}
    # Seed by seed, so that every row has something to show early; the first seed makes the cached baselines.
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in range(args.seeds or 3):
            for name, (overrides, seeds) in rows.items():
                if seed < seeds:
                    folder = (args.runs / args.study / re.sub(r"\W+", "-", name) / str(seed)).resolve()
                    jobs[name, seed] = pool.submit(run, folder, [*study.common, *overrides, f"seed={seed}"])
        for (name, seed), job in jobs.items():
            values = job.result()
            print(f"{name}, seed {seed}: {values['file_bytes']} bytes, {values['metrics']}", flush=True)  # a long wait
    results = []
    for name, (overrides, _) in rows.items():
        reports = [job.result() for (row, _), job in jobs.items() if row == name]
        command = ["python", "train.py", *study.common, *overrides]
        # where this machine keeps its data is nobody's business
        shown = (
            " ".join(command).replace(str(args.data), "DATA").replace(str(args.checkpoint), Path(args.checkpoint).name)
        )
        accuracy = {
            stage: [r["metrics"][stage]["accuracy"] for r in reports]  # type: ignore[index]
            for stage in ("dense", "one_shot", "compressed")
        }
        results.append(
            {
                "row": name,
                "seeds": len(reports),
                "accuracy": accuracy,
                "dense_bytes": reports[0]["dense_bytes"],
                "file_bytes": [r["file_bytes"] for r in reports],
                "entropy_bytes": [r["entropy_bytes"] for r in reports],
                "command": f"{shown} seed=0…{len(reports) - 1}" if len(reports) > 1 else f"{shown} seed=0",
            }
        )
    write(args.study, study.title, results)


def write(name: str, title: str, results: list[dict[str, object]]) -> None:
    """The table that people read and the numbers behind it."""
    lines = [
        f"# {title}",
        "",
        "Test accuracy in %, mean ± standard deviation over seeds: of the dense network that fine-tuning starts from, of "
        "the same compressed without training, and of a fresh plain model loaded from the file.",
        "",
        "| setting | seeds | start | one-shot | file | bytes | ratio |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in results:
        accuracy, size = r["accuracy"], statistics.mean(r["file_bytes"])  # type: ignore[type-var, arg-type]
        shown = [spread(accuracy[stage]) for stage in ("dense", "one_shot", "compressed")]  # type: ignore[index]
        ratio = r["dense_bytes"] / size  # type: ignore[operator]
        lines.append(f"| {r['row']} | {r['seeds']} | {' | '.join(shown)} | {size:,.0f} | {ratio:.1f} |")
    lines += ["", "Made by", ""] + [f"    {r['command']}" for r in results]
    folder = ROOT / "recipes" / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n")
    (folder / f"{name}.json").write_text(json_text(results, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
