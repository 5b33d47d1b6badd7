"""Matplotlib's pictures for a page: their text stays text, and their colours are the page's, light or dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "ACCENT",
    "GRID",
    "INK",
    "MUTED",
    "SECOND",
    "THIRD",
    "drawing",
    "file_of",
    "inline",
    "settled",
    "size_text",
    "verbatim",
]

# Colours that nothing else has: in a page each becomes the CSS variable of its name (see page.css).
INK, MUTED, GRID, PAPER = "#1d2429", "#5f6a74", "#dbe1e6", "#fefffe"
ACCENT, SECOND, THIRD = "#0b63ce", "#b84a0d", "#177a50"
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    ACCENT: "accent",
    SECOND: "second",
    THIRD: "third",
}

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.parse_math": False,  # names may have a $ in them
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


@contextmanager
def drawing() -> Iterator[None]:
    """Within it figures are made and written in the style of the pages."""
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in a script that the font lacks
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # very long names
        yield


def settled(figure: Figure) -> Figure:
    """A figure with its layout made once and for all, where it is written in several ways: that takes most of the time."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def file_of(figure: Figure, kind: str) -> bytes:
    """A figure as a file of its own, the same bytes for the same picture.

    Args:
        figure: what was drawn.
        kind: `png` or `svg`.
    """
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "psc"}):
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return buffer.getvalue()


def inline(figure: Figure, name: str, label: str) -> str:
    """A figure as an `<svg>` element of a page.

    Args:
        figure: what was drawn; matplotlib has escaped its texts.
        name: unlike that of any other picture of the page.
        label: what it shows, in words.
    """
    from markupsafe import escape
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, count=1, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', text)
    body = text[text.index(">") + 1 :]
    body = re.sub(r"font: ([\d.]+px) 'DejaVu Sans'[^;\"]*", r"font-size: \1", body)
    body = re.sub(
        "#[0-9a-f]{6}", lambda found: f"var(--{_VARIABLES[found[0]]})" if found[0] in _VARIABLES else found[0], body
    )
    body = re.sub(r"(<g[^>]*)>((?:\s*<use [^>]*/>){2,})\s*</g>", _hoisted, body)
    body = re.sub(r'(?<= [dxy]=")[^"]*', _rounded, body)
    return f'<svg {box[0] if box else ""} role="img" aria-label="{escape(label)}">{body}'


def _hoisted(group: re.Match[str]) -> str:
    """A group of marks with their common style said once: a thousand marks are half as many bytes."""
    styles = set(re.findall(r' style="[^"]*"', group[2]))
    if len(styles) != 1:
        return group[0]
    (style,) = styles
    marks = re.sub(r"\s+(?=<use)", "", group[2].replace(style, ""))
    return f"{group[1]}{style}>{marks}</g>"


def _rounded(numbers: re.Match[str]) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", numbers[0])


def size_text(size: float, _: Any = None) -> str:
    """Bytes as an axis shows them.

    >>> [size_text(size) for size in (512, 4300, 27000, 1.5e6, 2e9)]
    ['512 B', '4.3 kB', '27 kB', '1.5 MB', '2 GB']
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.3g} B"


def verbatim(text: str, width: int) -> str:
    """A text of at most `width` letters; of a longer one the end, which tells names apart.

    >>> verbatim("encoder.layers.11.attention.weight", 20)
    '…11.attention.weight'
    """
    return text if len(text) <= width else "…" + text[1 - width :]
