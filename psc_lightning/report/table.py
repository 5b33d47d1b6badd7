"""Rows to lines of text that look the same in a log as on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from psc_lightning.terminal import printable

__all__ = ["render"]


def render(columns: Sequence[tuple[str, str, str]], rows: Sequence[Sequence[str]], width: int = 160) -> str:
    """A table without lines between its cells.

    Args:
        columns: title, footer and alignment ("left" or "right") of each.
        rows: the cells; text, not markup; what would move a cursor comes as an escape.
        width: columns of text available, at least 80; longer cells are folded.

    >>> print(render([("tensor", "file", "left"), ("bytes", "12", "right")], [("weight", "8")]))
    tensor  bytes
    weight      8
    file       12
    """
    # Reading a file must not need rich.
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(width, 80), color_system=None, force_terminal=False, markup=False, emoji=False)
    table = Table(box=None, pad_edge=False, show_footer=True)
    for title, footer, alignment in columns:
        table.add_column(title, footer=footer, justify="left" if alignment == "left" else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())
