"""What happens around an optimizer's step, from the optimizer's own hooks: whoever calls it, however often.

    pull → lend → penalties → clip → labels → the optimizer's step → the sidecars' step → show

An optimizer that asks for the loss within its step (Lightning's automatic optimization does, LBFGS several times) sees hard
weights each time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from psc_lightning.numerics.asking import answers
from psc_lightning.sharding import gather, is_sharded, local
from psc_lightning.slots.live import Place
from psc_lightning.slots.marks import trace
from psc_lightning.slots.slots import SLOTS
from psc_lightning.training.cast import Cast
from psc_lightning.training.run import user_rate

__all__ = ["Stepping"]

#: what a Parameter held before `lend`, and the trace by which a later change of the latent weight shows
_Kept = tuple[Place, Tensor, tuple[int, int]]


class Stepping:
    """Listens to the optimizers of a run.

    Args:
        cast: who takes part.
    """

    def __init__(self, cast: Cast) -> None:
        self.cast = cast
        self.units: list[Any] = []  # that fully_shard was called on
        self.stepped: set[int] = set()  # tensors that have been made hard since the last `settled`
        self._hooked: list[tuple[Optimizer, list[Any]]] = []
        self._depth: dict[int, int] = {}
        self._lent: dict[int, list[Place]] = {}
        self._borrowed: list[nn.Parameter] = []

    def listen(self, optimizers: list[Optimizer]) -> None:
        """Register step hooks on these optimizers, and on no others."""
        if [optimizer for optimizer, _ in self._hooked] == optimizers:
            return
        self.stop()
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise ValueError(
                    f"{type(optimizer).__name__} is no torch.optim.Optimizer: it does not say when it steps, so the latent "
                    "weights cannot be put in its hands; derive it from torch.optim.Optimizer"
                )
            before, after = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
            self._hooked.append((optimizer, [before(self._before), after(self._after)]))

    def stop(self) -> None:
        """Remove the hooks."""
        for _, hooks in self._hooked:
            for hook in hooks:
                hook.remove()
        self._hooked = []
        self._depth.clear()

    def reshard(self) -> None:
        """Let go of weights that a forward pass has left whole: what is written to the shards would not reach them."""
        for unit in self.units:
            unit.reshard()

    def borrow(self) -> None:
        """Ask for the gradients of frozen weights beside which something learns; until `settled`."""
        for place in self.cast.everywhere():
            parameter = place.parameter
            trained = any(True for slot in SLOTS for _ in place.tensor.slots.sidecars(slot))
            if trained and not parameter.requires_grad and not is_sharded(parameter):
                parameter.requires_grad_()
                self._borrowed.append(parameter)

    def settled(self) -> None:
        """Reset after a batch, also one that failed; frozen Parameters are frozen again."""
        self._lent.clear()
        self._depth.clear()
        self.stepped.clear()
        for parameter in self._borrowed:
            parameter.requires_grad_(False)
            parameter.grad = None
        self._borrowed = []

    # ------------------------------------------------------------------------------------------------- before

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The outermost step alone counts: one may call that of the class it derives from."""
        self._depth[id(optimizer)] = self._depth.get(id(optimizer), 0) + 1
        if self._depth[id(optimizer)] > 1:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._ready(optimizer)
            return None
        kept = [] if type(optimizer).__module__.startswith("torch.optim.") else self._lend_early(optimizer)
        ask = partial(self._ask, optimizer, closure, kept)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": ask}
        return (args[0], ask, *args[2:]), kwargs

    def _lend_early(self, optimizer: Optimizer) -> list[_Kept]:
        """For an optimizer of others, which may look at weights, or move them, before it asks for a loss."""
        places = self._of(optimizer)
        shown = [
            local(p) if place.tensor.swaps(p) else local(p).clone() for place in places for p in (place.parameter,)
        ]
        answers(place.tensor.lending(place.parameter) for place in places)
        self._lent[id(optimizer)] = places
        return [(place, held, trace(place.parameter)) for place, held in zip(places, shown, strict=True)]

    def _ask(
        self, optimizer: Optimizer, closure: Callable[..., Any], kept: list[_Kept], *args: Any, **kwargs: Any
    ) -> Any:
        """A loss, of hard weights: the first time of those that were there, as others have written them."""
        lent = self._lent.pop(id(optimizer), [])
        for place, shown, mark in kept:
            place.tensor.show_again(place.parameter, shown, mark)
        answers(place.tensor.showing(place.parameter) for place in (lent if not kept else ()))
        kept.clear()
        result = closure(*args, **kwargs)
        self._ready(optimizer)
        return result

    def _ready(self, optimizer: Optimizer) -> None:
        """The gradients are there, at the hard weights: make them the latent ones', and lend these."""
        trainer, module = self.cast.trainer, self.cast.module
        assert trainer is not None
        assert module is not None
        self.reshard()
        frozen = {id(parameter) for parameter in self._borrowed}
        places = self._of(optimizer)
        for place in places:
            place.tensor.pull(place.parameter)
        for place in places:
            if id(place.parameter) in frozen:
                _average(place)
        answers(place.tensor.lending(place.parameter) for place in places if id(place.parameter) not in frozen)
        self._lent[id(optimizer)] = places
        for penalty in self.cast.penalties:
            penalty.before_step(places, _scale(optimizer))
        for clipper in self.cast.clippers:
            clipper.before_step(trainer, module, optimizer)
        if not _overflows(optimizer):
            self._show_labels(places, trainer.global_step, _scale(optimizer))
        for parameter in self._borrowed:
            parameter.grad = None  # an optimizer that holds it leaves it alone

    def _of(self, optimizer: Optimizer) -> list[Place]:
        """The tensors that an optimizer updates now; frozen ones that have sidecars go with the first optimizer."""
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        own |= {id(parameter) for parameter in self._borrowed}
        found = [(place, place.parameter) for place in self.cast.everywhere()]
        return [place for place, parameter in found if id(parameter) in own and parameter.grad is not None]

    def _show_labels(self, places: list[Place], step: int, scale: float) -> None:
        """Let methods that want them see the gradients, before they begin."""
        here = {id(place.tensor) for place in places}
        for filler in self.cast.fillers:
            if filler.calibration_steps and step < self.cast.begins(filler):
                for place in self.cast.of(filler):
                    parameter = place.parameter
                    if id(place.tensor) in here:
                        gradient = None if parameter.grad is None else gather(parameter.grad) / scale
                        place.tensor.slots.observe(filler.slot, place.tensor.dense(parameter), gradient)

    # -------------------------------------------------------------------------------------------------- after

    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Step what is trained beside these weights, and make them hard."""
        self._depth[id(optimizer)] = self._depth.get(id(optimizer), 1) - 1
        if self._depth[id(optimizer)] > 0:
            return
        cast = self.cast
        assert cast.trainer is not None
        now = user_rate(cast.trainer.optimizers)
        if _overflows(optimizer):
            cast.sidecars.forget()
        factor = now / cast.base_rate if now is not None and cast.base_rate else 1.0
        cast.sidecars.step(factor, _scale(optimizer))
        self._mark_due(cast.trainer.global_step + 1)
        alone = cast.module is not None and cast.module.automatic_optimization
        lent = self._lent.pop(id(optimizer), [])
        for place in lent:
            tensor = place.tensor
            tensor.slots.stale = tensor.slots.begun
            if alone:  # the batch's only step: hard from here on
                tensor.end_ramp(place.parameter)
            self.stepped.add(id(tensor))
        answers(place.tensor.showing(place.parameter) for place in lent)

    def _mark_due(self, step: int) -> None:
        """Which slots recompute thresholds, scales and assignments after this step."""
        for filler in self.cast.fillers:
            for place in self.cast.of(filler):
                place.tensor.slots.due[SLOTS.index(filler.slot)] = step % filler.refresh == 0


def _average(place: Place) -> None:
    """Sidecars of a frozen weight get the mean of all processes' gradients, as DDP gives others."""
    if distributed.is_available() and distributed.is_initialized():
        for sidecar in place.tensor.slots.active_sidecars():
            if sidecar.grad is not None:
                distributed.all_reduce(sidecar.grad)
                sidecar.grad.div_(distributed.get_world_size())


def _scale(optimizer: Optimizer) -> float:
    """What the gradients are multiplied by, where an optimizer undoes it within its step (a fused one, under a scaler)."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def _overflows(optimizer: Optimizer) -> bool:
    """Whether such an optimizer leaves its step out."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
