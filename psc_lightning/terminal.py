"""What people read on a terminal or in a log: names that a stranger chose, pipes that nobody reads any more."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ["closed_pipes", "printable", "speaking_plainly"]


def printable(text: str) -> str:
    r"""A text with all that moves a cursor, turns the direction of writing or cannot be shown as escapes; lines stay lines.

    >>> print(printable("a\x1b[2J\u202eb\n\x00é"))
    a\x1b[2J\u202eb
    \x00é
    """
    return "\n".join("".join(c if c.isprintable() else _escape(c) for c in line) for line in text.split("\n"))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


@contextmanager
def speaking_plainly() -> Iterator[None]:
    """Let standard output and error show what their encoding lacks as escapes, instead of a traceback."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    try:
        for stream in streams:
            stream.reconfigure(errors="backslashreplace")
        yield
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


@contextmanager
def closed_pipes() -> Iterator[None]:
    """Let a command end without a traceback where its output's reader has gone: `psc inspect model.psc | head`.

    Raises:
        SystemExit: with 141, the status of a program that the signal SIGPIPE has ended.
    """
    told, logging.raiseExceptions = logging.raiseExceptions, False  # else each line of a log would bring a traceback
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # the interpreter flushes once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    finally:
        logging.raiseExceptions = told
