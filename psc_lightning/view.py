"""The attribute view: a layer's `weight` reads as the effective weight, while its Parameter stays where it is.

The layer's class becomes a cached subclass whose property `weight` passes the Parameter through its `Slots`. The
Parameter stays registered under its own name, so names, order, optimizers, checkpoints and tied weights are those of
the plain model; the slots live in a child module ``psc``. It is `torch.nn.utils.parametrize` without the renaming.
Where a layer's input is rounded too, a forward pre-hook does it: a function of this module, so that it copies and pickles.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from psc_lightning.sharding import is_sharded, sharded_modules
from psc_lightning.slots import Slots

__all__ = [
    "attach_slots",
    "derive",
    "detach",
    "plain_state",
    "raw",
    "remove_slots",
    "slots_of",
    "sources",
    "takes_inputs",
    "views",
]

M = TypeVar("M", bound=nn.Module)

#: The child module's name. Its keys in a state dict are ``<layer>.psc.<tensor>.…``.
CHILD = "psc"

# ------------------------------------------------------------------------------------------------ derived classes

_derived: dict[tuple[Any, ...], type] = {}


def derive(module: nn.Module, body: Callable[..., dict[str, Any]], *args: Any) -> None:
    """Change a module's class to a cached subclass with the attributes that ``body(class, *args)`` gives.

    The subclass bears the name of its base, pickles by naming the base, and is undone by `underive`.

    Args:
        module: the instance to change.
        body: a module-level function, since a pickle refers to it.
        args: hashable; with the class and `body` they name the subclass.
    """
    module.__class__ = _subclass(type(module), body, args)


def _subclass(base: type, body: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> type:
    key = (base, body, args)
    if key not in _derived:

        def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
            state = base.__reduce_ex__(self, protocol)  # type: ignore[call-arg]
            return (_rebuild, (base, body, args), *state[2:])

        attributes = {"__reduce_ex__": reduce, "__module__": base.__module__, "__doc__": base.__doc__}
        cls: type = type(base)(base.__name__, (base,), {**attributes, "_psc_base": base, **body(base, *args)})
        cls.__qualname__ = base.__qualname__
        _derived[key] = cls
    return _derived[key]


def _rebuild(base: type, body: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> Any:
    cls: Any = _subclass(base, body, args)
    return cls.__new__(cls)


def plain_class(cls: type) -> type:
    """The class that the user wrote."""
    while "_psc_base" in cls.__dict__:
        cls = cls.__dict__["_psc_base"]
    return cls


# ------------------------------------------------------------------------------------------------------- the view

_state = threading.local()


@contextmanager
def raw() -> Iterator[None]:
    """Within it, `layer.weight` is the Parameter itself, for code that initialises, ties or resizes weights."""
    before = getattr(_state, "raw", False)
    _state.raw = True
    try:
        yield
    finally:
        _state.raw = before


def _seen(slots: Slots, parameter: nn.Parameter) -> Tensor:
    """The effective weight, which requires a gradient also where none is recorded, as the Parameter does.

    Torch chooses how to multiply, and so to round, by whether a weight, or what it is a view of, requires one.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return slots.effective(parameter)
    with torch.inference_mode(False), torch.no_grad():
        weight = slots.effective(parameter)
        if weight is not parameter:
            weight = weight.data
            weight.requires_grad = parameter.requires_grad
        return weight


def _views(base: type, names: tuple[str, ...]) -> dict[str, Any]:
    """The properties of a viewed layer."""

    def view(name: str) -> property:
        def get(self: nn.Module) -> Tensor | None:
            parameter = self._parameters[name]
            # A sharded weight is no weight to compute with: FSDP2 looks at it here, and puts the whole one in its place.
            if parameter is None or getattr(_state, "raw", False) or is_sharded(parameter):
                return parameter
            try:
                return _seen(self._modules[CHILD]._modules[name], parameter)  # type: ignore[union-attr, arg-type]
            except AttributeError as error:
                # Module.__getattr__ would take an AttributeError for "no such property" and give out the raw weight.
                raise RuntimeError(f"the view of {name!r} failed: {error}") from error

        return property(get, doc=f"The effective {name}.")

    attributes: dict[str, Any] = {"_psc_views": names, **{name: view(name) for name in names}}
    if issubclass(base, nn.RNNBase):
        # Recurrent layers keep a list of their weights for the kernels; it must hold the effective ones.
        attributes["_flat_weights"] = property(
            lambda self: [getattr(self, name, None) for name in self._flat_weights_names], lambda self, value: None
        )
    return attributes


def takes_inputs(layer: nn.Module) -> bool:
    """Whether a layer multiplies one input by its weight, so that the input can be rounded."""
    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)


def _round_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook."""
    slots = layer._modules[CHILD]._modules["weight"]  # type: ignore[union-attr]
    assert isinstance(slots, Slots)
    if args:
        return (slots.rounded(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": slots.rounded(kwargs["input"])}


def _see_output(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Forward hook."""
    slots = layer._modules[CHILD]._modules["weight"]  # type: ignore[union-attr]
    assert isinstance(slots, Slots)
    if slots.inputs is not None and slots.inputs.observing:
        slots.inputs.see_output(output, output.dim() + 1 - len(slots.stored_shape))


def _hook(layer: nn.Module) -> None:
    if _round_input not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_round_input, with_kwargs=True)
        if not isinstance(layer, nn.Linear):
            layer.register_forward_hook(_see_output)


def _unhook(layer: nn.Module) -> None:
    for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_round_input, _see_output)]:
            del hooks[key]
            layer._forward_pre_hooks_with_kwargs.pop(key, None)


def slots_of(module: nn.Module, name: str) -> Slots | None:
    """The slots of a layer's tensor, or None where it has no view."""
    child = module._modules.get(CHILD)
    found = child._modules.get(name) if child is not None else None
    return found if isinstance(found, Slots) else None


def attach_slots(holders: list[tuple[nn.Module, str]], slots: Slots) -> None:
    """View one Parameter through `slots` in all layers that hold it (a tied weight has several)."""
    for module, name in holders:
        if CHILD not in module._modules:
            module.add_module(CHILD, nn.ModuleDict())
            module._modules[CHILD].train(module.training)  # type: ignore[union-attr]
        child = module._modules[CHILD]
        if not isinstance(child, nn.ModuleDict) or not all(isinstance(own, Slots) for own in child.values()):
            raise ValueError(f"{type(module).__name__} has a child module of its own named {CHILD!r}: rename it")
        child[name] = slots
        names = tuple(sorted(child))
        # On top of whatever the class is by now: a LightningModule that holds weights itself is derived twice.
        if getattr(type(module), "_psc_views", ()) != names:
            derive(module, _views, names)
        if name == "weight" and slots.inputs is not None and takes_inputs(module):
            _hook(module)


def remove_slots(module: nn.Module, name: str) -> None:
    """Take a tensor's slots out of a layer, unbaked; the caller gives the layer its class back."""
    child = module._modules.get(CHILD)
    if child is not None:
        _unhook(module)
        child._modules.pop(name, None)
        if not child._modules:
            module._modules.pop(CHILD)


def _viewed(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Slots]]:
    """Every (layer name, layer, tensor, slots), tied holders and a layer's other names included."""
    for prefix, layer in module.named_modules(remove_duplicate=False):
        child = layer._modules.get(CHILD)
        if isinstance(child, nn.ModuleDict):
            for name, slots in child.items():
                if isinstance(slots, Slots):
                    yield prefix, layer, name, slots


def views(module: nn.Module) -> Iterator[tuple[str, Slots, nn.Parameter]]:
    """Each viewed tensor once: its first plain name, its slots, its raw Parameter."""
    seen: set[int] = set()
    for prefix, layer, name, slots in _viewed(module):
        parameter = layer._parameters[name]
        if id(slots) not in seen and parameter is not None:
            seen.add(id(slots))
            yield f"{prefix}.{name}" if prefix else name, slots, parameter


def sources(module: nn.Module, state: Mapping[str, Any] | None = None) -> dict[str, tuple[Any, Slots | None]]:
    """The keys of the plain class in its order: what lies under each, and the slots through which it is seen.

    Args:
        module: the model.
        state: a state dict of it that is not its own (an average, say); then the sidecars are taken from there too.
    """
    full = module.state_dict() if state is None else dict(state)
    through: dict[str, Slots] = {}
    known: dict[int, Slots] = {}
    hidden: list[str] = []
    for prefix, layer, name, slots in _viewed(module):
        dot = f"{prefix}." if prefix else ""
        key, inner = dot + name, f"{dot}{CHILD}.{name}."
        hidden.append(inner)
        if id(slots) not in known:
            parameter = layer._parameters[name]
            assert parameter is not None
            own = slots
            if full[key].data_ptr() != parameter.data_ptr():
                own = deepcopy(slots)
                own.load_state_dict({k[len(inner) :]: v for k, v in full.items() if k.startswith(inner)})
                own.stale = own.begun
            known[id(slots)] = own
        through[key] = known[id(slots)]
    return {
        key: (value, through.get(key))
        for key, value in full.items()
        if not any(key.startswith(prefix) for prefix in hidden)
    }


def plain_state(module: nn.Module, state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The state dict of the plain class: its keys in its order, effective weights (contiguous) under their names.

    Args:
        module, state: as `sources` has them.
    """
    effective: dict[Slots, Tensor] = {}  # of a tied weight one
    plain: dict[str, Any] = {}
    for key, (value, slots) in sources(module, state).items():
        if slots is not None and slots not in effective:
            with torch.no_grad():
                seen = slots.effective(value.detach()).detach()
            # Equal numbers in another memory layout give other logits: one layout for all.
            effective[slots] = seen.contiguous() if slots.begun else seen
        plain[key] = value if slots is None else effective[slots]
    return plain


def detach(module: M) -> M:
    """Bake the hard effective weights into the Parameters and give every layer its own class back.

    Slots that have not reached full strength are hardened first. The module is changed in place and returned; what it
    computes in eval stays bit for bit the same, but where inputs were rounded (`activations`): their ranges are no part
    of the plain class, and go (`export_onnx` before).

    Raises:
        ValueError: the model is sharded.
    """
    if sharded_modules(module):
        raise ValueError(
            "detach: fully_shard has sharded this model, and that cannot be undone: psc_lightning.save(model, path) on all "
            "ranks, then psc_lightning.load(path) into a plain model"
        )
    found = list(_viewed(module))
    baked: dict[int, Tensor] = {}
    for _, layer, name, slots in found:
        parameter = layer._parameters[name]
        if id(slots) not in baked and parameter is not None:
            slots.harden(parameter)
            with torch.no_grad():
                baked[id(slots)] = slots.effective(parameter).clone()
                parameter.copy_(baked[id(slots)])
    for _, layer, _, _ in found:
        layer._modules.pop(CHILD, None)
        _unhook(layer)
    for layer in module.modules():
        base = plain_class(type(layer))
        if base is not type(layer):
            layer.__class__ = base
    return module
