"""Writing files that are never seen half-written."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

__all__ = ["write_atomic"]


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


def _sync(folder: Path) -> None:
    """Make the new name itself survive a power cut, where the system lets a folder be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
