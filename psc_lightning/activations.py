"""What a layer needs to compute in whole numbers: its input on a grid of unsigned integers, the range of its output.

It lies in a plain object under the layer's ``__dict__``, as slots do, so that copies and pickles of the layer take it along.
A forward pre-hook rounds: a function of this module, so that it copies and pickles, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from psc_lightning.numerics.functional import straight_through

__all__ = ["Activations", "Grid", "Range", "Ranges", "activations", "grid", "hold", "let_go", "of", "takes_inputs"]

#: where it lies in a layer's ``__dict__``
PLACE = "_psc_activations"

_MOMENTUM = 0.1  # a batch's share of a running range, as BatchNorm's


@dataclass(frozen=True)
class Grid:
    """The numbers ``(q - zero) · scale``, q = 0 … top.

    Attributes:
        scale: above 0, a float32.
        zero: the q that means 0.
        top: 2^bits - 1.
    """

    scale: float
    zero: int
    top: int

    @property
    def low(self) -> float:
        """The lowest number."""
        return -self.zero * self.scale

    @property
    def high(self) -> float:
        """The highest."""
        return (self.top - self.zero) * self.scale


@dataclass(frozen=True)
class Ranges:
    """What a layer's numbers lie in.

    Attributes:
        inputs: what its inputs are rounded to.
        outputs: the lowest and the highest output of a convolution, a row each, which was seen in training; None: not seen.
    """

    inputs: Grid
    outputs: Tensor | None


def grid(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point for numbers from low ≤ 0 to high ≥ 0.

    >>> [value.item() for value in grid(torch.tensor(-1.0), torch.tensor(3.0), 2)]
    [1.3333333730697632, 1.0]
    """
    scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    return scale, (-low / scale).round()


class Range(nn.Module):
    """The smallest and largest number of a batch, as a moving average over batches; empty (low = high) before the first.

    A layer that is called several times in a batch has one range in it, of all its calls.

    Args:
        shape: one range each.
    """

    low: Tensor
    high: Tensor
    #: the average before this batch, and this batch's own bounds so far
    low_before: Tensor
    high_before: Tensor
    low_here: Tensor
    high_here: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        for name in ("", "_before", "_here"):
            for bound in ("low", "high"):
                zeros = torch.zeros(shape, dtype=torch.float32)
                self.register_buffer(f"{bound}{name}", zeros, persistent=not name)
        self.begin()

    def begin(self) -> None:
        """A batch begins."""
        self.low_before.copy_(self.low)
        self.high_before.copy_(self.high)
        self.low_here.fill_(torch.inf)
        self.high_here.fill_(-torch.inf)

    def take(self, low: Tensor, high: Tensor) -> None:
        """Take in the bounds of a call, unless they are infinite or no numbers."""
        known, new = (high - low).isfinite(), self.low_before == self.high_before
        self.low_here.copy_(torch.where(known, self.low_here.minimum(low.float()), self.low_here))
        self.high_here.copy_(torch.where(known, self.high_here.maximum(high.float()), self.high_here))
        for bound, before, here in (
            (self.low, self.low_before, self.low_here),
            (self.high, self.high_before, self.high_here),
        ):
            bound.copy_(torch.where(known, torch.where(new, here, before.lerp(here, _MOMENTUM)), bound))


class Activations(nn.Module):
    """Rounds a layer's input: ``x̂ = (clamp(round(x/s) + z, 0, m) - z) · s``, m = 2^bits - 1; 0 stays 0.

    s = (high - low)/m and z = round(-low/s), of the range of the inputs seen in training, 0 always in it.
    Pseudo-gradient: ∂/∂x = g within the range, 0 outside. Before it begins, and until an input was seen, it is passed on as
    it is.

    Args:
        bits: 2 … 8.
        channels: of a convolution's output, whose ranges are of use where it runs in integers; None: not seen.
        owner: the callback that asked for it, for messages.

    Attributes:
        observing: whether inputs are taken into the range now.
        begun: whether inputs are rounded.

    >>> inputs = Activations(2)
    >>> inputs.see(torch.tensor([0.0, 3.0]))
    >>> inputs(torch.tensor([-1.0, 0.4, 1.6, 7.0])).tolist()
    [0.0, 0.0, 2.0, 3.0]

    Source: Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference", sections 2.1 and 3.1.
    """

    def __init__(self, bits: int, channels: int | None = None, owner: str = "") -> None:
        super().__init__()
        self.bits, self.owner = bits, owner
        self.observing = self.begun = False
        self.input = Range()
        self.output = None if channels is None else Range(channels)

    def observe(self) -> None:
        """A batch begins, whose inputs and outputs are to be seen, until `observing` is False again."""
        self.observing = True
        for one in self.followed():
            one.begin()

    def followed(self) -> list[Range]:
        """The ranges that training follows."""
        return [self.input] if self.output is None else [self.input, self.output]

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """Take in the inputs of a call."""
        if x.numel():
            low, high = x.aminmax()
            self.input.take(low.clamp(max=0.0), high.clamp(min=0.0))

    @torch.no_grad()
    def see_output(self, y: Tensor, axis: int) -> None:
        """Take in the outputs of a call, whose channels lie along an axis."""
        if self.output is not None and y.numel():
            others = [i for i in range(y.dim()) if i != axis]
            self.output.take(y.amin(others), y.amax(others))

    def forward(self, x: Tensor) -> Tensor:
        """The rounded input, of its own type."""
        with torch.no_grad():
            scale, zero = grid(self.input.low, self.input.high, self.bits)
            top = 2**self.bits - 1
            code = ((x / scale).round() + zero).clamp(0, top)
            seen = self.input.high > self.input.low
            hard = torch.where(seen, (code - zero) * scale, x).to(x.dtype)
            wide = torch.finfo(torch.float32).max
            low, high = torch.where(seen, -zero * scale, -wide), torch.where(seen, (top - zero) * scale, wide)
        return straight_through(hard, x.clamp(low.to(x.dtype), high.to(x.dtype)))

    @torch.no_grad()
    def grid(self) -> Grid | None:
        """The inputs' grid; None where none was seen."""
        scale, zero = grid(self.input.low, self.input.high, self.bits)
        return Grid(scale.item(), int(zero), 2**self.bits - 1) if self.input.high > self.input.low else None

    @torch.no_grad()
    def ranges(self) -> Ranges | None:
        """What a graph of integers is made of; None where inputs are passed on as they are."""
        inputs = self.grid() if self.begun else None
        outputs = None if self.output is None else torch.stack((self.output.low, self.output.high))
        return None if inputs is None else Ranges(inputs, outputs)

    # ------------------------------------------------------------------------------------------ checkpoints

    def training_state(self) -> dict[str, Tensor]:
        """What a checkpoint needs: the ranges, and whether inputs are rounded."""
        begun = {"begun": torch.tensor(self.begun)}
        return {**{key: value.detach().clone() for key, value in self.state_dict().items()}, **begun}

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        """Put it back."""
        rest = dict(state)
        self.begun = bool(rest.pop("begun"))
        self.load_state_dict(rest)


# ------------------------------------------------------------------------------------------------------- layers


def takes_inputs(layer: nn.Module) -> bool:
    """Whether a layer multiplies one input by its weight, so that the input can be rounded."""
    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def hold(layers: Iterable[nn.Module], found: Activations) -> None:
    """Let layers (several, where they hold one weight) round their inputs."""
    for layer in layers:
        if PLACE not in layer.__dict__:
            _let_graphs_see_hooks()
            layer.register_forward_pre_hook(_round_input, with_kwargs=True)
            layer.register_load_state_dict_pre_hook(_take_carried)  # type: ignore[no-untyped-call]  # torch's
            if found.output is not None:
                layer.register_forward_hook(_see_output)
        layer.__dict__[PLACE] = found


def of(layer: nn.Module) -> Activations | None:
    """What rounds a layer's input, or None."""
    found: Activations | None = layer.__dict__.get(PLACE)
    return found


def let_go(layer: nn.Module) -> None:
    """Pass a layer's inputs on as they are, for good."""
    if layer.__dict__.pop(PLACE, None) is None:
        return
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks, layer._load_state_dict_pre_hooks):
        ours = (_round_input, _see_output, _take_carried)
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) in ours]:
            del hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)


def activations(module: nn.Module) -> Iterator[tuple[str, nn.Module, Activations]]:
    """What rounds inputs in a model, each once: the first layer's name, that layer, itself."""
    seen: set[int] = set()
    for name, layer in module.named_modules():
        found = of(layer)
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            yield name, layer, found


def carried(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """What a state dict carries to a process that gets nothing else from this one."""
    return {
        f"{prefix}{name}.{PLACE}.{key}" if name else f"{prefix}{PLACE}.{key}": value
        for name, _, found in activations(module)
        for key, value in found.training_state().items()
    }


def _take_carried(layer: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Before `load_state_dict`: take what `carried` gave."""
    inner = f"{prefix}{PLACE}."
    mine = {key[len(inner) :]: state.pop(key) for key in list(state) if key.startswith(inner)}
    found = of(layer)
    if mine and found is not None:
        found.load_training_state(mine)


def _round_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook."""
    found: Activations = layer.__dict__[PLACE]
    x = args[0] if args else kwargs["input"]
    if found.input.low.device != x.device:  # the model has been moved since
        found.to(x.device)
    if found.observing:
        found.see(x)
    if not found.begun:
        return args, kwargs
    return ((found(x), *args[1:]), kwargs) if args else (args, {**kwargs, "input": found(x)})


def _see_output(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Forward hook of a convolution."""
    found: Activations = layer.__dict__[PLACE]
    if found.observing and isinstance(layer.weight, Tensor):
        found.see_output(output, output.dim() + 1 - layer.weight.dim())


def _let_graphs_see_hooks() -> None:
    """Else torch.compile takes a graph of a layer without hooks for one with them: it does not look, to be quick."""
    dynamo = sys.modules.get("torch._dynamo")  # loaded by Lightning; by itself it takes longer than reading a file
    if dynamo is not None and dynamo.config.skip_nnmodule_hook_guards:
        dynamo.config.skip_nnmodule_hook_guards = False
        dynamo.reset()
