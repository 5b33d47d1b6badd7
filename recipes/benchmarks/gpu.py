"""What compression does and costs on a GPU: one prepared script, a process a section, the most important ones first.

    python recipes/benchmarks/gpu.py --out FOLDER [--sections correct speed] [--minutes 5]
    python recipes/benchmarks/gpu.py --out FOLDER --device cpu --small          # to try the script: its numbers mean nothing

correct: weights and files of fits on the GPU are those that the CPU makes of them. launches: kernels of a step, and where
the CPU waits for the GPU. speed: the time of a step beside a plain one's, and beside torchao's, where it is installed.
graphs: under torch.compile, without and with CUDA graphs. memory: the peak beyond a plain run's.

Whatever fails is told in its row, with a traceback in gpu.json; a section that takes too long is ended. gpu.md and gpu.json
are written after each section. Where psc_lightning is not installed it is taken from this checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib import import_module, metadata
from pathlib import Path
from shutil import which

ROOT = Path(__file__).resolve().parents[2]
#: its share of the time, and what its table says
SECTIONS = {
    "correct": (
        0.22,
        "Small networks, 8 steps. From each latent weight on the GPU the CPU makes the hard one again: with the GPU's tables "
        "(scales, centroids, masks), and with tables of its own; cells name what has other bits. A sync: the CPU waits for "
        "the GPU.",
    ),
    "launches": (
        0.15,
        "Encoder of 12 layers, 768 wide, 49 tensors in slots, batch 32 × 128, bf16-mixed, AdamW. Kernels include copies and "
        "fills on the GPU; `more`: than a plain step.",
    ),
    "speed": (
        0.27,
        "The same encoder: plain and compressed fits in turn in one process, median (lowest – highest) ratio over the pairs. "
        "`gpu`: between events on the GPU; `cpu`: of all threads, waiting included; `wall`: by the clock. torchao changes "
        "the 25 layers that are plain `Linear` ones.",
    ),
    "graphs": (
        0.28,
        "The encoder with 6 layers under torch.compile; `reduce-overhead`: CUDA graphs. Ratios: to plain in the same mode.",
    ),
    "memory": (
        0.08,
        "20 M weights in ten linear layers, SGD without momentum; multiples of the weights' bytes. `start`: the peak up to "
        "the third step; `steps`: from there on. `extra`: beyond plain, without what is trained beside the weights.",
    ),
}
GRACE = 12.0  # seconds to finish a row that has begun
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


def section(args: argparse.Namespace) -> None:
    """In a process of its own: one section's rows, until its time is over."""
    end = time.monotonic() + args.seconds
    module = import_module(f"device.{args.section}")
    fits, board = import_module("device.fits"), import_module("device.board")
    fits.quiet()
    module.measure(board.Board(args.out / f"{args.section}.json", args.device, args.small, end))


def rows_of(name: str, out: Path) -> list[dict[str, object]]:
    path = out / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def run(name: str, args: argparse.Namespace, seconds: float) -> dict[str, object]:
    """A section's rows, and how its process ended."""
    command = [sys.executable, __file__, "--section", name, "--seconds", str(seconds), "--out", str(args.out)]
    command += ["--device", args.device, *(["--small"] if args.small else [])]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # A fixed workspace: else cuBLAS refuses to be deterministic.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    start, log = time.monotonic(), args.out / f"{name}.log"
    (args.out / f"{name}.json").unlink(missing_ok=True)
    with log.open("w") as said:
        # A group of its own: the compiler's workers end with it.
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            ended = str(process.wait(seconds + GRACE))
        except subprocess.TimeoutExpired:
            ended = "it took too long and was ended"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    taken = round(time.monotonic() - start, 1)
    tail = log.read_text(errors="replace")[-3000:] if ended != "0" else ""
    return {"exit": ended, "seconds": taken, "rows": rows_of(name, args.out), "log": tail}


def lines_of(name: str, found: dict[str, object]) -> list[str]:
    """A section as Markdown: a table of the short cells, then the errors."""
    rows: list[dict[str, object]] = found["rows"]  # type: ignore[assignment]
    hidden = ("error", "traceback")
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, dict)))
    columns = [key for key in columns if key not in hidden]
    lines = [f"## {name}", "", SECTIONS[name][1], "", f"{found['seconds']} s, exit {found['exit']}", ""]
    if rows:
        lines += [f"| {' | '.join(columns)} |", "|---|" + "--:|" * (len(columns) - 1)]
        lines += [f"| {' | '.join(str(row.get(key, '')) for key in columns)} |" for row in rows]
        lines += ["", *(f"- {row['what']}: {str(row['error'])[:600]}" for row in rows if "error" in row), ""]
        for row in rows:
            for key, value in row.items():
                if isinstance(value, dict) and value:
                    lines.append(f"- {row['what']}, {key}: {', '.join(f'{k}: {v}' for k, v in value.items())}")
    if found["log"]:
        lines += ["", "```", str(found["log"]), "```"]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="the folder (default: runs/gpu)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="small networks and few steps")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    parser.add_argument("--minutes", type=float, default=5.0, help="for all sections (default: 5)")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section is not None:
        section(args)
        return
    sys.path.append(str(ROOT))  # where psc_lightning is not installed
    json_text = import_module("psc_lightning.strict_json").json_text
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # a section ends with this process
    end = time.monotonic() + 60 * args.minutes
    found: dict[str, object] = {"machine": machine(args.device), "sections": {}}
    sections: dict[str, dict[str, object]] = found["sections"]  # type: ignore[assignment]
    lines = ["# On a GPU", "", ", ".join(f"{name} {what}" for name, what in found["machine"].items()), ""]  # type: ignore[attr-defined]
    left = list(args.sections)
    while left:
        name, shares = left[0], sum(SECTIONS[one][0] for one in left)
        # What earlier sections left over, the later ones share.
        seconds = max((end - GRACE - time.monotonic()) * SECTIONS[name][0] / shares, 5.0)
        sections[name] = run(name, args, seconds)
        lines += lines_of(name, sections[name])
        (args.out / "gpu.json").write_text(json_text(found, indent=1))
        (args.out / "gpu.md").write_text("\n".join(lines))
        failed = sum("error" in row for row in sections[name]["rows"])  # type: ignore[attr-defined]
        print(
            f"{name}: {sections[name]['seconds']} s, exit {sections[name]['exit']}, {failed} rows with errors",
            flush=True,
        )
        left.pop(0)
    print(args.out / "gpu.md")


if __name__ == "__main__":
    main()
