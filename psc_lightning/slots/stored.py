"""One compressed tensor as a file holds it, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from psc_lightning.levels import LEVELS
from psc_lightning.masks import read_keep
from psc_lightning.numerics.bits import read_kept
from psc_lightning.slots.layout import Layout
from psc_lightning.symbols import Reader
from psc_lightning.tying import TYINGS, Tying

__all__ = ["Stored", "decode"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it.

    Attributes:
        method: the slots' methods, joined; a file does not say how its mask was found.
        cores: name → values after mask and levels.
        weight: the effective weight.
        layout: where its output axis is.
        tying: what makes the weight, output axis first, from the cores; None: the one core is it.
    """

    method: str
    cores: Mapping[str, Tensor]
    weight: Tensor
    layout: Layout
    tying: Tying | None


def decode(reader: Reader, shape: Shape, dtype: torch.dtype) -> Stored:
    """Read what `Slots.encode` stored; the effective weight is contiguous, and bit for bit what it was.

    Raises:
        ValueError: where the file names a method or a size that cannot be.
    """
    layout = Layout.decode(reader, shape)
    matrix_shape = layout.shape(shape)
    name, method = _known(TYINGS, reader, "tying")
    tying = method.decode(reader, matrix_shape) if method else None
    methods = [name]
    # As in `effective`: factors are float32 whatever the weight is, other cores are no narrower than float32.
    trained = tying is not None and any(True for _ in tying.parameters())
    work = torch.float64 if dtype == torch.float64 and not trained else torch.float32
    cores = {}
    for name, size in (tying.core_shapes() if tying is not None else {"core": matrix_shape}).items():
        masks = reader.integer(0, 1)
        keep = read_keep(reader, size) if masks else torch.ones(size, dtype=torch.bool)
        level, method = _known(LEVELS, reader, "levels")
        methods += ["mask" if masks else "", level]
        core = method.decode(reader, keep, work) if method else read_kept(reader, keep, dtype, work)
        cores[name] = core.masked_fill_(~keep, 0.0) if masks else core
    matrix = tying.expand(cores) if tying is not None else cores["core"]
    weight = layout.weight(matrix.detach(), shape).to(dtype).contiguous()
    name = "+".join(filter(None, dict.fromkeys(methods))) or "plain"
    return Stored(name, cores, weight, layout, tying)


def _known(methods: Mapping[str, Any], reader: Reader, slot: str) -> tuple[str, Any]:
    """The name and the method whose number is read; neither for 0."""
    numbered = {method.code_number: (name, method) for name, method in methods.items()}
    number = reader.integer(0, max(numbered))
    if number and number not in numbered:
        raise ValueError(f"unknown {slot} method {number}; this version knows {sorted(numbered)}")
    return numbered.get(number, ("", None))
