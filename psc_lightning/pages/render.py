"""Templates to pages: every value is escaped, and a page asks the network for nothing."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["link", "page"]


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("psc_lightning.pages")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def page(template: str, **values: Any) -> bytes:
    """A page as a file.

    Args:
        template: of the folder `templates`.
        values: what it shows; `Markup` is not escaped.
    """
    return _environment().get_template(template).render(**values).encode()


def link(path: Path, folder: Path) -> str:
    """A path as a relative link from a page in `folder`.

    >>> link(Path("/runs/a b#1/report.html"), Path("/runs/out"))
    '../a%20b%231/report.html'
    """
    relative = os.path.relpath(path.absolute(), folder.absolute())
    return quote(relative.replace(os.sep, "/").encode("utf-8", "surrogateescape"))
