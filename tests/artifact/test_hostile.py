"""What a file can do that somebody wrote who knows the format and means ill: nothing beyond its allowance.

Judged by counts, of steps that the coder took and of bytes, never by a clock.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import forge
import pytest
import torch
from forge import DIAGONALS, LINES
from fuzz import closed, little_memory
from models import bag, fill
from torch import nn

from psc_lightning.artifact import (
    ArtifactError,
    directory,
    file,
    inspect,
    load,
    load_into,
    reading,
    save,
    streams,
    to_bytes,
    verify,
)
from psc_lightning.artifact.allowance import TENSOR, Allowance, most_tensors
from psc_lightning.artifact.ans import Coded, Decoder
from psc_lightning.artifact.directory import Entry, Kind
from psc_lightning.report.difference import differences


class Counting(Decoder):
    """Counts what the coder is asked for, whatever the reader says of it."""

    asked = 0

    def integer(self, context: str) -> int:
        """One more."""
        Counting.asked += 1
        return super().integer(context)

    def take_runs(self, *args):
        """A line, or a diagonal."""
        Counting.asked += 1
        return super().take_runs(*args)

    def take(self, *args):
        """A block."""
        Counting.asked += 1
        return super().take(*args)


@contextmanager
def counted() -> Iterator[list[Allowance]]:
    """The allowances that files got within it."""
    made: list[Allowance] = []

    def make(declared: int, tensors: int, length: int) -> Allowance:
        made.append(Allowance(declared, tensors, length))
        return made[-1]

    Counting.asked = 0
    with mock.patch.object(streams, "Decoder", Counting), mock.patch.object(reading, "Allowance", make):
        yield made


SLOW = {
    "lines": lambda: forge.masks(LINES, 24, 8192),
    "diagonals": lambda: forge.masks(DIAGONALS, 6, 4095),
    "splits": lambda: forge.wide_splits(4096, 64),
}


@pytest.mark.parametrize("which", SLOW)
def test_time_that_nothing_declares(which: str) -> None:
    """Some hundred bytes took 3 to 8 seconds: each line, diagonal and plane is counted, most before they are read."""
    data = SLOW[which]()
    assert len(data) < 600
    with counted() as made, pytest.raises(ArtifactError, match=r"expected at most \d+ steps of work"):
        load(data)
    (allowance,) = made
    declared = {"lines": 24 * 8192 * 4, "diagonals": 6 * 4095 * 4, "splits": 4096 * 64 * 4}[which]
    tensors = {"lines": 24, "diagonals": 6, "splits": 1}[which]
    allowed = 2**15 + 256 * tensors + (declared + 1024 * tensors) / 1024 + 16 * len(data)
    assert Counting.asked <= allowance.most_steps <= allowed


def test_a_model_that_fits_is_no_way_around_it() -> None:
    model = nn.Linear(64, 4096, bias=False)
    data = forge.wide_splits(4096, 64)
    entries, coded, _ = reading.opened(data)
    data = closed([Entry("weight", Kind.SLOTS, torch.float32, entries[0].shape)], coded)
    with pytest.raises(ArtifactError, match="steps of work"):
        load_into(model, data)


@pytest.mark.parametrize("make", [forge.scalars, forge.single_entries], ids=["scalars", "slots"])
def test_many_small_tensors_take_what_they_say(make: Callable[[int], bytes]) -> None:
    """An honest model may have them: they are read, at so many steps each, and these are all there is."""
    with counted() as made:
        assert len(load(make(500))) == 500
    assert Counting.asked <= made[0].steps <= 500 * 30


@pytest.mark.parametrize("size", [512, 1024])
def test_tables_larger_than_their_weights(size: int) -> None:
    """34 bytes took 3.5 GB: 256 centroids for each weight."""
    data = forge.codebook_tables(size, size)
    assert len(data) < 50
    with (
        counted() as made,
        little_memory(),
        pytest.raises(ArtifactError, match=r"at most \d+ bytes of tables and symbols"),
    ):
        load(data)
    assert Counting.asked < 20
    assert made[0].most_bytes <= 2**25 + 16 * (4 * size * size + TENSOR) + 4 * len(data)


def test_names_become_objects_only_if_there_may_be_so_many() -> None:
    """Millions of names in some kilobytes took 841 MB before anyone asked how many."""
    data = forge.names(1_900_000)
    assert len(data) < 100_000
    for read in (lambda: load_into(nn.Linear(2, 1), data), lambda: load(data, max_bytes=1000), lambda: load(data)):
        with mock.patch.object(directory, "Entry", side_effect=AssertionError("an object")):
            tracemalloc.start()
            try:
                with pytest.raises(ArtifactError, match=r"at most \d+ tensors for a table of this length"):
                    read()
                assert tracemalloc.get_traced_memory()[1] < 2 * directory._INFLATED + (1 << 20)
            finally:
                tracemalloc.stop()


def test_what_is_held_for_names_grows_with_the_file() -> None:
    for number in (1000, 20_000):
        data = forge.names(number)
        entries = reading.opened(data)[0]
        tracemalloc.start()
        try:
            reading.opened(data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < TENSOR * len(entries) + (1 << 20)


def test_max_bytes_counts_tensors_too() -> None:
    assert most_tensors(1 << 40, 1 << 20) == most_tensors(0) + (1 << 10)
    table = directory._plain([Entry(f"{i}", Kind.LEFTOVER, torch.bool, (0,)) for i in range(most_tensors(0) + 2)])
    assert len(directory.decode(directory.PLAIN, table, max_bytes=1 << 20)) == most_tensors(0) + 2
    with pytest.raises(ArtifactError, match="tensors for a table"):
        directory.decode(directory.PLAIN, table, max_bytes=1000)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Kind.SLOTS, torch.bool),
        (Kind.SLOTS, torch.uint8),
        (Kind.SLOTS, torch.int64),
        (Kind.SLOTS, torch.complex64),
        (Kind.HALF, torch.bool),
        (Kind.HALF, torch.float16),
        (Kind.HALF, torch.int32),
        (Kind.LOG, torch.uint8),
    ],
)
def test_types_that_no_writer_stores_so(kind: Kind, dtype: torch.dtype) -> None:
    """They passed max_bytes 20 to 35 times over."""
    with pytest.raises(ArtifactError, match="as no writer stores it"):
        load(closed([Entry("a", kind, dtype, (4,))], Coded(b"\1")))


def test_many_names_of_one_tensor_are_one_tensor() -> None:
    """615 bytes, 300 names of one: looked at, compared and summed up once."""
    data = forge.aliases(300, 64, 64)
    with mock.patch.object(file, "summarise", wraps=file.summarise) as summarised:
        report = inspect(data)
    assert len(report.tensors) == 301
    assert summarised.call_count == 2
    tensors = load(data)
    with mock.patch("psc_lightning.report.difference._by_entry", return_value=(0, 0.0)) as compared:
        assert [one.name for one in differences(tensors, load(data))] == list(tensors)
    assert compared.call_count == 1


def test_symbols_that_nobody_reads_are_not_listed() -> None:
    """They took 13 times their length."""
    data = forge.unread(12 << 20)
    with little_memory(), pytest.raises(ArtifactError, match="does not end where the last tensor ends"):
        load(data)


def test_optional_sections_come_once() -> None:
    """Eight million empty ones took 6 seconds."""
    assert load(forge.optional_sections(1)) == {}
    with pytest.raises(ArtifactError, match="expected one section 200, found two"):
        load(forge.optional_sections(2))


@pytest.mark.parametrize("name", ["_extra_state", "block.0._extra_state"])
def test_extra_state_is_refused(name: str) -> None:
    """`load_state_dict` would hand it to the module, and modules in public use unpickle it there."""
    for read in (load, verify, inspect):
        with pytest.raises(ArtifactError, match="_extra_state, which modules unpickle"):
            read(forge.named(name))


class WithState(nn.Linear):
    """As layers of libraries in public use."""

    def get_extra_state(self) -> torch.Tensor:
        """A pickle, say."""
        return torch.zeros(3, dtype=torch.uint8)

    def set_extra_state(self, state: object) -> None:
        """Whatever comes would be unpickled here."""
        raise AssertionError("handed on")


def test_extra_state_is_not_saved_and_a_part_goes_in(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"^_extra_state: .*name what to save \(only=…\), or register a buffer"):
        save(WithState(2, 2), tmp_path / "f")
    assert not any(tmp_path.iterdir())
    save(WithState(2, 2), tmp_path / "f", only=["weight", "bias"])
    assert set(load(tmp_path / "f")) == {"weight", "bias"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.complex64])
def test_numbers_that_are_none(value: float, dtype: torch.dtype) -> None:
    """Refused in reading as in saving."""
    model = bag({"a": torch.tensor([0.5, value], dtype=dtype)})
    with pytest.raises(ValueError, match="expected finite numbers"):
        to_bytes(model)
    with mock.patch.object(file, "check_tensor"):
        data = to_bytes(model)[0]
    with pytest.raises(ArtifactError, match="a: expected finite numbers, found NaN or infinity"):
        load(data)


def test_no_memory_is_no_damage() -> None:
    data = to_bytes(bag({"a": torch.arange(5.0)}))[0]
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ):
        with mock.patch("psc_lightning.artifact.leftovers.decode", side_effect=error), pytest.raises(MemoryError):
            load(data)


# ------------------------------------------------------------------------------------------- what honest files need


def test_a_million_groups_of_one_entry() -> None:
    model = nn.Sequential(nn.Linear(1000, 1000, bias=False))
    fill(model, ("0.weight",), levels=("ttq", {"group": 1}))
    with counted() as made:
        assert torch.equal(load(to_bytes(model)[0])["0.weight"], model[0].weight)
    assert made[0].bytes < made[0].most_bytes / 2


def test_a_writer_does_not_write_what_no_reader_would_read() -> None:
    """Centroids that are 32 times as many as the weights, and nearly all of them alike."""
    model = nn.Sequential(nn.Linear(300, 400, bias=False))
    model[0].weight.data.zero_()[0, 0] = 1.0
    fill(model, ("0.weight",), levels=("codebook", {"k": 256, "group": 8}))
    with pytest.raises(ValueError, match="use larger groups, or a smaller k"):
        to_bytes(model)


def test_a_writer_counts_and_takes_another_way() -> None:
    """Bits by lines, again and again: at first they are, and later not, so that all of them are read."""
    striped = (torch.arange(8192)[:, None] // torch.tensor([64, 100]) % 2).to(torch.uint8).reshape(-1)
    grid = torch.ones(8192, 2, dtype=torch.bool)
    sizes = (4 * len(striped), 4)
    writer, free = streams.SymbolWriter(Allowance(*sizes, 0)), streams.SymbolWriter()
    free.symbols(striped, 2, grid)
    assert free.streams[0].coding == "lines"
    assert 4 * free.steps > Allowance(*sizes, 4 * len(free.finish())).most_steps
    for _ in range(4):
        writer.symbols(striped, 2, grid)
    assert [one.coding for one in writer.streams].count("lines") in (1, 2, 3)
    coded = writer.finish()
    allowance = Allowance(*sizes, len(coded))
    assert writer.steps <= allowance.most_steps
    reader = streams.SymbolReader(coded, allowance)
    for _ in range(4):
        assert torch.equal(reader.symbols(len(striped), 2, grid), striped)
    reader.finish()
    assert allowance.steps == writer.steps


def test_very_many_names_that_are_alike_are_not_deflated() -> None:
    entries = [Entry(f"{block}.{leaf}", Kind.LEFTOVER, torch.bool, ()) for block in range(200) for leaf in range(200)]
    tag, section = directory.encode(entries)
    assert tag == directory.PLAIN
    assert directory.decode(tag, section) == entries
    assert directory.encode(entries[:30_000])[0] == directory.DEFLATED


def test_more_axes_than_a_file_holds() -> None:
    assert load(to_bytes(bag({"a": torch.zeros((1,) * 32)}))[0])["a"].dim() == 32
    with pytest.raises(ValueError, match="a: expected at most 32 axes, found 33"):
        to_bytes(bag({"a": torch.zeros((1,) * 33)}))
