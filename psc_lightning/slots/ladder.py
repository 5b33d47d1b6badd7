"""The cores of a compressed tensor on the ladder of their levels, and a price's way from there to what is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from psc_lightning.slots.slots import Slots

__all__ = ["Rungs", "descend", "rungs_of", "set_threshold"]


class Rungs(NamedTuple):
    """Where a core's entries stand: 0 at zero, ±1, ±2, … at the next levels.

    Attributes:
        core: its name.
        position: of each entry.
        slope: of the position in the entry; None where no step of an optimizer can change it.
        keep: what the mask keeps; None: all.
        top: the highest rung.
        value: bits of what stands at a rung, where they are known; None: as many as the sizes' counts say, and a sign.
    """

    core: str
    position: Tensor
    slope: Tensor | None
    keep: Tensor | None
    top: int
    value: float | None = None


@torch.no_grad()
def rungs_of(slots: Slots, latent: Tensor) -> Iterator[Rungs]:
    """Each core on the ladder of its levels, once they have begun; where these have no zero, what the mask keeps."""
    for name, core in slots.reduce(latent).items() if slots.begun else ():
        chain, at = slots.chain(name), slots.strengths
        levels, keep = chain.levels if at.levels else None, chain.keep(at)
        if levels is not None and levels.rungs:
            yield Rungs(name, *levels.ladder(core.detach()), keep, levels.rungs)
        elif chain.mask is not None and at.mask:
            bits = 8.0 * latent.element_size() if levels is None else levels.value_bits
            yield Rungs(name, torch.ones_like(core) if keep is None else keep.to(core.dtype), None, keep, 1, bits)


def descend(slots: Slots, latent: Tensor, prices: dict[str, Tensor]) -> Iterator[tuple[nn.Parameter | None, Tensor]]:
    """Gradients at cores → what is trained (None: the latent weight) and its gradient."""
    cores = slots.reduce(latent)
    found = {}
    for name, price in prices.items():
        levels = slots.chain(name).levels
        found[name] = price if levels is None else levels.unscaled(cores[name].detach(), price)
    if slots.tying is None or not slots.phase[0]:
        yield None, slots.layout.weight(found["core"], slots.stored_shape)
    elif any(isinstance(core, nn.Parameter) for core in cores.values()):
        yield from (
            (core, found[name]) for name, core in cores.items() if isinstance(core, nn.Parameter) and name in found
        )
    else:
        dense = latent.detach().requires_grad_()
        with torch.enable_grad():
            cores = slots.reduce(dense)
        (pulled,) = torch.autograd.grad([cores[name] for name in found], dense, list(found.values()))
        yield None, pulled


def set_threshold(slots: Slots, threshold: float) -> None:
    """Set the share of zeros of all cores' masks, from the next refresh on."""
    for mask in (chain.mask for chain in slots.chains()):
        if mask is not None:
            mask.threshold = threshold
    slots.stale = slots.begun
