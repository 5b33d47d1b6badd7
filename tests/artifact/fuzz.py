"""Damaged and hostile files without end: each is refused with an ArtifactError or decodes, and nothing else happens.

    python tests/artifact/fuzz.py --files 200000 --keep DIRECTORY

By chance; `fuzz_guided.py` does it by coverage. It ends with status 1 if a file makes the reader raise anything but
ArtifactError, think for more than a second of processor time, or take much more memory than `max_bytes`; that file is
then printed. With --keep, the shortest file of each kind of answer is written to a folder: so came about `corpus/`.
"""

from __future__ import annotations

import argparse
import random
import re
import resource
import signal
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from models import EVERY_METHOD, bag, compressed, fill
from torch import Tensor, nn

from psc_lightning.artifact import ArtifactError, container, directory, inspect, load, reading, streams, to_bytes
from psc_lightning.artifact.allowance import Allowance
from psc_lightning.artifact.ans import Coded, Decoder, Encoder, Ints, Nesting, Packed, count
from psc_lightning.artifact.codings import gaps, plain
from psc_lightning.artifact.directory import DTYPES, Entry, Kind
from psc_lightning.report.numbers import Report
from psc_lightning.symbols import look_up

LIMIT = 1 << 20
ROOM = 1 << 26  # bytes of address space beyond what the process has: what torch and Python themselves want in between
SECONDS = 1.0
#: shapes at the limits that codings have, as far as `LIMIT` goes
LONG = ((8192, 1), (8192, 32), (1, 8192), (4095, 1), (1, 4095), (2048, 64), (512, 512), (64, 4096), (65536, 4))
NUMBERS = (0, 1, 2, 3, 5, 7, 8, 16, 64, 255, 256, 257, 2**16, 2**20, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)


class Hang(BaseException):
    """A file kept the reader busy for too long; not an Exception, so that nobody handles it."""


@contextmanager
def watched() -> Iterator[None]:
    """Raise `Hang` after a second of this process's own time, however busy the machine is."""

    def ring(*_: object) -> None:
        raise Hang(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def little_memory() -> Iterator[None]:
    """Let the process take no more than `ROOM` bytes on top of what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def judge(data: bytes, path: Path) -> Report | ArtifactError:
    """What the reader makes of a file; raises what it must not raise."""
    path.write_bytes(data)
    try:
        with watched(), little_memory():
            tensors = load(path, max_bytes=LIMIT)
        with watched(), little_memory():
            report = inspect(path, max_bytes=LIMIT)
    except ArtifactError as error:
        if "allocate" in str(error):
            raise MemoryError("memory was asked for, and only the system refused") from error
        return error
    assert list(tensors) == [row.name for row in report.tensors]
    assert report.dense_bytes == sum({id(tensor): tensor.nbytes for tensor in tensors.values()}.values()) <= LIMIT
    return report


# -------------------------------------------------------------------------------------------------------- seeds


def everything() -> nn.Module:
    """A leftover of every type, two names of one, an empty one, a single number."""
    tensors = {f"of_{str(dtype)[6:]}": (torch.arange(12).reshape(3, 4) % 5).to(dtype) for dtype in DTYPES}
    tensors["again"] = tensors["of_float32"]
    return bag({**tensors, "none": torch.zeros(0, 3), "one": torch.tensor(7)})


def single(**slots: str | tuple[str, dict[str, object]]) -> nn.Module:
    """A convolution without a bias behind these slots."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False))
    model[0].weight.data.copy_((torch.arange(288) * 7919 % 257 - 128).reshape(8, 4, 3, 3) / 64)
    fill(model, ("0.weight",), **slots)
    return model


def ordered(**slots: str | tuple[str, dict[str, object]]) -> nn.Module:
    """A matrix whose signs, sizes and zeros hang on their columns."""
    model = nn.Sequential(nn.Linear(40, 60, bias=False))
    columns = torch.arange(40)
    signs, sizes = 1 - 2 * (columns // 5 % 2), 1 + columns % 4 * (columns > 20)
    noise = (torch.arange(2400) * 7919 % 257).reshape(60, 40) / 257
    model[0].weight.data.copy_(signs * (sizes + 0.9 * noise) * torch.where(noise < 0.1, -1, 1))
    fill(model, ("0.weight",), **slots)
    return model


def noise() -> nn.Module:
    """Bytes, nibbles and bits that no coding makes shorter."""
    words = torch.tensor(list(random.Random(0).randbytes(9000)), dtype=torch.uint8)
    return bag({"bytes": words[:4100], "nibbles": words[4100:] >> 4, "bits": words[:8997] > 127})


def seeds(step: int = 1) -> list[bytes]:
    """Honest files: every method (or every `step`-th), leftovers of all types, both tables of contents, more sections."""
    with mock.patch.object(plain, "_LEAST", 1):
        files = [to_bytes(noise())[0]]
    assert opened(files[0])[1].plain
    with mock.patch.multiple(gaps, _LEAST=1, _SHARE=1):
        files.append(to_bytes(bag({"rare": torch.arange(5000) % 97 == 5}))[0])
    assert reading.decoded(*opened(files[-1]), LIMIT).streams[0].coding == "gaps"
    models = [single(**slots) for slots in EVERY_METHOD[::step]]
    models += [ordered(mask=("magnitude", {"threshold": 0.5}), levels=levels) for levels in ("binary", "uniform")]
    models += [ordered(levels="ternary"), ordered(levels=("codebook", {"k": 8}))]
    models += [compressed(mask="magnitude", levels="ternary"), everything(), nn.Linear(2, 1, bias=False)]
    models += [
        compressed(levels=("codebook", {"scales": "log8"})),
        compressed(levels=("uniform", {"scales": "float32"})),
    ]
    files += [to_bytes(model)[0] for model in models]
    files.append(to_bytes(everything(), leftovers="log8")[0])
    files.append(to_bytes(everything(), leftovers="float16")[0])
    files.append(sealed(files[-1][8:] + b"\x80\x03xyz"))
    return files


def sealed(body: bytes) -> bytes:
    """A file of these sections, with the right checksum."""
    return container.MAGIC + bytes([container.VERSION]) + zlib.crc32(body).to_bytes(4, "little") + body


def opened(data: bytes) -> tuple[list[Entry], Coded]:
    """Entries and symbols of an honest file."""
    return reading.opened(data)[:2]


def closed(entries: list[Entry], symbols: Coded) -> bytes:
    """The file of these entries and symbols."""
    tag, contents = directory.encode(entries)
    return container.pack({tag: contents, 3: symbols.stack} | ({5: symbols.plain} if symbols.plain else {}))


# ---------------------------------------------------------------------------------------------------- mutations


def flipped(files: list[bytes], choice: random.Random) -> bytes:
    """Some bits turned over."""
    body = bytearray(choice.choice(files)[8:])
    for _ in range(choice.choice((1, 1, 2, 8))):
        body[choice.randrange(len(body))] ^= 1 << choice.randrange(8)
    return sealed(bytes(body))


def unsealed(files: list[bytes], choice: random.Random) -> bytes:
    """One bit of the whole file, and the checksum left as it was."""
    data = bytearray(choice.choice(files))
    data[choice.randrange(len(data))] ^= 1 << choice.randrange(8)
    return bytes(data)


def truncated(files: list[bytes], choice: random.Random) -> bytes:
    """The end missing: of the file, or of its symbols."""
    data = choice.choice(files)
    if choice.random() < 0.5:
        return sealed(data[8 : choice.randrange(8, len(data))])
    entries, symbols = opened(data)
    return closed(entries, replace(symbols, stack=symbols.stack[: choice.randrange(len(symbols.stack))]))


def spliced(files: list[bytes], choice: random.Random) -> bytes:
    """Parts of two files."""
    first, second = choice.choice(files), choice.choice(files)
    if choice.random() < 0.5:
        return sealed(first[8 : choice.randrange(8, len(first))] + second[choice.randrange(8, len(second)) :])
    return closed(opened(first)[0], opened(second)[1])


def edited_entries(entries: list[Entry], choice: random.Random) -> list[Entry]:
    """A field of the table of contents replaced."""
    entries = list(entries)
    at = choice.randrange(len(entries))
    entry = entries[at]
    edit = choice.randrange(7)
    if edit == 0:
        entries[at] = replace(entry, dtype=choice.choice(DTYPES))
    elif edit == 1:
        kind = choice.choice(list(Kind))
        entries[at] = replace(entry, kind=kind, alias=choice.randrange(len(entries)) if kind is Kind.ALIAS else None)
    elif edit == 2 and entry.shape:
        axes = list(entry.shape)
        axes[choice.randrange(len(axes))] = choice.choice((*NUMBERS, choice.randrange(300)))
        entries[at] = replace(entry, shape=tuple(axes))
    elif edit == 3:
        entries[at] = replace(
            entry, shape=choice.choice((entry.shape[::-1], entry.shape[1:], (*entry.shape, 2), (), choice.choice(LONG)))
        )
    elif edit == 4:
        entries[at] = replace(entry, name=choice.choice(("", ".", "a", "weight", choice.choice(entries).name)))
    elif edit == 5:
        del entries[at]
    else:
        entries.insert(choice.randrange(len(entries)), entry)
    return entries


def table_edited(files: list[bytes], choice: random.Random) -> bytes:
    """A field of the table of contents replaced, or a few of its bytes."""
    entries, symbols = opened(choice.choice(files))
    if choice.random() < 0.5:
        return closed(edited_entries(entries, choice), symbols)
    with mock.patch.object(directory, "_deflate", lambda data, strategy: data):
        table = bytearray(directory.encode(entries)[1])
    for _ in range(choice.choice((1, 1, 3))):
        table[choice.randrange(len(table))] = choice.choice((0, 1, 10, 127, 128, 255, choice.randrange(256)))
    return container.pack({directory.PLAIN: bytes(table), 3: symbols.stack, 5: symbols.plain})


def plain_edited(files: list[bytes], choice: random.Random) -> bytes:
    """Symbols that went past the coder: some missing, some too many, others, or where none are."""
    entries, symbols = opened(choice.choice((files[0], choice.choice(files))))
    data = bytearray(symbols.plain)
    edit = choice.randrange(4)
    if edit == 0:
        del data[choice.randrange(len(data) + 1) :]
    elif edit == 1:
        data += choice.randbytes(choice.choice((1, 8, 1000)))
    elif edit == 2:
        del data[: choice.randrange(len(data) + 1)]
    elif data:
        data[choice.choice((-1, choice.randrange(len(data))))] ^= 1 << choice.randrange(8)
    return closed(entries, replace(symbols, plain=bytes(data)))


class Forger(Nesting):
    """Stands where the decoder stands: an honest file's numbers up to a place, others from there on; keeps them all.

    What it gave out, coded properly, is the file of a writer who knows the format and means ill.
    """

    bits = 0.0

    def __init__(self, symbols: Coded, choice: random.Random, at: int, returns: bool) -> None:
        super().__init__(Allowance(LIMIT, 4, 0))
        self.tape: list[tuple[str, int] | tuple[Tensor, Ints] | tuple[Tensor, int]] = []
        self._honest, self._choice, self._at, self._returns = Decoder(symbols), choice, at, returns

    def _forges(self) -> bool:
        return len(self.tape) == self._at or (len(self.tape) > self._at and not self._returns)

    def integer(self, context: str) -> int:
        """A number for a reader that asks for one."""
        value = self._honest.integer(context)
        if self._forges():
            close = (value + 1, max(value - 1, 0), self._choice.randrange(9), self._choice.randrange(520))
            value = self._choice.choice((*close, *close, self._choice.choice(NUMBERS)))
        self.tape.append((context, value))
        return value

    def _symbols(self, number: int, size: int) -> Tensor:
        seed = torch.Generator().manual_seed(self._choice.randrange(1 << 32))
        return torch.randint(size, (number,), generator=seed, dtype=torch.uint8)

    def take(self, number: int, k: Ints) -> tuple[Tensor, Ints]:
        """Symbols for a reader that asks for them."""
        symbols = self._symbols(number, len(k)) if self._forges() else self._honest.take(number, k)[0]
        self.tape.append((symbols.clone(), k))
        return symbols, count(symbols, len(k))

    def take_plain(self, number: int, width: int) -> Packed:
        """Symbols past the coder, which an honest file need not have."""
        try:
            packed = None if self._forges() else self._honest.take_plain(number, width)
        except ArtifactError:
            packed = None
        symbols = self._symbols(number, 1 << width) if packed is None else packed.symbols()
        self.tape.append((symbols, width))
        encoder = Encoder()
        encoder.put_plain(symbols, width)
        return Packed(np.frombuffer(bytearray(encoder.finish().plain), dtype=np.uint8), number, width)

    def take_runs(self, numbers: Sequence[int], tables: Sequence[Ints]) -> npt.NDArray[np.uint8]:
        """Runs of symbols for a reader that asks for them."""
        return np.concatenate([self.take(number, k)[0].numpy() for number, k in zip(numbers, tables, strict=True)])

    def finish(self) -> None:
        """There is always an end."""

    def coded(self) -> Coded:
        """All of it, entropy-coded."""
        encoder = Encoder()
        for first, second in self.tape:
            if isinstance(first, str):
                encoder.integer(second, first)
            elif isinstance(second, int):
                encoder.put_plain(first, second)
            else:
                encoder.put(first, second, count(first, len(second)))
        return encoder.finish()


def forged(files: list[bytes], choice: random.Random) -> bytes:
    """Any of the numbers replaced, all numbers coded properly."""
    entries, symbols = opened(choice.choice(files))
    if choice.random() < 0.3:
        entries = edited_entries(entries, choice)
    at = min(int(choice.expovariate(1 / 20)), 200)
    forger = Forger(symbols, choice, at, returns=choice.random() < 0.6)
    with mock.patch.object(streams, "Decoder", return_value=forger), suppress(Exception, Hang), watched():
        reading.decoded(entries, symbols, LIMIT)
    return closed(entries, forger.coded())


class Inventor:
    """Stands where the reader of symbols stands and makes up all that is asked for, mostly within the stated range."""

    bits = 0.0

    def __init__(self, choice: random.Random) -> None:
        self.streams: list[streams.Stream] = []
        self.writer = streams.SymbolWriter()
        self._choice = choice

    def integer(self, low: int, high: int) -> int:
        """A number for a method that asks for one."""
        few = (low, high, min(low + 1, high), min(max(low, 0) + self._choice.randrange(9), high))
        value = self._choice.choice((*few, *few, self._choice.randint(low, high)))
        if self._choice.random() < 0.01:
            value = self._choice.choice((low - 1, high + 1, *NUMBERS))
        self.writer.integer(value)
        if not low <= value <= high:
            raise ArtifactError("no such number")
        return value

    def symbols(self, number: int, size: int, grid: Tensor | None = None) -> Tensor:
        """Symbols for a method that asks for them."""
        if not 0 <= number <= LIMIT:
            raise ArtifactError("no such number of symbols")
        seed = torch.Generator().manual_seed(self._choice.randrange(1 << 32))
        top = self._choice.choice((1, 2, size, size))
        values = torch.randint(min(top, size), (number,), generator=seed, dtype=torch.int32)
        if self._choice.random() < 0.3:
            values = size - 1 - values
        self.writer.symbols(values, size, grid)
        return values.to(torch.uint8) if size <= 256 else values

    def values(self, number: int, table: Tensor, grid: Tensor | None = None) -> Tensor:
        """What a table has for them."""
        return look_up(table.numpy(), self.symbols(number, len(table), grid).numpy())

    def finish(self) -> None:
        """There is always an end."""


def invented(files: list[bytes], choice: random.Random) -> bytes:
    """A table of contents and all numbers made up: what only a writer who knows the format, and means ill, would write."""
    entries: list[Entry] = []
    for at in range(choice.randrange(1, 4)):
        shape = tuple(choice.choice((0, 1, 1, 2, 3, 4, 6, choice.randrange(12))) for _ in range(choice.randrange(6)))
        kind = choice.choice((Kind.SLOTS, Kind.SLOTS, Kind.SLOTS, Kind.LEFTOVER, Kind.HALF))
        if choice.random() < 0.05:
            shape = choice.choice(LONG)
        entries.append(Entry(f"{at}.weight", kind, choice.choice((torch.float32, choice.choice(DTYPES))), shape))
    inventor = Inventor(choice)
    with (
        mock.patch.object(reading, "SymbolReader", return_value=inventor),
        suppress(Exception, Hang),
        watched(),
    ):
        reading.decoded(entries, Coded(b""), LIMIT)
    return closed(entries, inventor.writer.finish())


MUTATIONS = (flipped, unsealed, truncated, spliced, table_edited, plain_edited, forged, invented)


def mutants(files: list[bytes], seed: int) -> Iterator[tuple[str, bytes]]:
    """Mutated files, without end, each with the name of what was done to it."""
    choice = random.Random(seed)
    while True:
        mutation = choice.choice(MUTATIONS)
        yield mutation.__name__, mutation(files, choice)


# ------------------------------------------------------------------------------------------------------- running


def kind_of(answer: Report | ArtifactError) -> str:
    """What kind of answer it is: a refusal without its numbers and names, or the methods of what was read."""
    if isinstance(answer, ArtifactError):
        text = re.sub(r"b?'.*?'|\b[0-9a-f]{8}\b|\S*\d\S*|[^ -~]", "", str(answer))
        return "refused-" + re.sub(r"\W+", "-", text).strip("-")[:50].strip("-")
    return "reads-" + "-".join(sorted({row.method for row in answer.tensors} - {"plain"}) or ["plain"])


class Run:
    """Counts answers and keeps the shortest file of each kind."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, bool]] = Counter()
        self.shortest: dict[str, bytes] = {}
        self.bad = 0
        self._folder = tempfile.TemporaryDirectory()

    def one(self, how: str, data: bytes) -> None:
        """Judge a file."""
        try:
            answer = judge(data, Path(self._folder.name) / "f")
        except (Exception, Hang) as error:
            self.bad += 1
            print(f"BAD, {how}: {type(error).__name__}: {error}\n{data.hex()}", flush=True)
            return
        self.counts[how, isinstance(answer, ArtifactError)] += 1
        kind = kind_of(answer)
        if len(data) < len(self.shortest.get(kind, bytes(4000))):
            self.shortest[kind] = data

    def summary(self) -> str:
        """How many of each."""
        lines = [f"{'mutation':14}{'refused':>10}{'decoded':>10}"]
        for how in sorted({how for how, _ in self.counts}):
            lines.append(f"{how:14}{self.counts[how, True]:10,}{self.counts[how, False]:10,}")
        both = [sum(n for (_, refused), n in self.counts.items() if refused is wanted) for wanted in (True, False)]
        lines.append(f"{'all':14}{both[0]:10,}{both[1]:10,}   anything else: {self.bad}")
        return "\n".join(lines)

    def keep(self, folder: Path) -> None:
        """Write the shortest file of each kind."""
        folder.mkdir(parents=True, exist_ok=True)
        for kind, data in self.shortest.items():
            (folder / f"{kind}.psc").write_bytes(data)


def by_chance(run: Run, files: int, seed: int) -> None:
    """So many mutated files."""
    for (how, data), _ in zip(mutants(seeds(), seed), range(files), strict=False):
        run.one(how, data)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, default=20_000, help="how many mutated files")
    parser.add_argument("--seed", type=int, default=0, help="start of the random numbers")
    parser.add_argument("--keep", metavar="DIRECTORY", type=Path, help="write the shortest file of each kind of answer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = Run()
    by_chance(run, options.files, options.seed)
    print(run.summary())
    if options.keep:
        run.keep(options.keep)
    return int(run.bad > 0)


if __name__ == "__main__":
    sys.exit(main())
