"""A damaged or hostile file is refused with an ArtifactError, or reads as what a whole file says; never anything else."""

from __future__ import annotations

import random
import resource
import time
import zlib
from pathlib import Path

import pytest
import torch
from fuzz import closed, little_memory, watched
from models import EVERY_METHOD, bag, compressed, fill
from torch import nn

from psc_lightning.artifact import (
    ArtifactError,
    container,
    directory,
    inspect,
    load,
    load_into,
    save,
    streams,
    to_bytes,
)
from psc_lightning.artifact.ans import Coded
from psc_lightning.artifact.container import varint
from psc_lightning.artifact.directory import Entry, Kind

LIMIT = 1 << 20


def resealed(data: bytes) -> bytes:
    """With the checksum made right again."""
    return data[:4] + zlib.crc32(data[8:]).to_bytes(4, "little") + data[8:]


def refused(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    started = time.monotonic()
    try:
        tensors = load(path, max_bytes=LIMIT)
    except ArtifactError:
        return True
    finally:
        assert time.monotonic() - started < 2
    assert sum(tensor.nbytes for tensor in tensors.values()) <= LIMIT
    return False


@pytest.fixture(scope="module")
def small() -> bytes:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    fill(model, ("0.weight",), mask="magnitude", levels="ternary")
    return to_bytes(model)[0]


def test_every_truncation(small: bytes, tmp_path: Path) -> None:
    for length in range(len(small)):
        assert refused(tmp_path / "f", small[:length])


def test_every_byte_flipped(small: bytes, tmp_path: Path) -> None:
    for at in range(len(small)):
        for mask in (1, 0x80, 0xFF):
            data = bytearray(small)
            data[at] ^= mask
            assert refused(tmp_path / "f", bytes(data))


def test_the_checksum_comes_first(small: bytes, tmp_path: Path) -> None:
    """Whatever a flipped bit would have meant."""
    for at in range(4, len(small)):
        data = bytearray(small)
        data[at] ^= 0x80
        (tmp_path / "f").write_bytes(data)
        with pytest.raises(ArtifactError, match="expected checksum"):
            load(tmp_path / "f")


def test_every_byte_flipped_and_every_truncation_under_a_right_checksum(small: bytes, tmp_path: Path) -> None:
    for at in range(8, len(small)):
        for mask in (1, 0x80, 0xFF):
            data = bytearray(small)
            data[at] ^= mask
            refused(tmp_path / "f", resealed(bytes(data)))
        assert refused(tmp_path / "f", resealed(small[:at]))


def test_symbols_that_end_too_early_or_too_late(small: bytes, tmp_path: Path) -> None:
    """In a shell that is right in itself, only the coder's final state tells."""
    (tag, contents), (_, symbols) = container.unpack(small, frozenset({1, 2, 3})).items()
    assert not refused(tmp_path / "f", container.pack({tag: contents, 3: symbols}))
    for length in range(len(symbols)):
        assert refused(tmp_path / "f", container.pack({tag: contents, 3: symbols[:length]}))
    assert refused(tmp_path / "f", container.pack({tag: contents, 3: symbols + b"\1"}))


def test_splices_of_all_methods(tmp_path: Path) -> None:
    choice = random.Random(0)
    files = [to_bytes(compressed(**slots))[0] for slots in EVERY_METHOD[::3]]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(300):
        first, second = choice.choice(files), choice.choice(files)
        data = first[: choice.randrange(8, len(first))] + second[choice.randrange(8, len(second)) :]
        refused(tmp_path / "f", resealed(data))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


NUMBERS = (0, 1, 2, 3, 5, 7, 64, 255, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, -1, -(2**63))


@pytest.mark.parametrize("slots", EVERY_METHOD[::3], ids=lambda slots: "+".join(map(str, slots.values())))
def test_forged_numbers_in_well_coded_files(
    slots: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hostile writer: any of a method's integers replaced, everything else coded properly."""
    model = compressed(**slots)
    honest = streams.SymbolWriter.integer
    choice = random.Random(0)
    forged_at, seen = -1, 0

    def integer(self: streams.SymbolWriter, value: int) -> None:
        nonlocal seen
        if seen == forged_at:
            value = choice.choice((*NUMBERS, value + 1, value - 1))
        seen += 1
        honest(self, value)

    monkeypatch.setattr(streams.SymbolWriter, "integer", integer)
    to_bytes(model)
    for at in choice.sample(range(seen), min(seen, 6)):
        forged_at, seen = at, 0
        refused(tmp_path / "f", to_bytes(model)[0])


def test_a_small_file_that_asks_for_much(tmp_path: Path) -> None:
    """Constant tensors cost nothing to declare: the limit is what protects."""
    data, _ = to_bytes(bag({"a": torch.zeros(1 << 9, 1 << 9), "b": torch.zeros(1)}))
    assert len(data) < 60
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(ArtifactError, match="max_bytes"):
        load(tmp_path / "f", max_bytes=LIMIT)


def test_a_model_does_not_take_memory_for_other_shapes(tmp_path: Path) -> None:
    """`load_into` knows how much its model takes: names and shapes are compared before anything is decoded."""
    many = [("weight", (1 << 13, 1 << 13)), ("bias", (1,))]
    data = closed([Entry(name, Kind.LEFTOVER, torch.float32, shape) for name, shape in many], Coded(b"\1"))
    (tmp_path / "f").write_bytes(data)
    with (
        little_memory(),
        pytest.raises(ArtifactError, match=r"weight has shape \[8192, 8192\] in the file, \[1, 2\] in"),
    ):
        load_into(nn.Linear(2, 1), tmp_path / "f")


def test_a_small_file_takes_little_memory_whatever_the_limit(tmp_path: Path) -> None:
    """Python's `read(n)` takes n bytes before it reads: the default limit is 2 GiB."""
    save(nn.Linear(2, 1), tmp_path / "f")
    with little_memory():
        load(tmp_path / "f")


def endless(number: int) -> dict[str, tuple[bytes, bytes]]:
    """The first name of a table of contents, and what is repeated after it."""
    longest = directory._LONGEST // 2
    growing = b"".join(varint(longest - 4) + f"{i:x}\n".encode() for i in range(number))
    return {
        "one name": (b"a", b"\0a\n" * number),
        "long": (b"a." * (1 << 20), varint(1 << 20) + b"\n"),
        "all together": (b"a." * (longest - 4), growing),
    }


@pytest.mark.parametrize("which", endless(1))
def test_names_that_repeat_without_end(tmp_path: Path, which: str) -> None:
    """A few kilobytes, deflated, of as many names as may be that are equal, or that would take gigabytes."""
    first, rest = endless(1 << 15)[which]
    table = varint(1 << 15) + b"\0" + first + b"\n" + rest
    (tmp_path / "f").write_bytes(container.pack({directory.DEFLATED: directory._deflate(table, 0), 3: b"\1"}))
    with (
        little_memory(),
        watched(),
        pytest.raises(ArtifactError, match="different names of at most 4096 char") as caught,
    ):
        load(tmp_path / "f")
    assert len(str(caught.value)) < 400


def test_more_centroids_than_weights(tmp_path: Path) -> None:
    """256 centroids for each single weight: the limit is on what is read, not on the tensor alone."""
    writer = streams.SymbolWriter()
    for number in (0, 0, 0, 6, 256, 2, 0):  # layout, tying, mask, codebook, k, group, exponent
        writer.integer(number)
    data = closed([Entry("a", Kind.SLOTS, torch.float32, (2, LIMIT // 8))], writer.finish())
    (tmp_path / "f").write_bytes(data)
    with (
        little_memory(),
        pytest.raises(ArtifactError, match=r"expected at most 5034\d{4} bytes of tables and symbols"),
    ):
        load(tmp_path / "f", max_bytes=LIMIT)


def test_a_compressed_weight_without_rows(tmp_path: Path) -> None:
    writer = streams.SymbolWriter()
    for _ in range(4):  # layout, tying, mask, levels
        writer.integer(0)
    (tmp_path / "f").write_bytes(closed([Entry("a", Kind.SLOTS, torch.float32, (0, 3))], writer.finish()))
    assert load(tmp_path / "f")["a"].shape == (0, 3)
    assert inspect(tmp_path / "f").tensors[0].levels == 0
