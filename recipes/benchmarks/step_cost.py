"""What compression costs a training step: CPU time of a step with our callbacks over that of the same step without.

    MALLOC_ARENA_MAX=1 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=4294967296 \\
        python recipes/benchmarks/step_cost.py [--nets encoder lenet] [--methods uniform movement] [--pairs 7] [--steps 8]

One thread. Plain and compressed fits take turns in one process, so that a drift of the machine's speed meets both; a fit's
first steps are left out, and its median step counts. A cell is the median ratio (lowest – highest) over the pairs. A quiet
machine and one heap that is never trimmed (the variables above, set before Python starts) make it repeatable to about 1 %.

Beside it: what the forward pass of a live model costs in eval, what each method costs an entry in the bytes that the
machine copies in that time, and what methods of others cost, where they are installed (`pip install torchao brevitas`).
Writes recipes/results/step_cost.md after each net; a run of part of the nets or methods is best written elsewhere (`--out`).
"""

from __future__ import annotations

import argparse
import logging
import shlex
import statistics
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from step.fits import WARM, bandwidth, machine, pairs, predictions, spread
from step.methods import METHODS, PLAIN, Method, limit
from step.nets import NETS
from step.peers import PEERS

Pairs = list[tuple[float, float]]
Found = dict[str, dict[str, Pairs | str]]  # row → net → pairs, or why there are none

PREDICTED = ("uniform 8 bit", "codebook 16", "magnitude 0.5", "row + magnitude 0.5 + uniform")
BYTES = ("encoder", "lenet")  # nets whose steps tell what an entry costs
COMPARED = ("encoder", "lenet")  # nets for methods of others
STAR = "★"  # what is above its limit


class Board:
    """The progress display, and a line for each cell that is done."""

    def __init__(self, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.progress = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
        self.task = self.progress.add_task("", total=total)

    def pairs(self, what: str, net: str, method: Method, plain: Method, steps: int, turns: int) -> Pairs | str:
        """The pairs of a cell; why there are none, where the method does not apply or is not installed."""
        found: Pairs = []
        self.progress.update(self.task, description=f"{net}: {what}")
        try:
            for pair in pairs(NETS[net], method, plain, steps, turns):
                found.append(pair)
                self.progress.advance(self.task)
        except ImportError as error:
            return self._none(what, net, f"not installed ({error.name})", turns)
        except ValueError as error:
            if "can tie none" not in str(error):
                raise
            return self._none(what, net, "does not apply", turns)
        self.progress.console.print(f"{net:10} {what:38} {shown(found)}", highlight=False)
        return found

    def _none(self, what: str, net: str, why: str, turns: int) -> str:
        self.progress.console.print(f"{net:10} {what:38} {why}", highlight=False)
        self.progress.advance(self.task, turns)
        return why


def shown(found: Pairs | str | None, over: float | None = None) -> str:
    """A cell: the median, lowest and highest ratio; marked where it is above a limit."""
    if not isinstance(found, list):
        return found or ""
    middle, low, high = spread(found)
    return f"{middle:.3f} ({low:.2f} – {high:.2f}){STAR if over is not None and middle > over else ''}"


def asked(net: str, method: str) -> str:
    """A limit and a goal."""
    found = limit(net, method)
    return "" if found is None else f"{found[0]:.2f} / {found[1]:.2f}"


def step_rows(found: Found, nets: list[str]) -> Iterator[list[str]]:
    """The table of steps: a column a net, then what is asked of the encoder and of the text classifier."""
    columns = [net for net in ("encoder", "minilm") if net in nets]
    yield ["method", *(NETS[net].told for net in nets), *(f"{net}: limit / goal" for net in columns)]
    for name, row in found.items():
        limits = {net: limit(net, name) for net in nets}
        cells = [shown(row[net], None if limits[net] is None else limits[net][0]) for net in nets]
        yield [name, *cells, *(asked(net, name) for net in columns)]


def byte_rows(found: Found, nets: list[str], speed: float) -> Iterator[list[str]]:
    """The table of bytes: nanoseconds an entry and step beyond plain, and what is copied in that time."""
    nets = [net for net in nets if net in BYTES]
    heads = [f"{net}: {unit} an entry" for net in nets for unit in ("ns", "bytes")]
    yield ["method", *heads]
    entries = {net: NETS[net].weights() for net in nets}
    for name, row in found.items():
        cells = []
        for net in nets:
            cell = row[net]
            if isinstance(cell, str):
                cells += ["", ""]
                continue
            extra = statistics.median(one - other for one, other in cell) / entries[net]
            cells += [f"{1e9 * extra:.2f}", f"{extra * speed:.0f}"]
        yield [name, *cells]


def ratio_rows(found: Found, nets: list[str]) -> Iterator[list[str]]:
    """The tables of predictions, and of what others do."""
    yield ["method", *(NETS[net].told for net in nets)]
    for name, row in found.items():
        yield [name, *(shown(row.get(net)) for net in nets)]


def markdown(head: list[str], others: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in others]
    return [f"| {' | '.join(head)} |", "|---|" + "--:|" * (len(head) - 1), *lines, ""]


def print_table(title: str, head: list[str], others: list[list[str]]) -> None:
    table = Table(*head, title=title)
    for row in others:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), metavar="NET", help=", ".join(NETS))
    parser.add_argument("--methods", nargs="+", metavar="PART", help="rows with one of these in their names; none: all")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of fits a cell (default: 7)")
    parser.add_argument(
        "--steps", type=int, default=8, help=f"steps a fit, after {WARM} that do not count (default: 8)"
    )
    parser.add_argument("--no-peers", action="store_true", help="leave out methods of others")
    results = Path(__file__).resolve().parents[1] / "results"
    parser.add_argument("--out", type=Path, default=results / "step_cost.md", help="the table's file")
    return parser.parse_args()


def report(args: argparse.Namespace, nets: list[str], speed: float, steps: Found, live: Found, peers: Found) -> None:
    """Write what is known of these nets, and print it once it is all."""
    compared = [net for net in nets if net in COMPARED and not args.no_peers]
    tables = {
        "Steps": step_rows(steps, nets),
        "Predictions of a live model, over the plain one (limit 1.01, goal 1.00)": ratio_rows(live, nets),
        f"What an entry costs a step (copying reads and writes {speed / 1e9:.1f} GB/s)": byte_rows(steps, nets, speed),
        "Methods of others, and ours on the same layers": ratio_rows(peers, compared),
    }
    lines = [
        "# CPU time of a compressed training step over a plain one",
        "",
        f"Median (lowest – highest) of {args.pairs} pairs of fits in one process, each its median of {args.steps} steps; one",
        f"thread; {machine()}.",
        f"By `{shlex.join(['python', 'recipes/benchmarks/step_cost.py', *sys.argv[1:]])}`.",
        f"{STAR} above the limit (ResNet-20: 1.05 for each method).",
        "",
    ]
    for title, rows in tables.items():
        head, *others = rows
        if others and len(head) > 1:
            lines += [f"## {title}", "", *markdown(head, others)]
            if nets == args.nets:
                print_table(title, head, others)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines).rstrip() + "\n")


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    chosen = [name for name in METHODS if not args.methods or any(part in name for part in args.methods)]
    compared = [net for net in args.nets if net in COMPARED and not args.no_peers]
    steps: Found = {name: {} for name in chosen}
    live: Found = {name: {} for name in PREDICTED if name in chosen}
    peers: Found = {name: {} for name in PEERS}
    speeds = [bandwidth()]
    board = Board(args.pairs * (len(chosen) * len(args.nets) + len(compared) * len(PEERS)))
    for number, net in enumerate(args.nets, 1):
        with board.progress:
            for name in chosen:
                steps[name][net] = board.pairs(name, net, METHODS[name], PLAIN, args.steps, args.pairs)
            for name in live:
                live[name][net] = predictions(NETS[net], METHODS[name], args.steps, args.pairs)
            for name, peer in PEERS.items() if net in compared else ():
                peers[name][net] = board.pairs(name, net, peer, PLAIN, args.steps, args.pairs)
        speeds.append(bandwidth())
        report(args, args.nets[:number], statistics.mean(speeds), steps, live, peers)
    print(args.out)


if __name__ == "__main__":
    main()
