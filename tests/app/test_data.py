"""Readers of official files, downloads, and batches that depend on seed, epoch and number alone."""

from __future__ import annotations

import gzip
import hashlib
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from psc_lightning.app import sources
from psc_lightning.app.data import Epochs, ImageData, Splits, crop_and_flip
from psc_lightning.app.errors import UsageError


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, packed: bool) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 7), ("t10k", 3)):
        arrays[f"{part}-images-idx3-ubyte"] = generator.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = generator.integers(0, 10, count, np.uint8)
    for name, array in arrays.items():
        data = idx(array)
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
    return arrays


@pytest.mark.parametrize("read", [sources.mnist, sources.fashion_mnist])
@pytest.mark.parametrize("packed", [True, False])
def test_mnist_files_packed_and_not(tmp_path: Path, packed: bool, read: Callable[[str], Splits]) -> None:
    arrays = write_mnist(tmp_path, packed)
    splits = read(str(tmp_path))
    assert splits.train_images.shape == (7, 1, 28, 28)
    assert torch.equal(splits.train_images[:, 0], torch.from_numpy(arrays["train-images-idx3-ubyte"]))
    assert splits.test_labels.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()
    assert splits.test_labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "not an IDX file"),
        (b"", "nothing"),
        (idx(np.zeros((2, 28, 28), np.uint8))[:-1], "2×28×28"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 2**31, 2**31, 2**31), "2147483648"),
        (idx(np.zeros(7, np.uint8)), "differ"),
    ],
)
def test_a_file_that_is_not_what_it_should_be(tmp_path: Path, data: bytes, words: str) -> None:
    write_mnist(tmp_path, packed=False)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(data)
    with pytest.raises(UsageError, match=words):
        sources.mnist(str(tmp_path))


def test_a_truncated_archive(tmp_path: Path) -> None:
    write_mnist(tmp_path, packed=True)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UsageError, match="not a whole gzip file"):
        sources.mnist(str(tmp_path))


def cifar_file(count: int, seed: int) -> bytes:
    generator = np.random.default_rng(seed)
    records = generator.integers(0, 256, (count, 3073), np.uint8)
    records[:, 0] %= 10
    return records.tobytes()


def test_cifar_folder_and_archive_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for number, name in enumerate(sources.CIFAR_FILES):
        (folder / name).write_bytes(cifar_file(2, number))
    splits = sources.cifar10(str(tmp_path))
    assert splits.train_images.shape == (10, 3, 32, 32)
    record = np.frombuffer(cifar_file(2, 5), np.uint8).reshape(2, 3073)
    assert splits.test_labels.tolist() == record[:, 0].tolist()
    assert splits.test_images[1, 2, 31, 31] == record[1, -1]
    assert torch.equal(sources.cifar10(str(folder)).test_images, splits.test_images)

    served = tmp_path / "served"
    served.mkdir()
    with tarfile.open(served / sources.CIFAR.name, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    md5 = hashlib.md5((served / sources.CIFAR.name).read_bytes()).hexdigest()
    monkeypatch.setattr(sources, "CIFAR", sources.Remote(f"file://{served}/", sources.CIFAR.name, md5))
    downloaded = sources.cifar10(str(tmp_path / "new"))
    assert torch.equal(downloaded.train_images, splits.train_images)


@pytest.mark.parametrize(("data", "words"), [(b"\x0a" + bytes(3072), "label of 10"), (bytes(99), "99 bytes")])
def test_a_damaged_cifar_file(tmp_path: Path, data: bytes, words: str) -> None:
    for name in sources.CIFAR_FILES:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=words):
        sources.cifar10(str(tmp_path))


def test_a_download_with_another_md5_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(b"changed on the way")
    target = tmp_path / "data"
    with pytest.raises(UsageError, match="expected 0000"):
        sources.fetch(target, sources.Remote(f"file://{tmp_path}/", "x.gz", "0000"), "x.gz")
    assert not (target / "x.gz").exists()


@pytest.mark.parametrize(("name", "files"), [("mnist", "MNIST_FILES"), ("fashion_mnist", "FASHION_FILES")])
def test_no_internet_says_which_files_go_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: str
) -> None:
    base = f"http://127.0.0.1:1/{name}/"
    nowhere = tuple(remote._replace(base=base) for remote in getattr(sources, files))
    monkeypatch.setattr(sources, files, nowhere)
    with pytest.raises(UsageError) as caught:
        getattr(sources, name)(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert base in str(caught.value)
    assert all(remote.name in str(caught.value) for remote in nowhere)


def test_epochs_cover_the_data_and_differ() -> None:
    epochs = Epochs(10, 4, seed=3)
    first = [draw.indices.tolist() for draw in epochs]
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(index for batch in first for index in batch) == list(range(10))
    assert first == [draw.indices.tolist() for draw in epochs]
    epochs.set_epoch(1)
    assert first != [draw.indices.tolist() for draw in epochs]
    in_order = Epochs(10, 4, seed=None)
    assert torch.cat([draw.indices for draw in in_order]).tolist() == list(range(10))


def test_shares_of_two_processes_are_disjoint_and_equally_long() -> None:
    shares = [torch.cat([draw.indices for draw in Epochs(11, 2, 0, rank, 2)]).tolist() for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == 5
    assert len({*shares[0], *shares[1]}) == 10


def test_an_epoch_goes_on_where_it_stopped() -> None:
    data = ImageData(random_splits, [0.5], [0.5], batch_size=4, augment="crop_and_flip")
    data.setup("fit")
    whole = data.train_dataloader()
    whole.epochs.set_epoch(2)
    batches = list(whole)
    state = {"epoch": 2, "position": 3}
    later = data.train_dataloader()
    later.load_state_dict(state)
    later.epochs.set_epoch(2)
    rest = list(later)
    assert len(rest) == len(batches) - 3
    assert all(torch.equal(a, b) for pair, same in zip(rest, batches[3:]) for a, b in zip(pair, same))
    later.epochs.set_epoch(3)
    assert len(list(later)) == len(batches)


def random_splits() -> Splits:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return Splits(images, torch.arange(40), images[:5], torch.arange(5))


def test_iterating_leaves_torchs_own_generator_alone() -> None:
    data = ImageData(random_splits, [0.5], [0.5], batch_size=4, augment="crop_and_flip")
    data.setup("fit")
    before = torch.get_rng_state()
    list(data.train_dataloader())
    list(data.val_dataloader())
    assert torch.equal(before, torch.get_rng_state())


def test_no_validation_images_no_validation() -> None:
    data = ImageData(random_splits, [0.5], [0.5], batch_size=4, validation=0)
    data.setup("fit")
    assert data.val_dataloader() == []
    assert len(data.train_dataloader().dataset) == len(random_splits().train_images)  # type: ignore[arg-type]


def test_validation_images_are_not_trained_on() -> None:
    data = ImageData(random_splits, [0.5], [0.5], batch_size=4, validation=0.25)
    data.setup("fit")
    train = torch.cat([labels for _, labels in data.train_dataloader()])
    held = torch.cat([labels for _, labels in data.val_dataloader()])
    assert len(held) == 10
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(40))
    other = ImageData(random_splits, [0.5], [0.5], seed=9, validation=0.25)
    other.setup("fit")
    assert torch.equal(held, torch.cat([labels for _, labels in other.val_dataloader()]))


def test_crop_and_flip_move_whole_images() -> None:
    images = torch.zeros(64, 1, 8, 8, dtype=torch.uint8)
    images[:, :, 4, 3] = 255
    moved = crop_and_flip(images, torch.Generator().manual_seed(0), padding=2)
    places = moved.flatten(1).argmax(1)
    assert moved.shape == images.shape
    assert (moved.flatten(1).sum(1) == 255).all()
    rows, columns = places // 8, places % 8
    assert set(rows.tolist()) == {2, 3, 4, 5, 6}
    assert set(columns.tolist()) == {1, 2, 3, 4, 5, 6}


def test_digits_are_all_there() -> None:
    splits = sources.digits()
    assert splits.train_images.shape == (1437, 1, 8, 8)
    assert splits.test_images.shape == (360, 1, 8, 8)
    assert splits.train_images.max() == 255
