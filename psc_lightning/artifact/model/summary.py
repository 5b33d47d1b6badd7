"""What a report says of tensors that have been stored."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from psc_lightning.artifact.directory import Entry, Kind
from psc_lightning.artifact.model.snapshots import AXES, ENTRIES
from psc_lightning.artifact.streams import Stream
from psc_lightning.checkpoint import plain_name
from psc_lightning.report.numbers import Report, TensorReport
from psc_lightning.slots.live import compressed
from psc_lightning.symbols import PIECE

__all__ = ["Summary", "batchnorm_batches", "layer_types", "report_of", "summarise", "tell_dense"]


def layer_types(model: nn.Module) -> dict[str, str]:
    """The class of the layer that owns each tensor, by plain name."""
    return {
        plain_name(f"{path}.{name}" if path else name): type(module).__name__
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


def batchnorm_batches(model: nn.Module) -> int | None:
    """From how many batches the statistics of a live model's BatchNorms were taken for the weights that it has now."""
    norms = [one for one in model.modules() if isinstance(one, _NormBase) and one.running_mean is not None]
    live = [tensor.refreshed for _, tensor, _ in compressed(model)]
    return min(live) if norms and live else None


@dataclass(frozen=True)
class Summary:
    """What the report says of a tensor; only compressed ones have levels."""

    method: str
    core_shapes: tuple[tuple[int, ...], ...]
    sparsity: float
    levels: int | None


def summarise(cores: Sequence[Tensor], method: str | None = None) -> Summary:
    """Of a tensor's cores; without a method it is plain."""
    entries = sum(core.numel() for core in cores)
    zeros = sum(int(np.count_nonzero((core == 0).cpu().numpy())) for core in cores)
    shapes = tuple(tuple(core.shape) for core in cores)
    levels = None if method is None else max(map(_levels, cores))
    return Summary(method or "plain", shapes, zeros / entries if entries else 0.0, levels)


def report_of(
    entries: Sequence[Entry],
    bits: Sequence[float],
    streams: Sequence[Stream],
    size: int,
    digest: str | None,
    held: Mapping[int, Summary],
    types: Mapping[str, str],
) -> Report:
    """The report of a file of `size` bytes and this SHA-256."""
    rows: list[TensorReport] = []
    spent, counted = 0.0, 0
    for index, (entry, cost) in enumerate(zip(entries, bits, strict=True)):
        spent += cost
        # Rounded where the tensors end, not each for itself: the parts add up to the whole.
        stored = round(spent / 8) - counted
        counted += stored
        one = held[index]
        rows.append(
            TensorReport(
                name=entry.name,
                layer_type=types.get(entry.name, ""),
                shape=entry.shape,
                core_shape=one.core_shapes[0] if len(one.core_shapes) == 1 else one.core_shapes,
                method="shared" if entry.kind is Kind.ALIAS else one.method,
                dense_bytes=0 if entry.alias is not None else entry.nbytes,
                stored_bytes=stored,
                sparsity=one.sparsity,
                levels=one.levels,
            )
        )
    dense = sum(row.dense_bytes for row in rows)
    return Report(
        dense_bytes=dense,
        file_bytes=size,
        compression_ratio=dense / size,
        entropy_bytes=math.ceil(sum(stream.entropy for stream in streams) / 8),
        overhead_bytes=size - counted,
        sha256=digest,
        tensors=rows,
    )


def tell_dense(model: nn.Module, report: Report) -> None:
    """Warn of a file in which all is plain, also what slots take by default, and no smaller for it."""
    few = [len(row.shape) < AXES or math.prod(row.shape) < ENTRIES for row in report.tensors]
    plain = all(row.method in ("plain", "shared") for row in report.tensors)
    if (
        plain
        and not all(few)
        and 2 * report.file_bytes > report.dense_bytes
        and not any(True for _ in compressed(model))
    ):
        warnings.warn(
            f"save: nothing in this file of {report.file_bytes:,} bytes is compressed: compress the model first, by callbacks"
            " in a fit or psc_lightning.compress; what was compressed once comes back by psc_lightning.load_checkpoint",
            stacklevel=3,
        )
