"""A model to a .psc file and back."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from psc_lightning import folding
from psc_lightning.artifact import container, directory, leftovers
from psc_lightning.artifact.ans import Coded
from psc_lightning.artifact.directory import DTYPES, Entry, Kind
from psc_lightning.artifact.errors import ADVICE, ArtifactError
from psc_lightning.artifact.leftovers import Precisions
from psc_lightning.artifact.report import Report, TensorReport
from psc_lightning.artifact.streams import Stream, SymbolReader, SymbolWriter
from psc_lightning.live import compressed, under_names
from psc_lightning.sharding import by_rank_zero, reshard, sharded_modules, whole
from psc_lightning.slots import Slots
from psc_lightning.stored import Stored, decode
from psc_lightning.symbols import PIECE

__all__ = ["inspect", "load", "load_into", "load_stored", "measure", "save", "to_bytes", "verify"]

MAX_BYTES = 2**31
_SHOWN = 6  # differences that a message names

_SYMBOLS, _PLAIN = 3, 5
_CONTENTS = (directory.PLAIN, directory.DEFLATED, directory.NAMELESS)
_KNOWN = frozenset({*_CONTENTS, _SYMBOLS, _PLAIN})
_SLACK = 1 << 20  # a file may be this much longer than the tensors in it: names, and weights that do not compress


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    leftovers: Precisions = "float32",
    names: bool = True,
    fold_batchnorm: bool | Mapping[str, str] = False,
) -> Report:
    """Write a model's weights as they are used: compressed tensors through their slots, all others losslessly.

    Of several processes rank zero writes. A sharded model (FSDP2) is gathered for it: then all ranks must call this.

    Args:
        model: any module; what was attached to it by psc_lightning's callbacks or `compress` is stored compactly.
        path: the file to write; one that exists is replaced only when the new one is complete.
        leftovers: how tensors outside the slots are stored: `float32`, as they are; `float16`, floating ones rounded
            (reading gives `x.to(float16).to(x.dtype)`); `log8`, 8 bits on a logarithmic grid, within 4.5 %. Or a mapping
            from globs over tensor names: ``{"*.running_*": "log8", "*": "float16"}``; the first that matches counts.
        names: False leaves names and shapes out: only `load_into`, with the same model, reads such a file.
        fold_batchnorm: store what `psc_lightning.fold_batchnorm` makes of the model; a mapping names the pairs.

    Returns:
        What was stored, and in how many bytes.

    Raises:
        ValueError: a non-finite weight, a value beyond float16, or a tensor that cannot be stored or folded; it is named.
        OSError: the folder is missing or not writable, or the disk is full; nothing is left behind.
    """
    data, report = to_bytes(model, leftovers, names, fold_batchnorm)
    by_rank_zero(lambda: container.write(path, data), together=bool(sharded_modules(model)))
    return report


def measure(
    model: nn.Module,
    leftovers: Precisions = "float32",
    names: bool = True,
    fold_batchnorm: bool | Mapping[str, str] = False,
) -> Report:
    """What `save` would write now, with each slot that has begun at full strength; nothing is written, nothing changes.

    At any time, in training too: in a step, in a ramp, on any rank (of a sharded model on all of them).

    Args:
        model, leftovers, names, fold_batchnorm: as for `save`.

    Raises:
        ValueError: as `save`.

    >>> from psc_lightning.oneshot import compress
    >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> measure(model).file_bytes > 9000
    True
    >>> compress(model, "binary").file_bytes == measure(model).file_bytes < 1900
    True
    """
    return to_bytes(model, leftovers, names, fold_batchnorm)[1]


def to_bytes(
    model: nn.Module,
    leftovers: Precisions = "float32",
    names: bool = True,
    fold_batchnorm: bool | Mapping[str, str] = False,
) -> tuple[bytes, Report]:
    """What `save` would write, and its report; the model is not changed.

    Raises:
        ValueError: as `save`.
    """
    if fold_batchnorm:
        model = folding.fold_batchnorm(model, None if fold_batchnorm is True else fold_batchnorm)
    with torch.no_grad():
        snapshots = _snapshots(model)
        with whole(model):
            return _to_bytes(model, snapshots, leftovers, names)


#: slots at full strength, and the latent weight they are of
_Snapshot = tuple[Slots, Tensor]


def _snapshots(model: nn.Module) -> dict[str, _Snapshot]:
    """What a file would hold of each compressed tensor, under every name that it has; one object, where it is one tensor."""
    reshard(model)
    once = {}
    for name, tensor, parameter in compressed(model):
        once[id(tensor)] = tensor.snapshot(parameter)
        if once[id(tensor)] is not None:
            _check(name, once[id(tensor)][1])  # levels would make a number of an infinity
    found = {_plain_name(name): once.get(id(tensor)) for name, tensor in under_names(model).items()}
    return {name: snapshot for name, snapshot in found.items() if snapshot is not None}


def _plain_name(name: str) -> str:
    """A name without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _plain_state(model: nn.Module) -> dict[str, Any]:
    return {_plain_name(name): value for name, value in model.state_dict().items()}


def _to_bytes(
    model: nn.Module, snapshots: Mapping[str, _Snapshot], precisions: Precisions, names: bool
) -> tuple[bytes, Report]:
    state = _plain_state(model)
    for name, value in state.items():
        _check(name, value)
    leftovers.check(precisions, [name for name in state if name not in snapshots])
    entries = _entries(state, snapshots, precisions)
    repeated = {entry.alias for entry in entries}
    writer = SymbolWriter()
    held: dict[int, _Summary] = {}
    plain: dict[int, _Summary] = {}  # of what others repeat
    bits = [0.0] * len(entries)
    for group in leftovers.groups(entries):
        before = writer.bits
        entry = entries[group[0]]
        if entry.kind is Kind.SLOTS:
            slots, latent = snapshots[entry.name]
            stored = slots.stored(latent)
            _check(entry.name, stored.weight)
            held[group[0]] = _summary(list(stored.cores.values()), stored.method)
            if group[0] in repeated:
                plain[group[0]] = _summary([stored.weight])
            del stored  # a large model's memory is better not held twice
            slots.encode(writer, latent)
        else:
            together = {entries[i].name: state[entries[i].name] for i in group}
            leftovers.encode(writer, together, leftovers.stored_as(entry))
            held |= {i: _summary([state[entries[i].name]]) for i in group}
        _share(bits, entries, group, writer.bits - before)
    tag, content = directory.encode(entries) if names else directory.encode_nameless(entries)
    coded = writer.finish()
    sections = {tag: content, _SYMBOLS: coded.stack, _PLAIN: coded.plain}
    data = container.pack({tag: section for tag, section in sections.items() if section or tag != _PLAIN})
    held |= {i: plain.get(entry.alias, held[entry.alias]) for i, entry in enumerate(entries) if entry.alias is not None}
    return data, _report(entries, bits, writer.streams, data, held, _layer_types(model))


def load(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> dict[str, Tensor]:
    """Read a file: the plain state dict of the model's own class, on the CPU.

    Args:
        path: the file.
        max_bytes: refuse, before taking memory, a file whose tensors need more than this.

    Raises:
        ArtifactError: not a whole and undamaged .psc file, or too large; the message says what to do.
        OSError: it cannot be opened.
    """
    return _read(path, max_bytes).tensors


def load_stored(
    path: str | os.PathLike[str], max_bytes: int = MAX_BYTES, model: nn.Module | None = None
) -> dict[str, Stored]:
    """The compressed tensors of a file by name, each as its cores and what makes the weight from them.

    Args:
        path: the file.
        max_bytes: as for `load`.
        model: what the file goes into, for one without names; its size is the limit then.

    Raises:
        ArtifactError: as `load`, or as `load_into`.
    """
    content = _read(path, max_bytes, keep=True) if model is None else _read_for(model, path, keep=True)
    return content.stored


def verify(path: str | os.PathLike[str]) -> None:
    """Check a file from end to end: checksum, structure, every symbol.

    Raises:
        ArtifactError: it is not whole and undamaged.
    """
    _read(path, MAX_BYTES)


def inspect(path: str | os.PathLike[str], max_bytes: int = MAX_BYTES) -> Report:
    """The report of a file, as far as the file alone tells: layer types are empty.

    Raises:
        ArtifactError: as `load`.
    """
    data = container.read(path, max_bytes + _SLACK)
    content = _decode(*_open(data), max_bytes, keep=True)
    held = {}
    for index, entry in enumerate(content.entries):
        one = content.stored.get(entry.name)
        values = [content.tensors[entry.name]] if one is None else list(one.cores.values())
        held[index] = _summary(values, None if one is None else one.method)
    return _report(content.entries, content.bits, content.streams, data, held, {})


@torch.no_grad()
def load_into(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Put a file's weights into a model of the same class, plain or live; all of them, or none on an error.

    Raises:
        ArtifactError: as `load`, or names or shapes differ; the message lists them.
        ValueError: the model is sharded.
    """
    if sharded_modules(model):
        raise ValueError("load_into: the model is sharded already: load into it before fully_shard")
    tensors = _read_for(model, path).tensors
    model.load_state_dict({name: tensors[_plain_name(name)] for name in model.state_dict()})


@dataclass(frozen=True)
class _Content:
    """A file, read."""

    entries: list[Entry]
    tensors: dict[str, Tensor]
    stored: dict[str, Stored]
    bits: list[float]
    streams: list[Stream]


def _open(data: bytes, model: Sequence[Entry] | None = None) -> tuple[list[Entry], Coded]:
    sections = container.unpack(data, _KNOWN)
    contents = [tag for tag in _CONTENTS if tag in sections]
    if len(contents) != 1 or _SYMBOLS not in sections:
        raise ArtifactError(
            f"expected a table of contents and the symbols, found sections {sorted(sections)}: {ADVICE}"
        )
    coded = Coded(sections[_SYMBOLS], sections.get(_PLAIN, b""))
    return directory.decode(contents[0], sections[contents[0]], model), coded


def _read(path: str | os.PathLike[str], max_bytes: int, keep: bool = False) -> _Content:
    return _decode(*_open(container.read(path, max_bytes + _SLACK)), max_bytes, keep)


def _read_for(model: nn.Module, path: str | os.PathLike[str], keep: bool = False) -> _Content:
    """Read a file that must go into a model, which says what one without names leaves out."""
    state = _plain_state(model)
    expected = {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}
    # The file's types may be wider than the model's, but no more than eight bytes an entry.
    limit = 8 * sum(map(_room, expected.values()))
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    like = [Entry(name, Kind.SLOTS, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
    entries, coded = _open(container.read(path, limit + _SLACK), like)
    _compare({entry.name: entry.shape for entry in entries}, expected)
    return _decode(entries, coded, limit, keep)


def _decode(entries: Sequence[Entry], coded: Coded, max_bytes: int, keep: bool = False) -> _Content:
    needed = sum(_room(entry.shape) * entry.dtype.itemsize for entry in entries if entry.alias is None)
    if needed > max_bytes:
        raise ArtifactError(
            f"expected tensors of at most max_bytes = {max_bytes} bytes, found {needed}: "
            "pass a larger max_bytes if you trust the file"
        )
    reader = SymbolReader(coded, limit=max_bytes)
    tensors: dict[int, Tensor] = {}
    stored: dict[str, Stored] = {}
    bits = [0.0] * len(entries)
    for group in leftovers.groups(entries):
        before = reader.bits
        entry = entries[group[0]]
        if entry.kind is Kind.SLOTS:
            try:
                one = decode(reader, entry.shape, entry.dtype)
            except (ArithmeticError, LookupError, RuntimeError, ValueError) as error:
                # Every number was in its range, but together they make no tensor; torch says so in many ways.
                raise ArtifactError(f"{entry.name}: {error}") from error
            tensors[group[0]] = one.weight
            if keep:
                stored[entry.name] = one
        else:
            parts = leftovers.decode(reader, [entries[i] for i in group])
            tensors.update(zip(group, parts, strict=True))
        _share(bits, entries, group, reader.bits - before)
    reader.finish()
    named = {entry.name: tensors[i if entry.alias is None else entry.alias] for i, entry in enumerate(entries)}
    return _Content(list(entries), named, stored, bits, reader.streams)


def _room(shape: Sequence[int]) -> int:
    """Number of entries, axes of length 0 taken as 1: a shape must be small even where it holds nothing."""
    return math.prod(max(length, 1) for length in shape)


def _check(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, found {type(tensor).__name__}: extra state cannot be stored")
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.dtype not in DTYPES:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"{name}: expected a dense tensor with values, of type {kinds}, found {tensor.dtype} ({tensor.layout}) on "
            f"{tensor.device}: convert it first"
        )
    # Either is NaN where any entry is.
    if tensor.is_floating_point() and tensor.numel() and not all(map(math.isfinite, map(float, tensor.aminmax()))):
        raise ValueError(f"{name}: expected finite numbers, found NaN or infinity: look for a diverged training run")


def _entries(state: Mapping[str, Tensor], snapshots: Mapping[str, _Snapshot], precisions: Precisions) -> list[Entry]:
    entries: list[Entry] = []
    seen: dict[object, int] = {}
    for index, (name, tensor) in enumerate(state.items()):
        shape = tuple(tensor.shape)
        # The same memory compressed and not is two tensors; an empty one has no address of its own.
        slots = snapshots[name][0] if name in snapshots else None
        key = (slots, tensor.data_ptr(), tensor.dtype, shape, tensor.stride()) if tensor.numel() else name
        first = seen.setdefault(key, index)
        if first != index:
            entries.append(Entry(name, Kind.ALIAS, tensor.dtype, shape, first))
        elif slots is not None:
            entries.append(Entry(name, Kind.SLOTS, tensor.dtype, shape))
        else:
            entries.append(Entry(name, leftovers.kind_of(name, tensor.dtype, precisions), tensor.dtype, shape))
    return entries


def _share(bits: list[float], entries: Sequence[Entry], group: Sequence[int], total: float) -> None:
    entries_in_all = sum(entries[i].numel for i in group)
    for i in group:
        bits[i] = total * entries[i].numel / entries_in_all if entries_in_all else total / len(group)


def _compare(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    differences = [f"{name} is missing in the file" for name in expected if name not in found]
    differences += [f"{name} is not in the model" for name in found if name not in expected]
    differences += [
        f"{name} has shape {list(found[name])} in the file, {list(shape)} in the model"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if differences:
        shown = "; ".join(differences[:_SHOWN]) + f"; and {len(differences) - _SHOWN} more" * (
            len(differences) > _SHOWN
        )
        raise ArtifactError(
            f"expected the tensors of the model, found {len(differences)} differences: {shown}: "
            "build the model that was saved"
        )


def _layer_types(model: nn.Module) -> dict[str, str]:
    return {
        _plain_name(f"{path}.{name}" if path else name): type(module).__name__
        for path, module in model.named_modules(remove_duplicate=False)
        for name in (*module._parameters, *module._buffers)
    }


def _levels(tensor: Tensor) -> int:
    if not tensor.numel():
        return 0
    rows = tensor.reshape(tensor.shape[0], -1) if tensor.dim() else tensor.reshape(1, 1)
    most = 0
    few = max(1, PIECE // rows.shape[1])
    for start in range(0, len(rows), few):
        ordered = np.sort(rows[start : start + few].detach().cpu().numpy(), axis=1)  # eight times as fast as torch's
        most = max(most, int(np.count_nonzero(ordered[:, 1:] != ordered[:, :-1], axis=1).max()))
    return 1 + most


@dataclass(frozen=True)
class _Summary:
    """What the report says of a tensor; only compressed ones have levels."""

    method: str
    core_shapes: tuple[tuple[int, ...], ...]
    sparsity: float
    levels: int | None


def _summary(cores: Sequence[Tensor], method: str | None = None) -> _Summary:
    entries = sum(core.numel() for core in cores)
    zeros = sum(int(np.count_nonzero((core == 0).cpu().numpy())) for core in cores)
    shapes = tuple(tuple(core.shape) for core in cores)
    levels = None if method is None else max(map(_levels, cores))
    return _Summary(method or "plain", shapes, zeros / entries if entries else 0.0, levels)


def _report(
    entries: Sequence[Entry],
    bits: Sequence[float],
    streams: Sequence[Stream],
    data: bytes,
    held: Mapping[int, _Summary],
    layer_types: Mapping[str, str],
) -> Report:
    rows: list[TensorReport] = []
    spent, counted = 0.0, 0
    for index, (entry, cost) in enumerate(zip(entries, bits, strict=True)):
        spent += cost
        # Rounded where the tensors end, not each for itself: the parts add up to the whole.
        size = round(spent / 8) - counted
        counted += size
        one = held[index]
        rows.append(
            TensorReport(
                name=entry.name,
                layer_type=layer_types.get(entry.name, ""),
                shape=entry.shape,
                core_shape=one.core_shapes[0] if len(one.core_shapes) == 1 else one.core_shapes,
                method="shared" if entry.kind is Kind.ALIAS else one.method,
                dense_bytes=0 if entry.alias is not None else entry.nbytes,
                stored_bytes=size,
                sparsity=one.sparsity,
                levels=one.levels,
            )
        )
    dense = sum(row.dense_bytes for row in rows)
    return Report(
        dense_bytes=dense,
        file_bytes=len(data),
        compression_ratio=dense / len(data),
        entropy_bytes=math.ceil(sum(stream.entropy for stream in streams) / 8),
        overhead_bytes=len(data) - counted,
        sha256=hashlib.sha256(data).hexdigest(),
        tensors=rows,
    )
