"""Where a file may come from and go to: paths, `~`, URLs, streams, bytes; what else is offered is refused in words."""

from __future__ import annotations

import gzip
import io
import os
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import nn

from psc_lightning.artifact import (
    ArtifactError,
    inspect,
    load,
    load_into,
    load_stored,
    measure,
    save,
    to_bytes,
    verify,
)
from psc_lightning.files import write_atomic
from psc_lightning.oneshot import compress


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2))
    compress(model, "binary")
    return model


class Drops:
    """A pipe's reading end: no length, no place to go back to, some bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def read(self, number: int) -> bytes:
        piece = self.data[self.at : self.at + min(number, 100)]
        self.at += len(piece)
        return piece


class Sips(io.RawIOBase):
    """A raw stream that takes three bytes at a time."""

    def __init__(self) -> None:
        self.got = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.got += bytes(data[:3])
        return min(3, len(data))


def in_memory(data: bytes) -> str:
    fsspec.filesystem("memory").pipe_file("/in.psc", data)
    return "memory://in.psc"


IN_MEMORY: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "BytesIO": io.BytesIO,
    "without length": Drops,
    "memory URL": in_memory,
    "chained URL": lambda data: f"simplecache::{in_memory(data)}",
    "gzip": lambda data: gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(data))),
}
ON_DISK: dict[str, Callable[[Path], Any]] = {
    "str": str,
    "Path": Path,
    "file URL": Path.as_uri,
    "open file": lambda path: path.open("rb"),
    "unbuffered file": lambda path: path.open("rb", buffering=0),
}


@contextmanager
def place(kind: str, data: bytes, folder: Path) -> Iterator[Any]:
    """Where these bytes are."""
    (folder / "model.psc").write_bytes(data)
    found = IN_MEMORY[kind](data) if kind in IN_MEMORY else ON_DISK[kind](folder / "model.psc")
    yield found
    if isinstance(found, io.IOBase):
        found.close()


@pytest.mark.parametrize("kind", [*IN_MEMORY, *ON_DISK])
def test_every_reader_takes_every_place(kind: str, model: nn.Module, tmp_path: Path) -> None:
    data, report = to_bytes(model)
    state, other = model.state_dict(), nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2))
    with place(kind, data, tmp_path) as source:
        assert all(torch.equal(tensor, state[name]) for name, tensor in load(source).items())
    with place(kind, data, tmp_path) as source:
        verify(source)
    with place(kind, data, tmp_path) as source:
        assert inspect(source).sha256 == report.sha256
    with place(kind, data, tmp_path) as source:
        assert list(load_stored(source)) == ["0.weight"]
    with place(kind, data, tmp_path) as source:
        assert load_into(other, source) == []
    assert torch.equal(other[0].weight, state["0.weight"])


@pytest.mark.parametrize("kind", ["bytes", "BytesIO", "without length", "gzip", "memory URL", "Path"])
def test_a_limit_holds_wherever_the_bytes_come_from(kind: str, tmp_path: Path) -> None:
    data = bytes(1_100_000)  # longer than the slack that names may take
    with (
        place(kind, data, tmp_path) as source,
        pytest.raises(ArtifactError, match="at most max_bytes = 1048676 bytes, found"),
    ):
        verify(source, max_bytes=100)


def test_a_stream_is_written_and_read_from_where_it_stands(model: nn.Module) -> None:
    data = to_bytes(model)[0]
    stream = io.BytesIO()
    stream.write(b"head")
    assert save(model, stream).file_bytes == len(data)
    assert stream.getvalue() == b"head" + data
    assert not stream.closed
    stream.seek(4)
    assert list(load(stream)) == list(model.state_dict())
    sips = Sips()
    save(model, sips)
    assert sips.got == data


def test_streams_of_archives_and_temporary_files(model: nn.Module, tmp_path: Path) -> None:
    data = to_bytes(model)[0]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, archive.open("model.psc", "w") as member:
        save(model, member)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, archive.open("model.psc") as member:
        verify(member)
    with tempfile.SpooledTemporaryFile() as spooled, tempfile.NamedTemporaryFile() as named:
        for stream in (spooled, named):
            save(model, stream)
            stream.seek(0)
            assert stream.read() == data


def test_urls_are_written(model: nn.Module, tmp_path: Path) -> None:
    data = to_bytes(model)[0]
    save(model, "memory://folder/model.psc")
    assert fsspec.filesystem("memory").cat_file("/folder/model.psc") == data
    save(model, (tmp_path / "model.psc").as_uri())
    assert (tmp_path / "model.psc").read_bytes() == data
    with fsspec.open("memory://other.psc", "wb") as stream:  # and what fsspec itself opens
        save(model, stream)
    with fsspec.open("memory://other.psc", "rb") as stream:
        verify(stream)
    assert os.listdir(tmp_path) == ["model.psc"]


def test_home_is_a_tilde(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(model, "~/a.psc")
    save(model, Path("~") / "b.psc").save("~/b.json")
    verify("~/a.psc")
    assert sorted(os.listdir(tmp_path)) == ["a.psc", "b.json", "b.psc"]


@pytest.mark.parametrize("name", ["n" * 255, "ä" * 127, "n" * 241])
def test_a_name_may_be_as_long_as_the_system_allows(name: str, tmp_path: Path) -> None:
    write_atomic(tmp_path / name, b"old")
    write_atomic(tmp_path / name, b"new")
    assert (tmp_path / name).read_bytes() == b"new"
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("length", [245, 4096])
def test_names_of_tensors_may_be_long(length: int) -> None:
    model = nn.ModuleDict({"m" * (length - len(".weight")): nn.Linear(2, 2, bias=False)})
    (name,) = load(to_bytes(model)[0])
    assert len(name) == length


def test_pipes_and_devices_are_no_files_to_replace(model: nn.Module, tmp_path: Path) -> None:
    data, pipe = to_bytes(model)[0], tmp_path / "pipe"
    os.mkfifo(pipe)
    with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb") as other:
        save(model, pipe)
        assert other.read() == data
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]
    code = "from psc_lightning import files; files.write_atomic('/dev/stdout', files.read_bytes('/dev/stdin', 9999))"
    made = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True, timeout=120)
    assert made.stdout == data


# ------------------------------------------------------------------------------------------------------- refusals


class Wrapped:
    """A file of text that is none of io's, as tempfile gives."""

    encoding = "utf-8"
    read = write = None


def closed() -> io.BytesIO:
    stream = io.BytesIO()
    stream.close()
    return stream


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda path: 5, TypeError, "expected a path, a URL or an open binary file, found int"),
        (lambda path: None, TypeError, "found NoneType"),
        (lambda path: io.StringIO(), TypeError, "expected a binary stream, found one of text: open it with mode"),
        (lambda path: Wrapped(), TypeError, "found one of text"),
        (lambda path: closed(), ValueError, "expected an open stream, found a closed one"),
        (lambda path: "", FileNotFoundError, "expected a path, found an empty one"),
        (lambda path: path, IsADirectoryError, "folder"),
        (lambda path: f"{path}/new/", OSError, "folder|No such file"),
        (lambda path: path / "nowhere" / "model.psc", FileNotFoundError, "No such file or directory"),
        (lambda path: "nosuch://model.psc", OSError, "not a URL that can be opened: Protocol not known: nosuch"),
    ],
)
def test_what_is_no_place_is_told(
    make: Callable[[Path], Any], error: type[Exception], said: str, model: nn.Module, tmp_path: Path
) -> None:
    for use in (load, verify, lambda place: save(model, place)):
        with pytest.raises(error, match=said):
            use(make(tmp_path))
    assert not list(tmp_path.iterdir())


def test_streams_of_the_other_direction_are_told(model: nn.Module, tmp_path: Path) -> None:
    save(model, tmp_path / "model.psc")
    with open(tmp_path / "model.psc", "rb") as reading, open(tmp_path / "new", "wb") as writing:
        with pytest.raises(ValueError, match=r"expected a stream that is open to write, found another: .* mode 'wb'"):
            save(model, reading)
        with pytest.raises(ValueError, match=r"expected a stream that is open to read, found another: .* mode 'rb'"):
            load(writing)
    with pytest.raises(TypeError, match=r"found bytes: pass an io\.BytesIO"):
        save(model, b"model.psc")  # type: ignore[arg-type]
    stream = io.BytesIO()
    save(model, stream)
    with pytest.raises(ValueError, match=r"found the end of the stream: call seek\(0\)"):
        load(stream)
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        load("memory://nowhere.psc")


def test_a_url_without_fsspec_says_what_it_needs(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ModuleNotFoundError, match="memory://a: a URL needs fsspec"):
        load("memory://a")
    with pytest.raises(ModuleNotFoundError, match="memory://a: a URL needs fsspec"):
        save(model, "memory://a")


# --------------------------------------------------------------------------------------------------- map_location


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    "where",
    [
        "meta",
        torch.device("meta"),
        {"cpu": "meta"},
        lambda storage, location: torch.UntypedStorage(storage.nbytes(), device="meta"),
    ],
    ids=["name", "device", "mapping", "function"],
)
def test_tensors_are_put_where_map_location_says(where: Any) -> None:
    data = to_bytes(tied())[0]
    found = load(data, map_location=where)
    assert {tensor.device.type for tensor in found.values()} == {"meta"}
    assert found["0.weight"] is found["1.weight"]
    assert found["0.weight"].shape == (4, 4)


@pytest.mark.parametrize(
    "where",
    [None, "cpu", {"cuda:0": "cpu"}, lambda storage, location: None],
    ids=["none", "name", "mapping", "function"],
)
def test_a_map_location_may_leave_tensors_on_the_cpu(where: Any) -> None:
    model = tied()
    found = load(to_bytes(model)[0], map_location=where)
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())


def test_a_whole_model_goes_where_map_location_says() -> None:
    model = nn.BatchNorm1d(3)
    load_into(model, to_bytes(nn.BatchNorm1d(3))[0], map_location="cpu")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    with pytest.raises(RuntimeError, match="nosuch"):
        load_into(model, to_bytes(nn.BatchNorm1d(3))[0], map_location="nosuch")
    # Into tensors without memory nothing can be copied, and torch itself only warns.
    load_into(model, to_bytes(nn.BatchNorm1d(3))[0], map_location={"cpu": "meta"})
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    with pytest.raises(ValueError, match="the model is on the meta device"):
        load_into(model, to_bytes(nn.BatchNorm1d(3))[0])


# -------------------------------------------------------------------------------------------------- part of a model


class Adapted(nn.Module):
    """A layer, and beside it a low-rank adapter."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(8, 8)
        self.lora_A, self.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.base(x) + self.lora_B(self.lora_A(x)))


ADAPTER = ["lora_A.weight", "lora_B.weight"]


@pytest.mark.parametrize("only", ["*lora*", ["lora_A", "lora_B"], ["lora_?.*"], "re:lora_.*"], ids=str)
def test_an_adapter_alone_is_saved_and_loaded(only: str | list[str], tmp_path: Path) -> None:
    trained, fresh = Adapted(0), Adapted(1)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    report = save(trained, tmp_path / "adapter.psc", only=only)
    assert [row.name for row in report.tensors] == ADAPTER
    assert report.dense_bytes == 2 * 2 * 8 * 4
    assert report.file_bytes == (tmp_path / "adapter.psc").stat().st_size == measure(trained, only=only).file_bytes
    assert list(load(tmp_path / "adapter.psc")) == ADAPTER
    left = load_into(fresh, tmp_path / "adapter.psc")
    assert left == [name for name in before if name not in ADAPTER]
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name] if name in ADAPTER else before[name]), name


def test_an_adapter_is_saved_compressed(tmp_path: Path) -> None:
    model, fresh = Adapted(0), Adapted(1)
    compress(model, "ternary", targets="lora*", min_size=1)
    report = save(model, tmp_path / "adapter.psc", only="lora*")
    assert [row.method for row in report.tensors] == ["magnitude+ternary"] * 2
    load_into(fresh, tmp_path / "adapter.psc")
    assert all(torch.equal(fresh.state_dict()[name], model.state_dict()[name]) for name in ADAPTER)
    assert set(load_stored(tmp_path / "adapter.psc", model=fresh)) == set(ADAPTER)


def test_a_part_is_strict_in_what_it_holds(tmp_path: Path) -> None:
    data = to_bytes(Adapted(0), only="*lora*")[0]
    with pytest.raises(ArtifactError, match=r"lora_A\.weight is not in the model"):
        load_into(nn.Linear(8, 8), data)
    other = Adapted(1)
    other.lora_A = nn.Linear(8, 3, bias=False)
    with pytest.raises(ArtifactError, match=r"lora_A\.weight has shape \[2, 8\] in the file, \[3, 8\] in the model"):
        load_into(other, data)
    # A whole file of a smaller model is none that says it is a part.
    with pytest.raises(ArtifactError, match=r"base\.weight is missing in the file"):
        load_into(Adapted(1), to_bytes(nn.ModuleDict({"lora_A": nn.Linear(8, 2, bias=False)}))[0])


def test_all_of_a_model_is_no_part_and_the_same_bytes() -> None:
    assert to_bytes(Adapted(0), only="*")[0] == to_bytes(Adapted(0))[0]


def test_a_tied_tensor_that_a_part_fills_is_not_left() -> None:
    data = to_bytes(tied(), only="1.weight")[0]
    model = tied()
    assert load_into(model, data) == ["0.bias", "1.bias"]
    assert torch.equal(model[0].weight, load(data)["1.weight"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"only": "*nothing*"},
            r"only: '\*nothing\*' matches no tensor or module; the tensors are base\.weight, base\.bias",
        ),
        ({"only": ["*lora*", "bias"]}, "only: 'bias' matches no"),
        ({"only": 3}, "only: expected a pattern or a list"),
        ({"only": "lora*", "names": False}, "only: expected a file with names"),
        ({"only": "lora*", "fold_batchnorm": True}, "only: expected a file with names, of weights as they are"),
        ({"only": "lora*", "leftovers": {"base.*": "float16"}}, "base"),
    ],
)
def test_a_part_that_cannot_be_is_told(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        save(Adapted(0), tmp_path / "adapter.psc", **options)
    assert not list(tmp_path.iterdir())
