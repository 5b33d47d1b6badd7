"""What may stand on a command line: files, shapes, axes, sizes, digests."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

__all__ = ["digest", "example", "file", "names", "open_axis", "size"]

_DTYPES = ("float32", "float64", "int64", "int32", "bool")


def file(text: str) -> str:
    """The file that is meant: of a run's folder its model.psc."""
    return str(Path(text) / "model.psc") if Path(text).is_dir() else text


def example(text: str) -> tuple[tuple[int, ...], str]:
    """Shape and type of an input: ``1,3,32,32`` of float32, ``1,128:int64``."""
    shape, _, dtype = text.partition(":")
    dtype = dtype or "float32"
    if not all(axis.isdecimal() for axis in shape.split(",")) or dtype not in _DTYPES:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers as in 1,3,32,32 or 1,128:int64 (one of {', '.join(_DTYPES)}), found {text!r}"
        )
    return tuple(map(int, shape.split(","))), dtype


def open_axis(text: str) -> tuple[str, int, str]:
    """An input (``*``: all), an axis of it, and what its length is called."""
    found = re.fullmatch(r"(?:([^:=]+):)?(-?\d+)=(\w+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected an axis and a name as in 1=length or ids:1=length, found {text!r}")
    return found[1] or "*", int(found[2]), found[3]


def names(text: str) -> list[str]:
    """Names between commas."""
    return text.split(",")


def size(text: str) -> int:
    """A number of bytes."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number of bytes, found {text!r}")
    return int(text)


def digest(text: str) -> str:
    """A SHA-256 in hexadecimal digits."""
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"expected 64 hexadecimal digits, found {text!r}")
    return text.lower()
