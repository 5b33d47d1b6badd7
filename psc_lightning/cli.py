"""The `psc` command: look into a .psc file and check it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from psc_lightning.artifact import ArtifactError, inspect, verify

__all__ = ["main"]

_EXAMPLES = """\
examples:
  psc inspect model.psc              a table: each tensor's shape, zeros, levels, bytes
  psc inspect model.psc --json       the same as JSON, for other programs
  psc verify model.psc && deploy     checksum, structure and every symbol

exit status: 0 good, 1 the file is bad, 2 wrong usage
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 good, 1 the file is bad, 2 wrong usage.

    Args:
        arguments: instead of those of the process.
    """
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ArtifactError, OSError) as error:
        print(f"psc {options.command}: {options.file}: {_line(error)}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="psc",
        description="Look into .psc files (compressed models written by psc_lightning) and check them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    one = commands.add_parser("inspect", help="list the tensors of a file, with shapes and bytes")
    one.add_argument("file", metavar="FILE", help="a .psc file")
    one.add_argument("--json", action="store_true", help="print JSON with the keys of report.json")
    one.add_argument("--all", action="store_true", help="a row for each plain tensor too, where there are many")
    one.set_defaults(run=_inspect)

    one = commands.add_parser("verify", help="check a file from end to end; prints nothing if it is good")
    one.add_argument("file", metavar="FILE", help="a .psc file")
    one.set_defaults(run=_verify)
    return parser


def _inspect(options: argparse.Namespace) -> None:
    report = inspect(options.file)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report.table(all_tensors=options.all))


def _verify(options: argparse.Namespace) -> None:
    verify(options.file)


def _line(error: Exception) -> str:
    """The message on one line, without the path that is printed before it."""
    text = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
