"""The three slots of one tensor: tying, mask, levels, always applied in this order.

    latent ──tying.reduce──▶ core ──mask──▶ core with zeros ──levels──▶ core of few values ──tying.expand──▶ hard

`Slots` holds what a compressed tensor needs beside its latent weight: strengths, scores, scales, centroids, factors.
Training (`make`), writing (`encode`) and reading (`decode`) use the same buffers and the same few exact operations, which
is why a file holds the model bit for bit. The latent weight is an argument of each call; none is stored here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn

from psc_lightning.levels import LEVELS
from psc_lightning.masks import MASKS
from psc_lightning.numerics.asking import Question, answer
from psc_lightning.numerics.functional import float32_by_default, give_gradient
from psc_lightning.numerics.strips import blank_
from psc_lightning.slots.chain import Chain, Strengths
from psc_lightning.slots.layout import Layout, memory_format
from psc_lightning.slots.spec import Spec
from psc_lightning.slots.stored import Stored
from psc_lightning.symbols import Writer
from psc_lightning.tying import TYINGS, Tying

__all__ = ["SLOTS", "Slots", "Spec"]

Shape = tuple[int, ...]

SLOTS = ("tying", "mask", "levels")

OFF, SOFT, HARD = 0, 1, 2

_DETACH = "psc_lightning.detach(model) before this fit keeps the compressed weights and empties all slots"


def _phase(strength: float) -> int:
    return OFF if strength <= 0 else HARD if strength >= 1 else SOFT


def _finite(gradient: Tensor | None) -> Tensor | None:
    return gradient if gradient is not None and bool(gradient.isfinite().all()) else None


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
        # Python's view of `strength`, so that nothing waits for a device.
        self.phase = [OFF, OFF, OFF]
        self._ramp = [0.0, 0.0, 0.0]
        self.stale = False  # the buffers are out of date: the latent weight has changed since
        self.due = [True, True, True]  # which slots the next refresh recomputes
        self.pending = False  # levels have begun, but not yet been fitted to a core
        self.tying: Tying | None = None
        self.cores = nn.ModuleDict()

    # ---------------------------------------------------------------------------------------------- filling

    def check_vacant(self, slot: str, spec: Spec) -> None:
        """Raise a ValueError, naming both owners, where `fill` would find the slot taken, or a tying come too late."""
        taken = self.specs.get(slot)
        if taken is not None:
            cure = _DETACH if self.begun else f"keep one, or, where one is of another fit, {_DETACH}"
            raise ValueError(f"its {slot} slot is filled by {taken.owner} and again by {spec.owner}: {cure}")
        if slot == "tying" and self.begun:
            raise ValueError(f"{spec.owner} comes after another slot has begun; tie first, or detach: {_DETACH}")

    @float32_by_default()
    def fill(self, slot: str, spec: Spec) -> None:
        """Put a method into an empty slot; ValueError as `check_vacant`."""
        self.check_vacant(slot, spec)
        specs = {**self.specs, slot: spec}
        shape, device = self.layout.shape(self.stored_shape), self.strength.device
        if slot == "tying":
            self.tying = TYINGS[spec.method].build(shape, **spec.options).to(device)
        folders: dict[str, Mapping[str, Callable[..., Any]]] = {"mask": MASKS, "levels": LEVELS}
        cores = {}
        for index, (name, size) in enumerate(self.core_shapes().items()):
            # The first core has the rows of the weight: the others of low_rank and separable have none.
            padding = self.layout.padding if index == 0 and size[0] == shape[0] else None
            old = self.cores[name] if name in self.cores and slot != "tying" else Chain(None, None)
            parts = {
                part: folders[part][specs[part].method](size, **specs[part].options) if part in specs else None
                for part in folders
                if part == slot or getattr(old, part) is None
            }
            cores[name] = Chain(parts.get("mask", old.mask), parts.get("levels", old.levels), padding).to(device)
        self.cores, self.specs = nn.ModuleDict(cores), specs

    @property
    def begun(self) -> bool:
        """Whether any slot is in force."""
        return any(self.phase)

    @property
    def soft(self) -> bool:
        """Whether any slot is in its ramp."""
        return SOFT in self.phase

    @property
    def strengths(self) -> Strengths:
        """Of mask and levels, as numbers."""
        at = [0.0 if phase == OFF else 1.0 if phase == HARD else self._ramp[i] for i, phase in enumerate(self.phase)]
        return Strengths(at[1], at[2])

    @property
    def method(self) -> str:
        """The filled slots' methods, joined: ``cross_channel+magnitude+uniform``."""
        return "+".join(self.specs[slot].method for slot in SLOTS if slot in self.specs) or "plain"

    def core_shapes(self) -> dict[str, Shape]:
        """Name and shape of each core."""
        return self.tying.core_shapes() if self.tying is not None else {"core": self.layout.shape(self.stored_shape)}

    def sidecars(self, slot: str) -> Iterable[nn.Parameter]:
        """What a slot trains beside the latent weight."""
        if slot == "tying":
            return self.tying.parameters() if self.tying is not None else ()
        parts = [getattr(chain, slot) for chain in self.cores.values()]
        return (parameter for part in parts if part is not None for parameter in part.parameters())

    # --------------------------------------------------------------------------------------------- strength

    def set_strength(self, slot: str, value: float, latent: Tensor) -> None:
        """Set how hard a filled slot acts, 0 … 1; the first value above 0 begins it (a tying overwrites the weight)."""
        if slot not in self.specs:
            return
        index = SLOTS.index(slot)
        if slot != "tying" and self.tying is not None and self.phase[0] == OFF:
            value = 0.0  # its cores are not there: not yet, or, in a second fit, not any more
        value = 1.0 if slot == "tying" and value > 0 else value  # a tying has no soft phase
        if self.phase[index] == OFF and value > 0:
            self._begin(slot, latent)
        if 0 < value < 1 or _phase(value) != self.phase[index]:
            ramping = slot == "levels" and self.phase[index] and _phase(value)
            self.strength[index].fill_(value)  # an assignment waits for the device
            self.phase[index], self._ramp[index] = _phase(value), value
            if not ramping:  # levels that only blend otherwise are the same levels
                self.due = [True, True, True]
            elif not self.stale:
                self.due = [False, False, False]
            self.stale = True

    def _read_strength(self) -> None:
        self._ramp = self.strength.tolist()
        self.phase = [_phase(value) for value in self._ramp]

    def acts(self, slot: str, value: float) -> bool:
        """Whether a slot has this strength, which is no ramp's, already."""
        return self.phase[SLOTS.index(slot)] == _phase(value) != SOFT

    @torch.no_grad()
    def _begin(self, slot: str, latent: Tensor) -> None:
        if slot == "tying":
            assert self.tying is not None
            padding = self.layout.padding
            blank = padding is not None and not bool(latent[padding].any())
            latent.copy_(self.layout.weight(self.tying.begin(self._matrix(latent)), self.stored_shape))
            if blank:  # what a decomposition has made nearly zero is zero
                latent[padding] = 0.0
                for factor in islice(self.tying.parameters(), 1):
                    factor[padding] = 0.0
        self.pending = self.pending or slot == "levels"

    def begin_again(self, latent: Tensor) -> None:
        """What has begun begins anew, from another latent weight than the one that it began with."""
        if self.phase[0]:
            self._begin("tying", latent)
        for mask in (self.chain(name).mask for name in self.cores):
            if mask is not None and self.phase[1]:
                mask.restart()
        self.pending = bool(self.phase[2])
        self.stale, self.due = self.begun, [True, True, True]

    def harden(self, latent: Tensor) -> None:
        """Bring every filled slot to strength 1 and its buffers up to date."""
        for slot in SLOTS:
            self.set_strength(slot, 1.0, latent)
        if self.stale:
            self.refresh(latent)

    # ----------------------------------------------------------------------------------------------- making

    def _matrix(self, weight: Tensor) -> Tensor:
        return self.layout.matrix(weight if weight.dtype == torch.float64 else weight.float())

    def reduce(self, latent: Tensor) -> dict[str, Tensor]:
        """The cores of a latent weight, by name; once a tying has begun, its own."""
        matrix = self._matrix(latent)
        return self.tying.reduce(matrix) if self.tying is not None and self.phase[0] else {"core": matrix}

    def refresh(self, latent: Tensor) -> None:
        """Recompute what needs sorting, clustering or sums, from the latent weight as it is now."""
        answer(self.refreshing(latent))

    def refreshing(self, latent: Tensor) -> Question[None]:
        """`refresh`, which may have to ask."""
        if self.tying is None or self.phase[0]:
            for name, core in self.reduce(latent).items():
                yield from self.chain(name).refreshing(core, self.strengths, self.pending, (self.due[1], self.due[2]))
        self.stale, self.due = False, [True, True, True]
        self.pending = self.pending and not self.phase[2]

    @torch.no_grad()
    def make(self, latent: Tensor, out: Tensor | None = None) -> Tensor:
        """What the layer computes with: the latent weight through the slots that have begun, as the buffers are.

        Args:
            latent: whole, of the Parameter's shape.
            out: a tensor to write it into.
        """
        at = self.strengths
        if not self.begun:
            return latent if out is None else out.copy_(latent)
        if out is not None and not self.phase[0] and not self.layout.transposed and latent.dtype == torch.float32:
            self.chain("core").value(self._matrix(latent), latent.dtype, at, self.layout.matrix(out))
            return out  # its core is the weight itself: no copy in between
        cores = {name: self.chain(name).value(core, latent.dtype, at) for name, core in self.reduce(latent).items()}
        made = self._expand(cores, latent)
        return made if out is None else out.copy_(made)

    def _expand(self, cores: dict[str, Tensor], latent: Tensor) -> Tensor:
        tied = self.tying is not None and self.phase[0]
        matrix = self.tying.expand(cores) if self.tying is not None and tied else cores["core"]
        expanded = self.layout.weight(matrix, self.stored_shape).to(latent.dtype)
        # Equal numbers in another memory layout give other logits after loading, and slower convolutions.
        return expanded.contiguous(memory_format=memory_format(latent))

    def chain(self, name: str) -> Chain:
        """Mask and levels of the core of this name."""
        return cast(Chain, self.cores[name])

    def chains(self) -> list[Chain]:
        """Mask and levels of each core."""
        return [self.chain(name) for name in self.cores]

    # -------------------------------------------------------------------------------------------- gradients

    @property
    def straight(self) -> bool:
        """Whether the gradient at the hard weight is that at the latent one, and nothing is trained beside it."""
        return not self.phase[0] and all(self.chain(name).straight(self.strengths) for name in self.cores)

    def pull(self, latent: Tensor, gradient: Tensor) -> Tensor | None:
        """Turn the gradient at the weight that `make` gave into that at the latent one, straight through what rounds.

        The sidecars of the slots that have begun get theirs, in `grad`.

        Args:
            latent: whole.
            gradient: of its shape; it may be overwritten.

        Returns:
            The latent weight's; None where the loss does not depend on it (its factors are trained).
        """
        at, tying = self.strengths, self.tying if self.phase[0] else None
        if self.straight:
            return gradient
        if tying is None:
            pulled = self.chain("core").pull(self._matrix(latent), self._matrix(gradient), at)
            return self.layout.weight(pulled, self.stored_shape)
        trained = any(True for _ in tying.parameters())
        if not trained and all(self.chain(name).straight(at) for name in self.cores):
            return self._expand(tying.reduce(self._matrix(gradient)), gradient)  # each member gets the members' mean
        return self._pull_tied(latent, gradient, trained)

    def _pull_tied(self, latent: Tensor, gradient: Tensor, trained: bool) -> Tensor | None:
        """Back through `expand`, mask and levels, and through `reduce`, unless the cores are trained themselves."""
        at, dense = self.strengths, latent.detach().requires_grad_()
        with torch.enable_grad():
            cores = self.reduce(dense)
            # A factor stands in the other one's gradient as it is stored; else the values do not matter.
            values = {
                name: (self.chain(name).value(core, latent.dtype, at) if trained else core).detach().requires_grad_()
                for name, core in cores.items()
            }
            made = self._expand(values, latent)
        found = torch.autograd.grad(made, list(values.values()), gradient.to(made.dtype))
        pulled = [self.chain(name).pull(core.detach(), part, at) for (name, core), part in zip(cores.items(), found)]
        if trained:
            for core, part in zip(cores.values(), pulled, strict=True):
                give_gradient(cast(nn.Parameter, core), part)
            return None
        (first,) = torch.autograd.grad(list(cores.values()), dense, pulled)
        return first

    def active_sidecars(self) -> Iterator[nn.Parameter]:
        """The sidecars of the slots that have begun."""
        for slot, phase in zip(SLOTS, self.phase):
            if phase:
                yield from self.sidecars(slot)

    @torch.no_grad()
    def observe(self, slot: str, latent: Tensor, gradient: Tensor | None) -> None:
        """Give a labelled method the latent weight's gradient; a non-finite one is skipped: a NaN would poison the sum."""
        found = _finite(gradient)
        matrix = None if found is None else self._matrix(found)
        if slot == "tying" and self.tying is not None and matrix is not None:
            self.tying.observe(self._matrix(latent), matrix)
        elif slot == "mask" and (self.tying is None or self.phase[0]):
            reduced = {} if matrix is None else {"core": matrix}
            if self.tying is not None and matrix is not None:
                reduced = self.tying.reduce(matrix)
            for name, core in self.reduce(latent).items():
                mask = self.chain(name).mask
                own = _finite(core.grad) if isinstance(core, nn.Parameter) else reduced.get(name)
                if mask is not None and own is not None:
                    mask.observe(core, own)

    # ---------------------------------------------------------------------------------------------- storing

    @torch.no_grad()
    def stored(self, latent: Tensor) -> Stored:
        """What `encode` would store, as it is now."""
        at = self.strengths
        cores = {name: self.chain(name).value(core, latent.dtype, at) for name, core in self.reduce(latent).items()}
        tying = self.tying if self.phase[0] else None
        return Stored(self.method, dict(cores), self._expand(cores, latent), self.layout, tying)

    @torch.no_grad()
    def encode(self, writer: Writer, latent: Tensor) -> None:
        """Store the hard weight, which is finite, as it is now: layout, tying, then each core's mask and levels."""
        tying, at = self.tying if self.phase[0] else None, self.strengths
        self.layout.encode(writer)
        writer.integer(tying.code_number if tying is not None else 0)
        if tying is not None:
            tying.encode(writer)
        for name, core in self.reduce(latent).items():
            self.chain(name).encode(writer, core, latent.dtype, at)

    @torch.no_grad()
    def rescale(self, latent: Tensor, factor: Tensor) -> None:
        """Multiply the hard weight, a positive factor an output channel; scales are rounded as always.

        Raises:
            ValueError: no core has a row, or no level a scale, for each output channel.
        """
        cores = self.reduce(latent)
        name, core = next(iter(cores.items()))  # of two factors, the one that has the outputs
        if core.shape[0] != len(factor):
            raise ValueError(f"{self.method} has no row of its own for each output channel")
        chain, rows = self.chain(name), factor.to(core.dtype).reshape(-1, *(1,) * (core.dim() - 1))
        levels = chain.levels if self.phase[2] else None
        value = core * rows if levels is None else levels.rescale(levels.code(core), factor.float()).to(core.dtype)
        value = blank_(value, chain.keep(self.strengths))
        if isinstance(core, nn.Parameter):
            core.copy_(value)
        else:
            matrix = self.tying.expand({name: value}) if self.tying is not None and self.phase[0] else value
            latent.copy_(self.layout.weight(matrix, self.stored_shape))

    # -------------------------------------------------------------------------------- checkpoints and moves

    def _blank(self, latent: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state that these sidecars, and a refresh from this latent weight, lead to; nothing older."""
        blank = self.reshaped(self.stored_shape).to(latent.device)
        trained = {name: state[name] for name, _ in blank.named_parameters()}
        blank.load_state_dict(trained, strict=False)
        blank.strength.copy_(state["strength"])
        blank._read_strength()
        blank.refresh(latent)
        return blank.state_dict()

    def training_state(self, latent: Tensor) -> dict[str, Tensor]:
        """What a checkpoint needs beside the latent weight: sidecars, labels, strengths; not what follows from these."""
        state = self.state_dict()
        derived = self._blank(latent, state)
        trained = {name for name, _ in self.named_parameters()}
        return {
            key: value.detach().clone()
            for key, value in state.items()
            if key in trained or key == "strength" or not torch.equal(value, derived[key])
        }

    def load_training_state(self, latent: Tensor, state: Mapping[str, Tensor]) -> None:
        """Put back what `training_state` gave, for the same latent weight."""
        moved = {key: value.to(latent.device) for key, value in state.items()}
        self.load_state_dict({**self._blank(latent, moved), **moved})
        self._read_strength()
        self.stale = self.pending = False

    def reshaped(self, shape: Shape) -> Slots:
        """Slots of the same methods and strengths for a weight of another shape; what they had learned is gone."""
        other = Slots(self.layout, shape).to(self.strength.device)
        for slot in SLOTS:
            if slot in self.specs:
                other.fill(slot, self.specs[slot])
        for mine, its in zip(self.chains(), other.chains()):
            if mine.mask is not None and its.mask is not None:
                its.mask.threshold = mine.mask.threshold  # which may have been steered
        other.strength.copy_(self.strength)
        other._read_strength()
        return other

    def return_to(self, before: Slots, latent: Tensor) -> None:
        """Be what a `twin` was, beside the latent weight of then; strengths that were set since hold."""
        set_since = [
            (slot, value, phase)
            for slot, value, phase, old in zip(SLOTS, self._ramp, self.phase, zip(before._ramp, before.phase))
            if (value, phase) != old
        ]
        self.load_state_dict(before.state_dict())
        self.phase, self._ramp, self.due = list(before.phase), list(before._ramp), list(before.due)
        self.stale, self.pending = before.stale, before.pending
        for slot, value, phase in set_since:
            self.set_strength(slot, value if phase == SOFT else float(phase == HARD), latent)

    def twin(self) -> Slots:
        """A copy, to look ahead with."""
        return deepcopy(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slots:
        """Sidecars follow the model to a device, but stay float32 when it goes to half precision."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self
