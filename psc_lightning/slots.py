"""The three slots of one tensor: tying, mask, levels, always applied in this order.

    weight ──tying.reduce──▶ core ──mask──▶ core with zeros ──levels──▶ core of few values ──tying.expand──▶ effective

`Slots` holds what a compressed tensor needs beside its Parameter: strengths, scores, scales, centroids, factors. Training
(`effective`), writing (`encode`) and reading (`decode`) use the same buffers and the same few exact operations, which is
why a file holds the model bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from psc_lightning.activations import Activations
from psc_lightning.bits import write_bits
from psc_lightning.layout import Layout, memory_format
from psc_lightning.levels import LEVELS, Levels
from psc_lightning.masks import MASKS, Mask
from psc_lightning.sharding import whole
from psc_lightning.stored import Stored
from psc_lightning.symbols import Writer
from psc_lightning.tying import TYINGS, Tying

__all__ = ["SLOTS", "Slots", "Spec"]

Shape = tuple[int, ...]

SLOTS = ("tying", "mask", "levels")

OFF, SOFT, HARD = 0, 1, 2


@dataclass(frozen=True)
class Spec:
    """What fills a slot: a method's name, its options, and the callback that asked for it (for error messages).

    With levels may come `activations`: bits of the inputs of the layers that hold the tensor.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    owner: str = ""
    activations: int | None = None

    @property
    def told(self) -> dict[str, Any]:
        """All that was asked for."""
        return {**self.options, **({"activations": self.activations} if self.activations else {})}


class _Linked(torch.autograd.Function):
    """The value itself, with a zero gradient to tensors that this step does not use: DDP waits for every gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *others: Tensor) -> Tensor:
        ctx.save_for_backward(*others)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:
        return (grads[0], *(torch.zeros_like(other) for other in ctx.saved_tensors))


@contextmanager
def _float32() -> Iterator[None]:
    """Sidecars are float32 whatever the default is: Lightning changes it while a bf16-true model is built."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _finite(gradient: Tensor | None) -> Tensor | None:
    return gradient if gradient is not None and bool(gradient.isfinite().all()) else None


class Chain(nn.Module):
    """Mask and levels of one core."""

    mask: Mask | None
    levels: Levels | None

    def __init__(self, mask: Mask | None, levels: Levels | None) -> None:
        super().__init__()
        self.mask, self.levels = mask, levels

    def keep(self, core: Tensor, masking: bool) -> Tensor:
        """Which entries survive."""
        return self.mask.keep if masking and self.mask is not None else torch.ones_like(core, dtype=torch.bool)


class Slots(nn.Module):
    """The slots of one tensor, and their strengths.

    A slot is *off* (strength 0: as if it were not there), *soft* (levels blend ``hard + (1 - strength)·(x - hard)``, a
    mask scales its share) or *hard* (strength 1: exactly what a file holds). Mask and levels wait for a tying to begin,
    since they act on its cores.

    Args:
        layout: where the tensor's output axis is.
        shape: the Parameter's shape.
    """

    strength: Tensor

    def __init__(self, layout: Layout, shape: Shape) -> None:
        super().__init__()
        self.layout, self.stored_shape = layout, tuple(shape)
        self.specs: dict[str, Spec] = {}
        self.register_buffer("strength", torch.zeros(len(SLOTS), dtype=torch.float32))
        # Python's view of `strength`, so that forward never waits for a device.
        self.phase = [OFF, OFF, OFF]
        self.stale = False
        self.sharded = False
        self.unborn = False  # levels that have begun but have not yet seen a core
        self.untied = False  # a tying that has begun with another weight than the one that was loaded since
        self.tying: Tying | None = None
        self.cores = nn.ModuleDict()
        self.inputs: Activations | None = None

    # ---------------------------------------------------------------------------------------------- filling

    @_float32()
    def fill(self, slot: str, spec: Spec) -> None:
        """Put a method into an empty slot. Raises ValueError, naming both owners, where the slot is taken."""
        taken = self.specs.get(slot)
        if taken is not None:
            raise ValueError(f"its {slot} slot is filled by {taken.owner} and again by {spec.owner}; keep one")
        if slot == "tying" and self.begun:
            raise ValueError(f"{spec.owner} comes after another slot has begun; tie first, or detach(model) before")
        specs = {**self.specs, slot: spec}
        shape = self.layout.shape(self.stored_shape)
        device = self.strength.device
        if slot == "tying":
            self.tying = TYINGS[spec.method].build(shape, **spec.options).to(device)
        folders: dict[str, Mapping[str, Callable[..., Any]]] = {"mask": MASKS, "levels": LEVELS}
        cores = {}
        for name, size in self.core_shapes().items():
            old = self.cores[name] if name in self.cores and slot != "tying" else Chain(None, None)
            parts = {
                part: folders[part][specs[part].method](size, **specs[part].options) if part in specs else None
                for part in folders
                if part == slot or getattr(old, part) is None
            }
            cores[name] = Chain(parts.get("mask", old.mask), parts.get("levels", old.levels)).to(device)
        self.cores = nn.ModuleDict(cores)
        self.specs = specs
        if spec.activations is not None:
            channels = shape[0] if len(shape) > 2 else None
            self.inputs = Activations(spec.activations, channels).to(device)

    @property
    def filled(self) -> bool:
        """Whether any slot has a method."""
        return bool(self.specs)

    @property
    def begun(self) -> bool:
        """Whether any slot is in force."""
        return any(self.phase)

    @property
    def method(self) -> str:
        """The filled slots' methods, joined: ``cross_channel+magnitude+uniform``."""
        return "+".join(self.specs[slot].method for slot in SLOTS if slot in self.specs) or "plain"

    def core_shapes(self) -> dict[str, Shape]:
        """Name and shape of each core."""
        return self.tying.core_shapes() if self.tying is not None else {"core": self.layout.shape(self.stored_shape)}

    def sidecars(self, slot: str) -> Iterable[nn.Parameter]:
        """What a slot trains beside the weight."""
        if slot == "tying":
            return self.tying.parameters() if self.tying is not None else ()
        parts = [getattr(chain, slot) for chain in self.cores.values()]
        return (parameter for part in parts if part is not None for parameter in part.parameters())

    # --------------------------------------------------------------------------------------------- strength

    def set_strength(self, slot: str, value: float, weight: Tensor) -> None:
        """Set how hard a filled slot acts, 0 … 1; the first value above 0 begins it (a tying overwrites the weight)."""
        if slot not in self.specs:
            return
        index = SLOTS.index(slot)
        if slot != "tying" and self.tying is not None and self.phase[0] == OFF:
            value = 0.0  # its cores are not there: not yet, or, in a second fit, not any more
        if slot == "tying" and value > 0:
            value = 1.0  # a tying has no soft phase
        if self.phase[index] == OFF and value > 0:
            self._begin(slot, weight)
        phase = OFF if value <= 0 else HARD if value >= 1 else SOFT
        if phase == SOFT or phase != self.phase[index]:
            self.strength[index] = value
            self.phase[index] = phase
            self.stale = True

    @torch.no_grad()
    def _begin(self, slot: str, weight: Tensor) -> None:
        if slot == "tying":
            assert self.tying is not None
            with whole(self, weight) as full:
                full.copy_(self.layout.weight(self.tying.begin(self._matrix(full)), self.stored_shape))
        self.unborn = self.unborn or slot == "levels"

    def harden(self, weight: Tensor) -> bool:
        """Bring every filled slot to strength 1 and its buffers up to date; whether anything changed."""
        changed = any(self.phase[i] != HARD for i, slot in enumerate(SLOTS) if slot in self.specs)
        for slot in SLOTS:
            self.set_strength(slot, 1.0, weight)
        if self.stale:
            self.refresh(weight)
        return changed

    # ---------------------------------------------------------------------------------------------- forward

    def _matrix(self, weight: Tensor) -> Tensor:
        return self.layout.matrix(weight if weight.dtype == torch.float64 else weight.float())

    def _reduce(self, weight: Tensor) -> dict[str, Tensor]:
        matrix = self._matrix(weight)
        return self.tying.reduce(matrix) if self.tying is not None and self.phase[0] else {"core": matrix}

    @torch.no_grad()
    def refresh(self, weight: Tensor) -> None:
        """Recompute what needs sorting, clustering or sums, from the weight as it is now."""
        self.stale = False
        if self.untied:
            self.untied = False
            self._begin("tying", weight)
        tying, masking, levelling = self.phase
        if self.tying is not None and not tying:
            return
        with whole(self, weight) as full:
            for name, core in self._reduce(full).items():
                chain = self._chain(name)
                if masking and chain.mask is not None:
                    chain.mask.refresh(core, float(self.strength[1]) if masking == SOFT else 1.0)
                if levelling and chain.levels is not None:
                    keep = chain.keep(core, bool(masking))
                    if self.unborn:
                        chain.levels.begin(core, keep)
                    chain.levels.refresh(core, keep)
        self.unborn = self.unborn and not levelling

    def observe(self, slot: str, weight: Tensor) -> None:
        """Let a labelled method of a slot take in the weight's gradient (its factors', where these are trained).

        One that is not finite says nothing, and would be all that the labels ever say.
        """
        with torch.no_grad(), whole(self, weight, gradients=True) as weight:
            found = _finite(weight.grad)
            gradient = None if found is None else self._matrix(found)
            if slot == "tying" and self.tying is not None and gradient is not None:
                self.tying.observe(self._matrix(weight), gradient)
            elif slot == "mask" and (self.tying is None or self.phase[0]):
                reduced = {} if gradient is None else {"core": gradient}
                if self.tying is not None and gradient is not None:
                    reduced = self.tying.reduce(gradient)
                for name, core in self._reduce(weight).items():
                    mask = self._chain(name).mask
                    own = _finite(core.grad) if isinstance(core, nn.Parameter) else reduced.get(name)
                    if mask is not None and own is not None:
                        mask.observe(core, own)

    def effective(self, weight: Tensor) -> Tensor:
        """What the layer computes with: the weight seen through the slots that have begun."""
        if self.stale:
            self.refresh(weight)
        out = weight if not any(self.phase) else self._through(weight)
        if torch.is_grad_enabled() and torch.distributed.is_available() and torch.distributed.is_initialized():
            others = [p for p in (weight, *self.parameters()) if p.requires_grad]
            linked: Tensor = _Linked.apply(out, *others)  # type: ignore[no-untyped-call]
            return linked
        return out

    forward = effective

    def rounded(self, x: Tensor) -> Tensor:
        """What a layer's input becomes: as the levels' owner says, from where they begin (and no softer then)."""
        if self.inputs is not None and self.inputs.observing:
            self.inputs.see(x)
        return self.inputs(x) if self.inputs is not None and self.phase[2] else x

    def _through(self, weight: Tensor) -> Tensor:
        return self._expand(self._cores(weight), weight)

    def _cores(self, weight: Tensor) -> dict[str, Tensor]:
        _, masking, levelling = self.phase
        cores = self._reduce(weight)
        for name, core in cores.items():
            chain = self._chain(name)
            value = core
            if levelling and chain.levels is not None:
                value = chain.levels(core).to(core.dtype)
                if levelling == SOFT:
                    value = value + (1 - self.strength[2]) * (core - value)
            elif weight.dtype != core.dtype:
                value = core.to(weight.dtype).to(core.dtype)  # unquantised cores are stored in the Parameter's dtype
            if masking and chain.mask is not None:
                value = chain.mask(value, core)
            cores[name] = value
        return cores

    def _expand(self, cores: dict[str, Tensor], weight: Tensor) -> Tensor:
        tied = self.tying is not None and self.phase[0]
        matrix = self.tying.expand(cores) if self.tying is not None and tied else cores["core"]
        expanded = self.layout.weight(matrix, self.stored_shape).to(weight.dtype)
        # Equal numbers in another memory layout give other logits after loading, and slower convolutions.
        return expanded.contiguous(memory_format=memory_format(weight))

    def _chain(self, name: str) -> Chain:
        chain = self.cores[name]
        assert isinstance(chain, Chain)
        return chain

    # ---------------------------------------------------------------------------------------------- storing

    @torch.no_grad()
    def stored(self, weight: Tensor) -> Stored:
        """What `encode` would store, as it is now."""
        if self.stale:
            self.refresh(weight)
        cores = self._cores(weight)
        tying = self.tying if self.phase[0] else None
        inputs = self.inputs.grid() if self.inputs is not None and self.phase[2] else None
        seen = self.inputs.output if self.inputs is not None else None
        outputs = None if seen is None else torch.stack((seen.low, seen.high))
        return Stored(self.method, dict(cores), self._expand(cores, weight), self.layout, tying, inputs, outputs)

    @torch.no_grad()
    def encode(self, writer: Writer, weight: Tensor) -> None:
        """Store the effective weight, which is finite, as it is now: layout, tying, then each core's mask and levels."""
        if self.stale:
            self.refresh(weight)
        tying, masking, levelling = self.phase
        self.layout.encode(writer)
        writer.integer(self.tying.code_number if self.tying is not None and tying else 0)
        if self.tying is not None and tying:
            self.tying.encode(writer)
        for name, core in self._reduce(weight).items():
            chain = self._chain(name)
            keep = chain.keep(core, bool(masking))
            masks = bool(masking) and chain.mask is not None and not bool(chain.mask.keep.all())
            writer.integer(int(masks))
            if masks and chain.mask is not None:
                chain.mask.encode(writer)
            if levelling and chain.levels is not None:
                writer.integer(chain.levels.code_number)
                chain.levels.encode(writer, core, keep)
            else:
                writer.integer(0)
                write_bits(writer, core.masked_select(keep).to(weight.dtype))

    @torch.no_grad()
    def rescale(self, weight: Tensor, factor: Tensor) -> None:
        """Multiply the effective weight, a positive factor an output channel; scales are rounded as always.

        Raises:
            ValueError: no core has a row, or no level a scale, for each output channel.
        """
        cores = self._reduce(weight)
        name, core = next(iter(cores.items()))  # of two factors, the one that has the outputs
        if core.shape[0] != len(factor):
            raise ValueError(f"{self.method} has no row of its own for each output channel")
        chain, rows = self._chain(name), factor.to(core.dtype).reshape(-1, *(1,) * (core.dim() - 1))
        levels = chain.levels if self.phase[2] else None
        value = core * rows if levels is None else levels.rescale(levels.code(core), factor.float()).to(core.dtype)
        value = torch.where(chain.keep(core, bool(self.phase[1])), value, 0.0)
        if isinstance(core, nn.Parameter):
            core.copy_(value)
        else:
            matrix = self.tying.expand({name: value}) if self.tying is not None and self.phase[0] else value
            weight.copy_(self.layout.weight(matrix, self.stored_shape))

    # -------------------------------------------------------------------------------- checkpoints and moves

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint of the plain class has no keys of ours: what has begun begins anew from the weight it brings."""
        # Sharded checkpoints have them; but Lightning loads a whole one key by key.
        plain = not self.sharded and not any(key.startswith(prefix) for key in state_dict)
        if plain:
            state_dict.update({prefix + key: value for key, value in self.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)
        strengths = self.strength.tolist()
        self.phase = [OFF if value <= 0 else HARD if value >= 1 else SOFT for value in strengths]
        self.stale = plain and self.begun
        self.untied, self.unborn = plain and bool(self.phase[0]), plain and bool(self.phase[2])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slots:
        """Sidecars follow the model to a device, but stay float32 when it goes to half precision."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """The methods and how hard they act."""
        return f"{self.method}, strength={[round(value, 3) for value in self.strength.tolist()]}"
