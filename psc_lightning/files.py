"""Writing files that are never seen half-written, and to a pipe that nobody reads any more."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["closed_pipes", "write_atomic"]


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file as a whole or not at all: an older file stays until the new one is safe on the disk.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; nothing is left behind.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            why = f"{error.strerror}; expected an existing, writable folder with room for {len(data)} bytes"
            raise type(error)(error.errno, f"cannot write {target.name}: {why}", str(target.parent)) from error
        raise
    _sync(target.parent)


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


def _sync(folder: Path) -> None:
    """Make the new name itself survive a power cut, where the system lets a folder be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
