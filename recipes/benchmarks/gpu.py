"""What compression does and costs on a GPU: one prepared script, the most important rows first.

    python recipes/benchmarks/gpu.py --out FOLDER                               # a choice of rows, in less than three minutes
    python recipes/benchmarks/gpu.py --out FOLDER --all --minutes 15 [--sections correct speed]
    python recipes/benchmarks/gpu.py --out FOLDER --device cpu --small          # to try the script: its numbers mean nothing

launches: kernels of a step, and where the CPU waits for the GPU. speed: the time of a step beside a plain one's, and beside
torchao's, where it is installed. graphs: under torch.compile, without and with CUDA graphs. memory: the peak beyond a plain
run's. correct: weights and files of fits on the GPU are those that the CPU makes of them.

Whatever fails is told in its row, with a traceback in gpu.json. All sections run in one process, since to load libraries
takes longer than many a row; where it ends early, or a section takes too long, another goes on with the next. gpu.md and
gpu.json are written after each section, and nothing else. Where psc_lightning is not installed this checkout is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from shutil import which

ROOT = Path(__file__).resolve().parents[2]
#: its share of the time, and what its table says
SECTIONS = {
    "launches": (
        0.20,
        "Encoder of 12 layers, 768 wide, 49 tensors in slots, batch 32 × 128, bf16-mixed, AdamW. Kernels include copies and "
        "fills on the GPU; `more`: than a plain step.",
    ),
    "speed": (
        0.30,
        "The same encoder: plain and compressed fits in turn in one process, median (lowest – highest) ratio over the pairs. "
        "`gpu`: between events on the GPU; `cpu`: of all threads, waiting included; `wall`: by the clock. torchao changes "
        "the 25 layers that are plain `Linear` ones.",
    ),
    "graphs": (
        0.20,
        "The encoder with 6 layers under torch.compile; `reduce-overhead`: CUDA graphs. Ratios: to plain in the same mode.",
    ),
    "memory": (
        0.12,
        "20 M weights in ten linear layers, SGD without momentum; multiples of the weights' bytes. `start`: the peak up to "
        "the third step; `steps`: from there on. `extra`: beyond plain, without what is trained beside the weights.",
    ),
    "correct": (
        0.18,
        "Small networks, 8 steps. From each latent weight on the GPU the CPU makes the hard one again: with the GPU's tables "
        "(scales, centroids, masks), and with tables of its own; cells name what has other bits. A sync: the CPU waits for "
        "the GPU.",
    ),
}
GRACE = 12.0  # seconds to finish a row that has begun
LOADING = 40.0  # seconds to load libraries
PACKAGES = ("torch", "triton", "lightning", "torchmetrics", "numpy", "constriction", "torchao")


def machine(device: str) -> dict[str, str]:
    """What it ran on."""
    found = {"python": sys.version.split()[0], "C compiler": which("gcc") or which("cc") or "none"}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        try:
            found["GPU"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            found["GPU"] = str(error)
    return found


def seconds_of(left: list[str], end: float) -> float:
    """The time of the first of the sections that are left: what earlier ones left over, the later ones share."""
    shares = sum(SECTIONS[name][0] for name in left)
    return max((end - time.monotonic()) * SECTIONS[left[0]][0] / shares, 5.0)


def work(args: argparse.Namespace) -> None:
    """In a process of its own: the rows of some sections, each until its time is over."""
    fits, board = import_module("device.fits"), import_module("device.board")
    fits.quiet()
    for index, name in enumerate(args.sections):
        until = time.monotonic() + seconds_of(args.sections[index:], args.end)
        rows = board.Board(args.scraps / f"{name}.json", args.device, args.small, until, args.all)
        (args.scraps / f"{name}.json").write_text("[]")
        import_module(f"device.{name}").measure(rows)


def rows_of(name: str, scraps: Path) -> list[dict[str, object]]:
    path = scraps / f"{name}.json"
    try:
        return json.loads(path.read_text()) if path.exists() else []
    except json.JSONDecodeError:  # it is being written
        return []


def run(names: list[str], args: argparse.Namespace, scraps: Path, tell: Callable[[str, str, float, str], None]) -> int:
    """Start a process for sections, and tell how each of them ended; how many that were."""
    command = [sys.executable, __file__, "--sections", *names, "--scraps", str(scraps), "--end", str(args.end)]
    command += ["--device", args.device, *(["--small"] if args.small else []), *(["--all"] if args.all else [])]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # A fixed workspace: else cuBLAS refuses to be deterministic.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    log, done = scraps / "log", 0
    start = time.monotonic()
    limit = start + LOADING + seconds_of(names, args.end)
    with log.open("w") as said:
        # A group of its own: the compiler's workers end with it.
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() < limit:
                time.sleep(0.2)
                if done + 1 < len(names) and (scraps / f"{names[done + 1]}.json").exists():
                    tell(names[done], "0", time.monotonic() - start, "")
                    done, start = done + 1, time.monotonic()
                    limit = start + seconds_of(names[done:], args.end) + GRACE
            ended = "it took too long and was ended" if process.poll() is None else str(process.returncode)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    finished = ended == "0"
    begun = (
        [name for name in names[done:] if (scraps / f"{name}.json").exists()] if finished else names[done : done + 1]
    )
    for name in begun:
        tell(name, ended, time.monotonic() - start, "" if finished else log.read_text(errors="replace")[-3000:])
    return done + len(begun)


def lines_of(name: str, found: dict[str, object]) -> list[str]:
    """A section as Markdown: a table of the short cells, then the errors; the longest lists are in gpu.json."""
    every: list[dict[str, object]] = found["rows"]  # type: ignore[assignment]
    late = [str(row["what"]) for row in every if str(row.get("error", "")).startswith("left out")]
    rows = [row for row in every if row["what"] not in late]
    hidden = ("error", "traceback", "kernels by name", "counters")
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict)))
    columns = [key for key in columns if key not in hidden]
    lines = [f"## {name}", "", SECTIONS[name][1], "", f"{found['seconds']} s, exit {found['exit']}", ""]
    if rows:
        lines += [f"| {' | '.join(columns)} |", "|---|" + "--:|" * (len(columns) - 1)]
        lines += [f"| {' | '.join(str(row.get(key, '')) for key in columns)} |" for row in rows]
        lines += ["", *(f"- {row['what']}: {str(row['error'])[:600]}" for row in rows if "error" in row), ""]
        for row in rows:
            for key, value in row.items():
                if isinstance(value, dict) and value and key not in hidden:
                    lines.append(f"- {row['what']}, {key}: {', '.join(f'{k}: {v}' for k, v in value.items())}")
    if late:
        lines += ["", f"Left out, since the time was over: {', '.join(late)}"]
    if found["log"]:
        lines += ["", "```", str(found["log"]), "```"]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="the folder (default: runs/gpu)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small networks and few steps")
    parser.add_argument("--all", action="store_true", help="all rows, and longer fits")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    parser.add_argument("--minutes", type=float, default=2.8, help="for all sections (default: 2.8)")
    parser.add_argument("--scraps", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.scraps is not None:
        work(args)
        return
    sys.path.append(str(ROOT))  # where psc_lightning is not installed
    json_text = import_module("psc_lightning.strict_json").json_text
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the sections end with this process
    args.end = time.monotonic() + 60 * args.minutes - GRACE
    found: dict[str, dict[str, object]] = {}
    about = machine(args.device)
    lines = ["# On a GPU", "", ", ".join(f"{name} {what}" for name, what in about.items()), ""]
    with tempfile.TemporaryDirectory() as folder:

        def tell(name: str, ended: str, seconds: float, log: str) -> None:
            rows = rows_of(name, Path(folder))
            found[name] = {"exit": ended, "seconds": round(seconds, 1), "rows": rows, "log": log}
            lines.extend(lines_of(name, found[name]))
            (args.out / "gpu.json").write_text(json_text({"machine": about, "sections": found}, indent=1))
            (args.out / "gpu.md").write_text("\n".join(lines))
            failed = sum("error" in row for row in rows)
            print(f"{name}: {seconds:.1f} s, exit {ended}, {failed} rows with errors", flush=True)

        left = list(args.sections)
        while left:
            left = left[run(left, args, Path(folder), tell) :]
    print(args.out / "gpu.md")


if __name__ == "__main__":
    main()
