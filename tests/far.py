"""A device that is not the CPU, on any machine: tensors whose operations are seen, and done on the CPU.

It calls itself `meta`, which torch knows everywhere, but holds numbers. It has no float64 (as MPS), cannot be read by
NumPy, does not mix with the CPU, and refuses what CUDA refuses under `torch.use_deterministic_algorithms(True)`. It counts
where a processor would wait for it, and what it would launch.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Far", "FarDevice"]

# The list in the documentation of torch.use_deterministic_algorithms, as far as tensors of weights can meet it, and sums
# whose order a graphics processor chooses anew each time.
UNSURE = ("kthvalue", "median", "histc", "bincount", "put_", "index_add", "scatter_add", "scatter_reduce", "cumsum")
MIXES = ("copy_", "_to_copy")  # operations that may see two devices
# Operations whose result is a number, or a tensor of a size, that the processor must know.
NO_LAUNCH = ("empty", "empty_like", "resize_", "_unsafe_view")  # beside views
WAITS = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "repeat_interleave", "unique_dim", "_unique2")


class Far(Tensor):
    """A tensor there."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, near.shape, near.stride(), near.storage_offset(), dtype=near.dtype, device="meta"
        )

    def __init__(self, near: Tensor) -> None:
        self.near = near

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class FarDevice(TorchDispatchMode):
    """Lets tensors be made there, and counts by name what waits for it, or brings something to it, and its operations."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made, name = _run(func, args, kwargs or {}), func.overloadpacket.__name__
        if any(isinstance(leaf, Far) for leaf in leaves) or isinstance(made, Far):
            self.launches.update([] if func.is_view or name in NO_LAUNCH else [name])
            crosses = name in MIXES and not all(isinstance(leaf, Far) for leaf in (*leaves, made))
            marks = name in ("index", "index_put_") and any(at is not None and at.dtype == torch.bool for at in args[1])
            self.waits.update([name] if name in WAITS or crosses or marks else [])
        return made


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    far = [tensor for tensor in tensors if isinstance(tensor, Far)]
    name = func.overloadpacket.__name__
    there = bool(far) if kwargs.get("device") is None else torch.device(kwargs["device"]).type == "meta"
    if far and name not in MIXES and any(tensor.dim() for tensor in tensors if not isinstance(tensor, Far)):
        raise RuntimeError(f"{func}: tensors on two devices")
    if far and name.startswith(UNSURE) and (name != "cumsum" or far[0].is_floating_point()):
        raise RuntimeError(f"{func} has no deterministic implementation")
    near = {key: "cpu" if key == "device" and value is not None else value for key, value in kwargs.items()}
    made = func(*tree_map(_near, args), **tree_map(_near, near))
    same = {id(tensor.near): tensor for tensor in far}

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not there:
            return leaf
        if leaf.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{func}: no float64 on this device")
        return same[id(leaf)] if id(leaf) in same else Far(leaf)

    return tree_map(placed, made)


def _near(leaf: Any) -> Any:
    return leaf.near if isinstance(leaf, Far) else leaf
