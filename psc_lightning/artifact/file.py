"""A model to a .psc file and back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from psc_lightning import folding
from psc_lightning.artifact import container, directory, leftovers, reading
from psc_lightning.artifact.allowance import Allowance
from psc_lightning.artifact.directory import Entry, Kind
from psc_lightning.artifact.leftovers import Precisions
from psc_lightning.artifact.model.moving import MapLocation, moved
from psc_lightning.artifact.model.snapshots import (
    Snapshot,
    check_tensor,
    part_of,
    plain_state,
    snapshots_of,
    tell_extras,
)
from psc_lightning.artifact.model.summary import (
    Summary,
    batchnorm_batches,
    layer_types,
    report_of,
    summarise,
    tell_dense,
)
from psc_lightning.artifact.streams import SymbolWriter
from psc_lightning.checkpoint import plain_name
from psc_lightning.files import Place, Source, write_atomic
from psc_lightning.report.numbers import Report
from psc_lightning.sharding import by_rank_zero, sharded_modules, whole
from psc_lightning.slots.live import note_read
from psc_lightning.slots.stored import Stored
from psc_lightning.slots.targets import tensors

__all__ = ["inspect", "is_part", "load", "load_into", "load_stored", "measure", "save", "to_bytes", "verify"]

MAX_BYTES = 2**31


def save(
    model: nn.Module,
    path: Place,
    leftovers: Precisions = "float32",
    names: bool = True,
    fold_batchnorm: bool | Mapping[str, str] = False,
    only: str | Iterable[str] | None = None,
) -> Report:
    """Write a model's weights as they are used: compressed tensors through their slots, all others losslessly.

    Of several processes rank zero writes. A sharded model (FSDP2) is gathered for it: then all ranks must call this.

    Args:
        model: any module; what was attached to it by psc_lightning's callbacks or `compress` is stored compactly.
        path: the file to write; one that exists is replaced only when the new one is complete. ``~`` is the home folder.
            Or a URL that fsspec knows, or a binary stream (`io.BytesIO`), which is written from where it stands.
        leftovers: how tensors outside the slots are stored: `float32`, as they are; `float16`, floating ones rounded
            (reading gives `x.to(float16).to(x.dtype)`); `log8`, 8 bits on a logarithmic grid, within 4.5 %. Or a mapping
            from globs over tensor names: ``{"*.running_*": "log8", "*": "float16"}``; the first that matches counts.
        names: False leaves names and shapes out: only `load_into`, with the same model, reads such a file.
        fold_batchnorm: store what `psc_lightning.fold_batchnorm` makes of the model; a mapping names the pairs.
        only: the entries of the state dict to write, as globs over their names, modules' names or ``re:…`` (``"*lora_*"``).
            The file says that it is a part, so that `load_into` leaves the others as they are. None: all.

    Returns:
        What was stored, and in how many bytes.

    Raises:
        ValueError: a non-finite weight, a value beyond float16, or a tensor that cannot be stored or folded; it is named.
            A pattern of `only` that matches nothing. A stream that is closed or not open for writing.
        TypeError: the place is no path and no binary stream.
        OSError: the folder is missing or not writable, or the disk is full; nothing is left behind.
    """
    data, report = to_bytes(model, leftovers, names, fold_batchnorm, only)
    tell_extras(model)
    if leftovers == "float32":
        tell_dense(model, report)
    by_rank_zero(lambda: write_atomic(path, data), together=bool(sharded_modules(model)))
    return report


def measure(
    model: nn.Module,
    leftovers: Precisions = "float32",
    names: bool = True,
    fold_batchnorm: bool | Mapping[str, str] = False,
    only: str | Iterable[str] | None = None,
) -> Report:
    """What `save` would write now, with each slot that has begun at full strength; nothing is written, nothing changes.

    At any time, in training too: in a step, in a ramp, on any rank (of a sharded model on all of them).

    Args:
        model, leftovers, names, fold_batchnorm, only: as for `save`.

    Raises:
        ValueError: as `save`.

    >>> from psc_lightning.oneshot import compress
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> measure(model).file_bytes > 7000
    True
    >>> compress(model, "binary").file_bytes == measure(model).file_bytes < 600
    True
    """
    return to_bytes(model, leftovers, names, fold_batchnorm, only)[1]


def to_bytes(
    model: nn.Module,
    leftovers: Precisions = "float32",
    names: bool = True,
    fold_batchnorm: bool | Mapping[str, str] = False,
    only: str | Iterable[str] | None = None,
) -> tuple[bytes, Report]:
    """What `save` would write, and its report; the model is not changed.

    Raises:
        ValueError: as `save`.
    """
    if only is not None and (fold_batchnorm or not names):
        raise ValueError(
            "only: expected a file with names, of weights as they are, found names=False or fold_batchnorm"
        )
    refreshed = batchnorm_batches(model)
    if fold_batchnorm:
        model = folding.fold_batchnorm(model, None if fold_batchnorm is True else fold_batchnorm)
    with torch.no_grad():
        snapshots = snapshots_of(model, leftovers, only)
        with whole(model):
            writer, entries, bits, held = _put(model, snapshots, leftovers, only)
            tag, content = directory.encode(entries) if names else directory.encode_nameless(entries)
            coded = writer.finish()
            _check_readable(entries, writer, len(coded))
            sections = {tag: content, reading.SYMBOLS: coded.stack}
            sections |= {reading.PLAIN: coded.plain} if coded.plain else {}
            sections |= {reading.PARTIAL: b""} if len(entries) < len(plain_state(model)) else {}
            data = container.pack(sections)
            digest = hashlib.sha256(data).hexdigest()
            report = report_of(entries, bits, writer.streams, len(data), digest, held, layer_types(model))
            report.batchnorm_batches = refreshed
            return data, report


def dense_bytes(model: nn.Module) -> int:
    """Elements × element size over the plain state dict, shared tensors once."""
    return sum(entry.nbytes for entry in _entries(plain_state(model), {}, "float32") if entry.alias is None)


def _check_readable(entries: Sequence[Entry], writer: SymbolWriter, length: int) -> None:
    """Refuse what no reader would read: numbers beside the weights that are many times as many as these.

    Raises:
        ValueError: it is so.
    """
    allowance = Allowance(reading.declared(entries), len(entries), length)
    if writer.bytes > allowance.most_bytes or writer.steps > allowance.most_steps:
        raise ValueError(
            f"expected at most {allowance.most_bytes} bytes and {allowance.most_steps} steps for who reads these tensors, "
            f"found {writer.bytes} and {writer.steps}: use larger groups, or a smaller k, so that weights share their tables"
        )


def _put(
    model: nn.Module,
    snapshots: Mapping[str, Snapshot],
    precisions: Precisions,
    only: str | Iterable[str] | None = None,
) -> tuple[SymbolWriter, list[Entry], list[float], dict[int, Summary]]:
    """A model's tensors in a writer: what each is, what it cost in bits, what the report says of it."""
    state = part_of(plain_state(model), only)
    snapshots = {plain_name(name): snapshot for name, snapshot in snapshots.items() if plain_name(name) in state}
    for name in snapshots:
        check_tensor(name, snapshots[name][1])  # levels would make a number of an infinity
    for name, value in state.items():
        check_tensor(name, value)
    entries = _entries(state, snapshots, precisions)
    writer = SymbolWriter(Allowance(reading.declared(entries), len(entries), 0))
    repeated = {entry.alias for entry in entries}
    held: dict[int, Summary] = {}
    plain: dict[int, Summary] = {}  # of what others repeat
    bits = [0.0] * len(entries)
    for group in leftovers.groups(entries):
        before = writer.bits
        entry = entries[group[0]]
        if entry.kind is Kind.SLOTS:
            form, latent = snapshots[entry.name]
            stored = form.stored(latent)
            check_tensor(entry.name, stored.weight)
            held[group[0]] = summarise(list(stored.cores.values()), stored.method)
            if group[0] in repeated:
                plain[group[0]] = summarise([stored.weight])
            del stored  # a large model's memory is better not held twice
            form.encode(writer, latent)
        else:
            together = {entries[i].name: state[entries[i].name] for i in group}
            leftovers.encode(writer, together, leftovers.stored_as(entry))
            held |= {i: summarise([state[entries[i].name]]) for i in group}
        reading.share(bits, entries, group, writer.bits - before)
    held |= {i: plain.get(entry.alias, held[entry.alias]) for i, entry in enumerate(entries) if entry.alias is not None}
    return writer, entries, bits, held


def load(path: Source, max_bytes: int = MAX_BYTES, map_location: MapLocation = None) -> dict[str, Tensor]:
    """Read a file: the plain state dict of the model's own class; of a file that is a part, its entries.

    Args:
        path: the file: a path, a URL that fsspec knows, a binary stream (from where it stands to its end), or its bytes.
        max_bytes: refuse, before taking memory, a file whose tensors need more than this.
        map_location: where the tensors are put, as in `torch.load`. None: on the CPU.

    Raises:
        ArtifactError: not a whole and undamaged .psc file, or too large; the message says what to do.
        OSError: it cannot be opened.
        TypeError, ValueError: neither a path nor bytes, nor a binary stream that is open for reading.
    """
    return moved(reading.read(path, max_bytes).tensors, map_location)


def load_stored(path: Source, max_bytes: int | None = None, model: nn.Module | None = None) -> dict[str, Stored]:
    """The compressed tensors of a file by name, each as its cores and what makes the weight from them.

    Args:
        path: the file; see `load`.
        max_bytes: as for `load`; with a model as for `load_into`.
        model: what the file goes into, for one without names.

    Raises:
        ArtifactError: as `load`, or as `load_into`.
    """
    if model is not None:
        return reading.read_for(model, path, max_bytes, keep=True).stored
    return reading.read(path, MAX_BYTES if max_bytes is None else max_bytes, keep=True).stored


def verify(path: Source, max_bytes: int = MAX_BYTES) -> None:
    """Check a file from end to end: checksum, structure, every symbol.

    Args:
        path, max_bytes: as for `load`.

    Raises:
        ArtifactError: it is not whole and undamaged, or too large.
    """
    reading.read(path, max_bytes)


def is_part(path: Source, max_bytes: int = MAX_BYTES) -> bool:
    """Whether a file holds a part of its model only: `save(…, only=…)`.

    Raises:
        ArtifactError: as `load`.
    """
    return reading.PARTIAL in container.unpack(container.read(path, max_bytes + reading.SLACK), reading.KNOWN)


def inspect(path: Source, max_bytes: int = MAX_BYTES) -> Report:
    """The report of a file, as far as the file alone tells: layer types are empty.

    Raises:
        ArtifactError: as `load`.
    """
    data = container.read(path, max_bytes + reading.SLACK)
    entries, coded, _ = reading.opened(data, max_bytes)
    content = reading.decoded(entries, coded, max_bytes, keep=True)
    held: dict[int, Summary] = {}
    repeated: dict[int, Summary] = {}  # once, however many names it has
    for index, entry in enumerate(entries):
        if entry.alias is None:
            one = content.stored.get(entry.name)
            values = [content.tensors[entry.name]] if one is None else list(one.cores.values())
            held[index] = summarise(values, None if one is None else one.method)
        else:
            if entry.alias not in repeated:
                repeated[entry.alias] = summarise([content.tensors[entry.name]])
            held[index] = repeated[entry.alias]
    digest = hashlib.sha256(data).hexdigest()
    return report_of(content.entries, content.bits, content.streams, len(data), digest, held, {})


@torch.no_grad()
def load_into(
    model: nn.Module, path: Source, max_bytes: int | None = None, map_location: MapLocation = None
) -> list[str]:
    """Put a file's weights into a model of the same class, plain or live; all of them, or none on an error.

    What the file knows of them beside their values (a byte for each, or two) is kept: `save` writes these again, and
    `export_onnx` packs them, as long as they are what was read.

    Args:
        model: the model.
        path: the file; see `load`.
        max_bytes: as for `load`. None: what the model's own tensors can take.
        map_location: where the whole model is put then. None: it stays where it is.

    Returns:
        The names of the model's tensors that a file which is a part (`save(…, only=…)`) has left as they were.

    Raises:
        ArtifactError: as `load`, or names or shapes differ; the message lists them.
        ValueError: the model is sharded, or on the meta device.
    """
    if sharded_modules(model):
        raise ValueError("load_into: the model is sharded already: load into it before fully_shard")
    state = model.state_dict()
    if any(isinstance(value, Tensor) and value.is_meta for value in state.values()):
        raise ValueError("load_into: the model is on the meta device, without memory: model.to_empty(device=…) first")
    device = moved({"": torch.empty(0)}, map_location)[""].device
    content = reading.read_for(model, path, max_bytes, keep=True)
    given = {name: content.tensors[plain_name(name)] for name in state if plain_name(name) in content.tensors}
    own = {name: value for name, value in state.items() if not isinstance(value, Tensor)}  # which no file holds
    model.load_state_dict({**given, **own}, strict=len(given) + len(own) == len(state))
    for target in tensors(model):
        if (name := plain_name(target.name)) in content.tensors:
            note_read(target.holders, content.tapes.get(name))
    if map_location is not None:
        model.to(device)
    filled = {state[name].data_ptr() for name in given if state[name].numel()}  # a tied one under another name, too
    left = [(name, value) for name, value in state.items() if name not in given and name not in own]
    return [name for name, value in left if _address(value) not in filled]


def _address(value: object) -> int | None:
    return value.data_ptr() if isinstance(value, Tensor) else None


def _entries(state: Mapping[str, Tensor], snapshots: Mapping[str, Snapshot], precisions: Precisions) -> list[Entry]:
    entries: list[Entry] = []
    seen: dict[object, int] = {}
    for index, (name, tensor) in enumerate(state.items()):
        shape = tuple(tensor.shape)
        # The same memory compressed and not is two tensors; an empty one has no address of its own.
        form = snapshots[name][0] if name in snapshots else None
        key = (
            (form, tensor.data_ptr(), tensor.dtype, shape, tensor.stride(), tensor.is_conj())
            if tensor.numel()
            else name
        )
        first = seen.setdefault(key, index)
        if first != index:
            entries.append(Entry(name, Kind.ALIAS, tensor.dtype, shape, first))
        elif form is not None:
            entries.append(Entry(name, Kind.SLOTS, tensor.dtype, shape))
        else:
            entries.append(Entry(name, leftovers.kind_of(name, tensor.dtype, precisions), tensor.dtype, shape))
    return entries
