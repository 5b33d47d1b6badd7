"""Places that bytes come from and go to: paths, URLs, open files, memory.

A path is never seen half-written.
"""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ModuleNotFoundError:  # there, a part that a killed process left cannot be told from one that is being written
    fcntl = None  # type: ignore[assignment]

__all__ = ["OversizeError", "Place", "Source", "read_bytes", "write_atomic"]

#: what can be written to: a path (``~`` is the home folder), a URL that fsspec knows, or a binary stream
Place = str | os.PathLike[str] | IO[bytes]
#: what can be read: these, or the bytes themselves
Source = Place | bytes | bytearray | memoryview

_URL = re.compile(r"[A-Za-z][\w+.:-]+://")  # a drive's letter is no scheme
_PIECE = 1 << 20
# What this process was given open: its own to wait for. Any other pipe or device is a stranger's.
_GIVEN = re.compile(r"/dev/(stdin|stdout|stderr|fd/\d+)|/proc/self/fd/\d+")
_NAME = 100  # bytes of a name that its temporary one keeps: names may be as long as the system allows


class OversizeError(ValueError):
    """More bytes than the limit; the message is how many."""


def read_bytes(source: Source, limit: int) -> bytes:
    """All bytes of a source; of a stream those from where it stands to its end.

    Raises:
        OversizeError: there are more than `limit`; no more memory than that was taken.
        TypeError: the source is of another kind, or a stream of text.
        ValueError: a stream that is closed, is not open for reading, or stands at its end.
        OSError: it cannot be opened or read, or is a pipe or a device that is not this process's own (/dev/stdin).
        ModuleNotFoundError: a URL, and fsspec (or what it needs for this kind) is missing.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        if len(data) > limit:
            raise OversizeError(len(data))
        return data
    if (stream := _stream(source, "read")) is not None:
        return _read_stream(stream, limit)
    system, path = _located(source)
    if system is not None:
        try:
            with system.open(path, "rb") as stream:
                return _read_stream(stream, limit)
        except FileNotFoundError as error:  # file systems of others do not say what is wrong
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source) from error
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "Is a folder: expected a file, as model.psc in it", path)
    with open(path, "rb", opener=_at_once) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            if not _GIVEN.fullmatch(path):
                raise OSError(
                    errno.EINVAL, "Expected a file, found a pipe or a device: open it, and pass the stream", path
                )
            return _read_stream(file, limit)  # it has no length
        if status.st_size > limit:
            raise OversizeError(status.st_size)
        return file.read(status.st_size)  # not the limit: Python takes memory for as many bytes as it is asked to read


def write_atomic(place: Place, data: bytes) -> None:
    """Write a file as a whole or not at all: an older one stays until the new one is safe on the disk.

    To a URL in one request; to a stream, which stays open, from where it stands.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; nothing is left behind (but in a stream).
        TypeError, ValueError, ModuleNotFoundError: as `read_bytes`.
    """
    if isinstance(place, bytes | bytearray | memoryview):
        raise TypeError("expected a path or a stream to write to, found bytes: pass an io.BytesIO()")
    if (stream := _stream(place, "write")) is not None:
        _write_stream(stream, data)
        return
    system, path = _located(place)
    if system is not None:
        system.pipe_file(path, data)
    else:
        _write_file(path, data)


def _at_once(path: str, flags: int) -> int:
    """Open without waiting for the other end of a pipe."""
    wait = 0 if _GIVEN.fullmatch(path) else getattr(os, "O_NONBLOCK", 0)
    handle = os.open(path, flags | wait, 0o666)
    if wait:
        os.set_blocking(handle, True)
    return handle


def _write_file(path: str, data: bytes) -> None:
    before = None
    with suppress(OSError):
        before = os.stat(path)
    if before is not None and not stat.S_ISREG(before.st_mode) and not stat.S_ISDIR(before.st_mode):
        with open(path, "wb", opener=_at_once) as device:  # /dev/stdout, a pipe: not to be replaced by a file
            device.write(data)
        return
    target = Path(os.path.realpath(path))
    if path.endswith(("/", os.sep)) or target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "cannot write a file: its name is a folder's; give a file in it", path)
    temporary: Path | None = None
    try:
        _clean(target)
        file = _part(target, private=before is not None)
        temporary = Path(file.name)
        with file:
            file.write(data)
            file.flush()
            if before is not None:
                _give(file.fileno(), before)
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()  # where an open file cannot be renamed
            os.replace(temporary, target)  # while it is locked: nobody takes it for a killed process's
    except BaseException as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError):
            why = f"{error.strerror}; expected an existing, writable folder with room for {len(data)} bytes"
            raise type(error)(error.errno, f"cannot write {target.name}: {why}", str(target.parent)) from error
        raise
    with suppress(OSError):  # the new file is there; not every folder can be opened
        _sync(target.parent)


def _give(handle: int, before: os.stat_result) -> None:
    """Owner and mode of the file that is to be replaced, as far as the system lets us."""
    if hasattr(os, "fchown"):
        with suppress(PermissionError):
            os.fchown(handle, before.st_uid, before.st_gid)
        os.fchmod(handle, stat.S_IMODE(before.st_mode))


def _prefix(target: Path) -> str:
    return f".{target.name.encode()[:_NAME].decode(errors='ignore')}."


def _part(target: Path, private: bool) -> IO[bytes]:
    """A new temporary file beside a target, locked as long as it is open."""
    while True:
        path = target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}.part")
        file = open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600 if private else 0o666))  # noqa: SIM115
        if _lock(file.fileno()) is not False and os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # somebody cleans up this very moment


def _lock(handle: int) -> bool | None:
    """Whether it is ours now; None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _clean(target: Path) -> None:
    """Remove the temporary files of saves of this target that were killed: those that no process holds."""
    with suppress(OSError):
        for name in os.listdir(target.parent):
            if not re.fullmatch(re.escape(_prefix(target)) + "[0-9a-f]{8}[.]part", name):
                continue
            path = target.with_name(name)
            with suppress(OSError), open(path, "rb", opener=_at_once) as file:
                if stat.S_ISREG(os.lstat(path).st_mode) and _lock(file.fileno()):
                    path.unlink()


def _sync(folder: Path) -> None:
    """Make the new name itself survive a power cut, where the system lets a folder be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _located(place: Any) -> tuple[Any, str]:
    """A URL's file system and the path in it; None and a path on this machine, without ``~``.

    >>> _located("~/model.psc") == (None, os.path.join(os.path.expanduser("~"), "model.psc"))
    True
    """
    if not isinstance(place, str) or not _URL.match(place):
        path = os.path.expanduser(os.fsdecode(place))
        if not path:
            raise FileNotFoundError(errno.ENOENT, "expected a path, found an empty one", path)
        return None, path
    try:
        from fsspec.core import url_to_fs
        from fsspec.implementations.local import LocalFileSystem

        system, path = url_to_fs(place)
    except ImportError as error:
        raise ModuleNotFoundError(f"{place}: a URL needs fsspec, and what it takes for this kind: {error}") from error
    except ValueError as error:
        raise OSError(errno.EINVAL, f"not a URL that can be opened: {error}", place) from error
    return (None if isinstance(system, LocalFileSystem) else system), path


def _stream(place: Any, method: str) -> Any:
    """An open binary stream as it is, None for what is a path.

    Raises:
        TypeError: neither, or a stream of text.
        ValueError: it is closed, or open for the other thing only.
    """
    if isinstance(place, str | os.PathLike) and not isinstance(place, io.IOBase):
        return None
    if not hasattr(place, method):
        raise TypeError(f"expected a path, a URL or an open binary file, found {type(place).__name__}")
    mode = f"open it with mode '{method[0]}b'"
    if isinstance(place, io.TextIOBase) or hasattr(place, "encoding"):
        raise TypeError(f"expected a binary stream, found one of text: {mode}")
    if getattr(place, "closed", False):
        raise ValueError(f"expected an open stream, found a closed one: {method} it before it is closed")
    if not getattr(place, f"{method[:4]}able", lambda: True)():
        raise ValueError(f"expected a stream that is open to {method}, found another: {mode}")
    return place


def _read_stream(stream: Any, limit: int) -> bytes:
    data = bytearray()
    while len(data) <= limit:
        piece = stream.read(min(_PIECE, limit + 1 - len(data)))
        if piece is None:
            raise BlockingIOError(errno.EAGAIN, "expected a stream that waits for its bytes, found a non-blocking one")
        if not piece:
            if not data and getattr(stream, "seekable", lambda: False)() and stream.tell():
                raise ValueError("expected bytes, found the end of the stream: call seek(0) before it is read")
            return bytes(data)
        data += piece
    raise OversizeError(f"more than {limit}")


def _write_stream(stream: Any, data: bytes) -> None:
    left = memoryview(data)
    while left:
        written = stream.write(left)
        if written == 0 or (written is None and isinstance(stream, io.RawIOBase)):
            raise BlockingIOError(errno.EAGAIN, "expected a stream that takes bytes, found a non-blocking one")
        left = left[written:] if isinstance(written, int) else left[:0]  # many streams of others do not count
