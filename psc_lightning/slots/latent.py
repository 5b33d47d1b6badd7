"""One compressed tensor of a live model: the Parameter holds the hard weight, the latent one lies beside it.

The *hard* weight is what the slots make of the *latent* one, the dense weight that an optimizer moves. The latent weight is
in the Parameter's place only while an optimizer steps: `pull` and `lend` before, `show` after.

Source: Courbariaux et al. 2015, "BinaryConnect" (binary weights in the forward pass, real ones in the update); the name:
Helwegen et al. 2019, "Latent weights do not exist".
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from psc_lightning.numerics.asking import Copy, Question, answer
from psc_lightning.sharding import gather, is_sharded, local, scatter
from psc_lightning.slots.before import Before
from psc_lightning.slots.marks import Mark, total, trace
from psc_lightning.slots.slots import SLOTS, SOFT, Slots

__all__ = ["Compressed"]

# A write that moves a weight by more than this share of its norm is a new weight, not a change of the old one.
_NEW = 0.7
# Warn where the slots undo more than this share of a write.
_UNDONE = 0.5


class Compressed:
    """One compressed tensor of a live model: its slots, its latent weight, and what its Parameter holds.

    Before any slot begins the Parameter itself is the latent weight, and nothing is kept here.

    Attributes:
        slots: what makes the hard weight.
        name: the tensor's first name, for messages.
        latent: the latent weight, sharded as the Parameter is; None where the Parameter holds it.
        lent: whether the latent weight is in the Parameter's place now.
    """

    def __init__(self, slots: Slots, name: str = "a weight") -> None:
        self.slots, self.name = slots, name
        self.latent: Tensor | None = None
        self.lent = False
        self.loaded = False  # `load_state_dict` has written to the Parameter
        self._spare: Tensor | None = None  # the hard weight's memory, while the latent one is in the Parameter's place
        self._mark: Mark | None = None
        self._before: Before | None = None  # until the next step: what others have written over
        self._warned = False
        self.refreshed = 0  # batches from which BatchNorm's statistics of this very weight were taken

    def __getstate__(self) -> dict[str, object]:
        """A copy has other memory, in which nothing is written yet."""
        mark = self._mark
        marked = None if mark is None else replace(mark, pointer=0, total=int(mark.total))
        return {**self.__dict__, "_mark": marked, "_before": None}

    # ------------------------------------------------------------------------------------------ what is where

    def dense(self, parameter: nn.Parameter) -> Tensor:
        """The latent weight, whole, on the Parameter's device; not to be changed."""
        held = parameter.detach() if self.latent is None or self.lent else self.latent
        return gather(held).detach()

    @torch.no_grad()
    def hold_zeros(self, parameter: nn.Parameter) -> float | None:
        """Let the mask keep the zeros of a latent weight that it has not begun on; the strength at which it does.

        None where its cores are not there yet.
        """
        slots = self.slots
        if slots.tying is not None and not slots.phase[0]:
            return None
        return min(slots.chain(name).hold_zeros(core) for name, core in slots.reduce(self.dense(parameter)).items())

    def set_strength(self, slot: str, value: float, parameter: nn.Parameter) -> None:
        """Set how hard a slot acts; `show` makes it so. What it begins with is the latent weight of now."""
        slots = self.slots
        if slot not in slots.specs or slots.acts(slot, value):
            return
        if self.traced(parameter):
            self.absorb(parameter)
        if self.latent is None and value > 0:
            self._separate(parameter)
        if self.latent is None:
            return
        full = gather(self.latent)
        slots.set_strength(slot, value, full)
        if is_sharded(self.latent):
            scatter(full, self.latent)

    def end_ramp(self, parameter: nn.Parameter) -> None:
        """Bring the slots that are in a ramp to full strength; `show` makes it so."""
        for slot, phase in zip(SLOTS, list(self.slots.phase)):
            if phase == SOFT:
                self.set_strength(slot, 1.0, parameter)

    def _separate(self, parameter: nn.Parameter) -> None:
        """From here on the latent weight has memory of its own."""
        self.slots.to(parameter.device)
        data = parameter.detach()
        self.latent = data.clone() if _in_place(parameter) else parameter.data
        if not _in_place(parameter):
            parameter.data = data.clone()
        self.loaded = False
        self._mark = Mark.of(parameter)

    def show(self, parameter: nn.Parameter) -> None:
        """Put into the Parameter what the slots make of the latent weight, if it is not there already."""
        answer(self.showing(parameter))

    def showing(self, parameter: nn.Parameter) -> Question[None]:
        """`show`, which may have to ask."""
        if self.latent is None:
            return
        if self.lent:
            if _in_place(parameter):
                yield Copy(local(parameter), local(self.latent))
            self._give_back(parameter)
        else:
            yield from self.absorbing(parameter)
        full = gather(self.latent)
        if self.slots.stale and is_sharded(self.latent):
            answer(self.slots.refreshing(full))  # a whole copy does not wait for others
        elif self.slots.stale:
            yield from self.slots.refreshing(full)
        if is_sharded(parameter):
            scatter(self.slots.make(full), parameter)
        else:
            self.slots.make(full, out=parameter.data)
        self._mark = Mark.of(parameter)

    def harden(self, parameter: nn.Parameter) -> None:
        """Bring every filled slot to full strength, and show it, with what others have written."""
        self.absorb(parameter)
        for slot in SLOTS:
            self.set_strength(slot, 1.0, parameter)
        self.show_if_stale(parameter)

    def show_if_stale(self, parameter: nn.Parameter) -> None:
        """`show`, where something has changed."""
        answer(self.settling(parameter, absorb=False))

    def settling(self, parameter: nn.Parameter, absorb: bool) -> Question[None]:
        """`absorb`, where it is wanted, and `show_if_stale`, which may have to ask."""
        if absorb:
            yield from self.absorbing(parameter)
        if self.slots.stale or self.lent:
            yield from self.showing(parameter)

    # ------------------------------------------------------------------------------------- an optimizer's step

    @torch.no_grad()
    def pull(self, parameter: nn.Parameter) -> None:
        """Turn the Parameter's gradient, at the hard weight, into the latent one's; sidecars get theirs."""
        if parameter.grad is None or self.latent is None or self.slots.straight:
            return
        pulled = self.slots.pull(gather(self.latent), gather(parameter.grad))
        if pulled is None:
            parameter.grad = None
        elif is_sharded(parameter.grad):
            scatter(pulled.to(parameter.grad.dtype), parameter.grad)
        elif pulled.data_ptr() != parameter.grad.data_ptr():  # else it was overwritten
            parameter.grad.copy_(pulled)

    def lend(self, parameter: nn.Parameter) -> None:
        """Put the latent weight in the Parameter's place, for an optimizer to move."""
        answer(self.lending(parameter))

    def lending(self, parameter: nn.Parameter) -> Question[None]:
        """`lend`, which may have to ask."""
        if self.latent is None or self.lent:
            return
        yield from self.absorbing(parameter)
        self._before = None
        if _in_place(parameter):
            yield Copy(local(self.latent), local(parameter))
        else:
            self._spare, parameter.data = parameter.data, self.latent
        self.lent = True

    def swaps(self, parameter: nn.Parameter) -> bool:
        """Whether `lend` changes what memory the Parameter has, instead of what is in it."""
        return not _in_place(parameter)

    @torch.no_grad()
    def show_again(self, parameter: nn.Parameter, weight: Tensor, lent: tuple[int, int]) -> None:
        """After `lend`, before a loss: what the Parameter held, if nobody has moved the latent weight; else `show`.

        Args:
            parameter: the Parameter.
            weight: what it held.
            lent: its `trace` just after `lend`.
        """
        if trace(parameter) != lent:
            self.show(parameter)
            return
        if _in_place(parameter):
            local(parameter).copy_(weight)
        else:
            self._spare, parameter.data = None, weight
        self.lent = False
        self._mark = Mark.of(parameter)

    @torch.no_grad()
    def _give_back(self, parameter: nn.Parameter) -> None:
        """The latent weight is what the Parameter holds now; one with memory of its own has been written already."""
        if not _in_place(parameter):
            self.latent = parameter.data
            spare, self._spare = self._spare, None
            fits = spare is not None and spare.dtype == self.latent.dtype and spare.device == self.latent.device
            fits = fits and spare is not None and spare.stride() == self.latent.stride()
            parameter.data = spare if fits and spare is not None else torch.empty_like(self.latent)
        self.lent = False
        self.slots.stale = self.slots.stale or self.slots.begun

    # ------------------------------------------------------------------------------------- what others write

    def written(self, parameter: nn.Parameter) -> bool:
        """Whether someone else has written to the Parameter since it was last written here."""
        return answer(self._written(parameter))

    def _written(self, parameter: nn.Parameter) -> Question[bool]:
        mark = self._mark
        if self.latent is None or self.lent or mark is None:
            return False
        if self.traced(parameter) and (self.loaded or mark.pointer):  # a copy has other memory
            return True
        differ = total(local(parameter)) != mark.total
        return bool((yield differ) if isinstance(differ, Tensor) else differ)

    def traced(self, parameter: nn.Parameter) -> bool:
        """`written`, as far as it costs nothing to tell."""
        if self.latent is None or self.lent or self._mark is None:
            return False
        return self.loaded or trace(parameter) != (self._mark.pointer, self._mark.version)

    def absorb(self, parameter: nn.Parameter) -> None:
        """Take what someone else has written to the Parameter into the latent weight."""
        answer(self.absorbing(parameter))

    def absorbing(self, parameter: nn.Parameter) -> Question[None]:
        """`absorb`, which may have to ask."""
        if not (yield from self._written(parameter)):
            return
        assert self.latent is not None
        found, full = gather(parameter.detach()), gather(self.latent)
        before = self._before
        if before is not None and before.is_again(found):
            self._before = None
            self.slots.return_to(before.slots, before.latent)
            taken: tuple[Slots, Tensor] | None = (self.slots, before.latent)
        else:
            here = before if before is not None or is_sharded(parameter) else Before.of(self.slots, full)
            taken = self._taken(self.slots, full, found, self._replaced(parameter))
            self._before = here if taken is not None else before
        self.latent = self.latent.to(parameter.device, parameter.dtype)
        if taken is not None:
            self.slots, full = taken
            if is_sharded(self.latent):
                scatter(full, self.latent)
            else:
                self.latent = torch.empty_like(found).copy_(full)  # lies in memory as the Parameter does now
        elif self.latent.stride() != parameter.stride():
            self.latent = torch.empty_like(parameter.detach()).copy_(self.latent)
        if not _in_place(parameter) and self._replaced(parameter):
            parameter.data = parameter.data.clone()  # what was assigned is another's memory
        self.loaded = False
        self._mark = Mark.of(parameter)

    def _replaced(self, parameter: nn.Parameter) -> bool:
        assert self._mark is not None
        return self.loaded or self._mark.pointer not in (0, local(parameter).data_ptr())

    def _taken(self, slots: Slots, latent: Tensor, found: Tensor, replaced: bool) -> tuple[Slots, Tensor] | None:
        """Slots and the latent weight that hold what was found in the Parameter; None where the slots had made it so.

        A new weight (loaded, assigned, initialised) replaces it. A change in place (a target's momentum, a norm kept) is
        added to it; where zeros were written into a row, its zeros are zero.
        """
        if found.shape != latent.shape:  # an embedding that has grown
            slots, full = slots.reshaped(tuple(found.shape)), found.clone()
            slots.begin_again(full)
            return slots, full
        made = slots.make(latent).to(found.device, found.dtype)
        slots.to(found.device)
        if torch.equal(found, made):  # moved, or written as it was
            slots.stale = slots.stale or latent.dtype != found.dtype  # which rounds once more, or less
            return None
        latent = latent.to(found.device, found.dtype)
        zeroed = _zeroed(found, made)
        change = torch.where(zeroed, 0.0, found - made)  # setting to zero is no new weight
        if replaced or float(change.float().norm()) > _NEW * float(made.float().norm()):
            full = found.clone()
            slots.begin_again(full)
            return slots, full
        full = torch.where(zeroed, 0.0, latent + change)
        slots.stale = slots.begun
        if slots is self.slots:
            self._warn_undone(full, found)
        return slots, full

    def _warn_undone(self, latent: Tensor, written: Tensor) -> None:
        """Warn once where the slots undo what was written."""
        if self._warned:
            return
        twin = self.slots.twin()
        twin.refresh(latent)
        if float((twin.make(latent) - written).float().norm()) > _UNDONE * float(written.float().norm()):
            self._warned = True
            warnings.warn(
                f"{self.name} was written to while it is compressed ({self.slots.method}), and "
                "its slots cannot hold what was written: most of it is undone at the next step. Write before training, "
                "leave the tensor out by `ignore`, or psc_lightning.detach(model) first",
                stacklevel=2,
            )

    # --------------------------------------------------------------------------------------------- looking ahead

    @torch.no_grad()
    def snapshot(self, parameter: nn.Parameter) -> tuple[Slots, Tensor] | None:
        """The slots at full strength and their latent weight, as a file would hold them; None before any has begun.

        Nothing is changed: where something would be, it is done to copies.
        """
        if self.latent is None:
            return self._recognised(parameter) if self.loaded else None
        if not self.slots.begun:
            return None
        written = self.written(parameter)
        if not (written or self.lent or self.slots.stale or self.slots.soft):
            return self.slots, self.dense(parameter)
        slots, latent = self.slots.twin(), self.dense(parameter).clone()
        if written:
            taken = self._taken(slots, latent, gather(parameter.detach()), self._replaced(parameter))
            slots, latent = taken if taken is not None else (slots, latent.to(parameter.device, parameter.dtype))
        for slot, phase in zip(SLOTS, self.slots.phase):
            if phase:
                slots.set_strength(slot, 1.0, latent)
        if slots.stale or self.lent:
            slots.refresh(latent)
        return slots, latent

    def _recognised(self, parameter: nn.Parameter) -> tuple[Slots, Tensor] | None:
        """A loaded weight that the slots would leave as it is was made by them."""
        weight = gather(parameter.detach()).clone()
        slots = self.slots.twin().to(weight.device)
        slots.harden(weight)
        return (slots, weight) if torch.equal(slots.make(weight), gather(parameter.detach())) else None

    @torch.no_grad()
    def rescale(self, parameter: nn.Parameter, factor: Tensor) -> None:
        """Multiply the hard weight, a positive factor an output channel.

        Raises:
            ValueError: as `Slots.rescale`.
        """
        snapshot = self.snapshot(parameter)
        assert snapshot is not None
        self.slots, latent = snapshot
        self.latent = latent.clone()
        self.slots.rescale(self.latent, factor)
        self.slots.make(self.latent, out=parameter.data)
        self.lent = self.loaded = False
        self._mark = Mark.of(parameter)

    # ------------------------------------------------------------------------------------------- checkpoints

    def training_state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What goes into a checkpoint, whole: the latent weight (once a slot has begun), sidecars, strengths."""
        self.absorb(parameter)
        dense = self.dense(parameter)
        if self.latent is not None and self.slots.stale:
            self.show(parameter)
        state = self.slots.training_state(dense)
        return {**state, "latent": dense.clone()} if self.latent is not None else state

    def load_training_state(self, parameter: nn.Parameter, state: Mapping[str, Tensor]) -> None:
        """Put it back, beside the hard weight that the Parameter has been given."""
        rest = dict(state)
        latent = rest.pop("latent", None)
        self.slots.to(parameter.device)
        self.lent = self.loaded = False
        self.latent = self._spare = self._mark = self._before = None
        if latent is None:
            self.slots.load_training_state(gather(parameter.detach()), rest)
            return
        full = latent.to(parameter.device, parameter.dtype)
        self.slots.load_training_state(full, rest)
        self.latent = torch.empty_like(parameter.detach())
        if is_sharded(parameter):
            scatter(full, self.latent)
        else:
            self.latent.copy_(full)
        self._mark = Mark.of(parameter)

    @torch.no_grad()
    def reconcile(self, parameter: nn.Parameter) -> None:
        """After `load_training_state`: what the Parameter was loaded with counts, if it is another weight."""
        if self.latent is not None and not torch.equal(
            self.slots.make(gather(self.latent)), gather(parameter.detach())
        ):
            self.loaded = True
            self.show(parameter)

    def unshare(self) -> None:
        """Take memory of its own: what is pickled for several processes is one memory for all of them."""
        for tensor in (*self.slots.parameters(), *self.slots.buffers()):
            tensor.data = tensor.data.clone()
        self.latent = None if self.latent is None else self.latent.clone()

    def follow(self, parameter: nn.Parameter, latent: Tensor) -> None:
        """Take another latent weight (an average, say), under the sidecars that there are."""
        if self.latent is None:
            return
        if self.lent:
            self.show(parameter)
        local(self.latent).copy_(local(latent))
        self._mark = Mark.of(parameter)
        self.slots.stale = self.slots.begun
        self.show(parameter)


def _zeroed(found: Tensor, made: Tensor) -> Tensor:
    """Where zeros have been written: also over zeros, in rows in which others are new."""
    zero = found == 0
    rows = (zero & (made != 0)).reshape(len(found), -1).any(1) if found.dim() else zero & (made != 0)
    return zero & rows.reshape(-1, *(1,) * (found.dim() - 1)) if found.dim() else rows


def _in_place(parameter: Tensor) -> bool:
    """Whether a Parameter's memory must stay where it is: graphs and kernels on a device, shards, other processes, views."""
    if is_sharded(parameter) or parameter.device.type != "cpu" or parameter.untyped_storage().is_shared():
        return True
    return parameter.untyped_storage().nbytes() != parameter.nbytes
