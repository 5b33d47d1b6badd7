"""Where images come from: scikit-learn's digits, or files in their official formats (a folder, or a checked download).

Files are read as numbers: nothing is unpickled, and sizes are checked first.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from rich.progress import Progress
from torch import Tensor

from psc_lightning.app.data import Splits
from psc_lightning.app.errors import UsageError
from psc_lightning.files import write_atomic

__all__ = ["cifar10", "digits", "fashion_mnist", "mnist"]


class Remote(NamedTuple):
    """A file to download: its place, its name, and the md5 sum its publisher gives."""

    base: str
    name: str
    md5: str


MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MNIST_FILES = (
    Remote(MNIST, "train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    Remote(MNIST, "train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
    Remote(MNIST, "t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
    Remote(MNIST, "t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
)
FASHION_FILES = (
    Remote(FASHION, "train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
    Remote(FASHION, "train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
    Remote(FASHION, "t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
    Remote(FASHION, "t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
)
CIFAR = Remote("https://www.cs.toronto.edu/~kriz/", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530")
CIFAR_FILES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
CIFAR_FOLDER = "cifar-10-batches-bin"
CIFAR_BYTES = 1 + 3 * 32 * 32  # a label and an image


def digits() -> Splits:
    """Return scikit-learn's 1,797 handwritten digits, 8×8, of which a fixed 360 are the test set; no download."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    return Splits(images[train], labels[train], images[test], labels[test])


def mnist(folder: str) -> Splits:
    """Return MNIST, 60,000 + 10,000 images of 28×28.

    Args:
        folder: holds the four official files (packed or not), or gets them by a checked download.

    Raises:
        UsageError: a file is missing and cannot be downloaded, or is not what it should be.
    """
    return idx_splits(Path(folder).expanduser(), MNIST_FILES)


def fashion_mnist(folder: str) -> Splits:
    """Return Fashion-MNIST, 60,000 + 10,000 images of 28×28; as `mnist`."""
    return idx_splits(Path(folder).expanduser(), FASHION_FILES)


def cifar10(folder: str) -> Splits:
    """Return CIFAR-10, 50,000 + 10,000 colour images of 32×32.

    Args:
        folder: holds `cifar-10-batches-bin/` (or its six .bin files), or gets it by a checked download.

    Raises:
        UsageError: a file is missing and cannot be downloaded, or is not what it should be.
    """
    root = Path(folder).expanduser()
    found = next((place for place in (root, root / CIFAR_FOLDER) if (place / CIFAR_FILES[0]).is_file()), None)
    if found is None:
        wanted = f"{CIFAR_FOLDER}/ with {', '.join(CIFAR_FILES)}, or {CIFAR.name}"
        archive = fetch(root, CIFAR, wanted)
        found = root / CIFAR_FOLDER
        found.mkdir(exist_ok=True)
        with tarfile.open(archive) as tar:  # the six members by name: nothing else in an archive is written
            for name in CIFAR_FILES:
                member = tar.extractfile(f"{CIFAR_FOLDER}/{name}")
                if member is None:
                    raise UsageError(f"{archive}: holds no {name}")
                write_atomic(found / name, member.read())
    parts = [read_cifar(found / name) for name in CIFAR_FILES]
    images, labels = (torch.cat(column) for column in zip(*parts[:-1], strict=True))
    return Splits(images, labels, *parts[-1])


def idx_splits(folder: Path, files: tuple[Remote, ...]) -> Splits:
    """Return the training and test sets of four IDX files."""
    arrays = []
    for remote in files:
        unpacked = folder / remote.name.removesuffix(".gz")
        path = unpacked if unpacked.is_file() else folder / remote.name
        if not path.is_file():
            fetch(folder, remote, ", ".join(one.name for one in files))
        arrays.append(read_idx(path))
    for images, labels, name in ((arrays[0], arrays[1], files[0].name), (arrays[2], arrays[3], files[2].name)):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise UsageError(f"{folder}: {name} and its labels differ: {tuple(images.shape)}, {tuple(labels.shape)}")
    return Splits(arrays[0].unsqueeze(1), arrays[1].long(), arrays[2].unsqueeze(1), arrays[3].long())


def read_idx(path: Path) -> Tensor:
    """Return the unsigned bytes of an IDX file, packed by gzip or not.

    Raises:
        UsageError: it is no IDX file of unsigned bytes, or its length is not what its header says.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile) as error:
        raise UsageError(f"{path}: not a whole gzip file ({error}); delete it and get it again") from error
    axes = raw[3] if len(raw) > 3 else 0
    if raw[:3] != b"\0\0\x08" or not 1 <= axes <= 3 or len(raw) < 4 + 4 * axes:
        raise UsageError(f"{path}: not an IDX file of unsigned bytes (it starts with {raw[:4].hex() or 'nothing'})")
    shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * axes)
    if body.size != int(np.prod(shape, dtype=np.float64)):
        raise UsageError(f"{path}: its header says {'×'.join(map(str, shape))} bytes, it has {body.size}")
    return torch.from_numpy(body.reshape(shape).copy())


def read_cifar(path: Path) -> tuple[Tensor, Tensor]:
    """Return images and labels of one file of CIFAR-10's binary version.

    Raises:
        UsageError: it is missing, empty, holds a part of a record, or a label above 9.
    """
    if not path.is_file():
        raise UsageError(f"{path} is missing; {path.parent} must hold {', '.join(CIFAR_FILES)}")
    raw = np.fromfile(path, np.uint8)
    if raw.size == 0 or raw.size % CIFAR_BYTES:
        raise UsageError(f"{path}: {raw.size} bytes, not a multiple of {CIFAR_BYTES}")
    records = raw.reshape(-1, CIFAR_BYTES)
    if records[:, 0].max() > 9:
        raise UsageError(f"{path}: a label of {records[:, 0].max()}; CIFAR-10's are 0 … 9")
    return torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).copy()), torch.from_numpy(
        records[:, 0].astype(np.int64)
    )


def fetch(folder: Path, remote: Remote, wanted: str) -> Path:
    """Return the path of a file in `folder`, after downloading it if it is missing.

    Raises:
        UsageError: it cannot be downloaded, or the bytes that came have another md5 sum.
    """
    target = folder / remote.name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".download.lock"):
        if target.is_file():
            return target
        url = remote.base + remote.name
        try:
            data = download(url)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            raise UsageError(
                f"data.folder: {folder} does not hold {remote.name} and {url} cannot be reached ({reason}); "
                f"put there: {wanted}"
            ) from error
        found = hashlib.md5(data, usedforsecurity=False).hexdigest()
        if found != remote.md5:
            raise UsageError(
                f"{url}: md5 {found}, expected {remote.md5}; nothing was kept. Put into {folder}: {wanted}"
            )
        write_atomic(target, data)
    return target


def download(url: str) -> bytes:
    """Return the bytes at an address, showing progress."""
    with urllib.request.urlopen(url, timeout=30) as answer, Progress(transient=True) as progress:
        size = answer.headers.get("Content-Length")
        task = progress.add_task(url.rsplit("/", 1)[-1], total=int(size) if size else None)
        chunks = []
        while chunk := answer.read(1 << 18):
            chunks.append(chunk)
            progress.advance(task, len(chunk))
    return b"".join(chunks)
