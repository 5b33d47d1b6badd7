"""`psc report`: the Pareto page of any set of runs, and the page of a single one."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

__all__ = ["EXAMPLES", "add_to"]

EXAMPLES = """\
  psc report multirun/SWEEP          pareto.html, .png, .svg and sweep.json of a sweep, in its folder
  psc report runs -o pages           of all runs in a folder; links are relative to pages
  psc report A B C --metric loss     of three runs or sweeps, by another metric, in this folder
"""


def add_to(commands: Any, status: str) -> None:
    """Add the command to those of `psc`.

    Args:
        commands: the parser's subparsers.
        status: what the exit status means, for the help.
    """
    what = "write the Pareto page of runs: metric against bytes"
    one = commands.add_parser(
        "report",
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=f"examples:\n{EXAMPLES}{status}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument(
        "folders", metavar="DIR", nargs="+", type=Path, help="a run's folder, a sweep's, or one that holds these"
    )
    one.add_argument(
        "-o", "--out", metavar="OUT", type=Path, help="folder to write to (DIR if there is one, else this folder)"
    )
    one.add_argument("--metric", metavar="NAME", help="metric to compare by (the runs' objective, else accuracy)")
    less = one.add_mutually_exclusive_group()
    less.add_argument("--lower", dest="falling", action="store_true", default=None, help="less of the metric is better")
    less.add_argument("--higher", dest="falling", action="store_false", default=None, help="more of it is")
    one.set_defaults(run=_report)


def _report(options: argparse.Namespace) -> int:
    from psc_lightning.pages.jobs import find_jobs
    from psc_lightning.pages.pareto import write_pareto

    out: Path = options.out or (options.folders[0] if len(options.folders) == 1 else Path())
    jobs = find_jobs(options.folders)
    known = {name: None for job in jobs for name in (job.report.get("metrics") or {}).get("compressed") or {}}
    if not jobs:
        found = "; ".join(f"{one} {'holds none' if one.is_dir() else 'is no folder'}" for one in options.folders)
        return _refuse(f"expected folders with a run.json, or folders of these, found no run: {found}")
    if options.metric and options.metric not in known:
        return _refuse(f"--metric {options.metric}: not one of {', '.join(known) or 'the runs, which have none'}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        files = write_pareto(jobs, out, options.metric, options.falling)
        files += _pages(options.folders)
    except OSError as error:
        return _refuse(f"-o {out}: {error.strerror or error}")
    print(f"{len(jobs)} run{'s' * (len(jobs) != 1)}: {', '.join(map(str, files))}")
    return 0


def _pages(folders: list[Path]) -> list[Path]:
    """The pages of runs that are named themselves, and have none; of what a file holds they show all but the histograms."""
    from psc_lightning.pages.jobs import read_job
    from psc_lightning.pages.run_page import write_run

    missing = [one for one in folders if (one / "report.json").is_file() and not (one / "report.html").is_file()]
    jobs = {folder: read_job(folder) for folder in missing}
    found = [folder for folder, job in jobs.items() if job.report]
    for folder in found:
        write_run(folder, jobs[folder].report)
    return [folder / "report.html" for folder in found]


def _refuse(why: str) -> int:
    print(f"psc report: {why}", file=sys.stderr)
    return 2
