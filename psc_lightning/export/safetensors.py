"""A model's plain weights as a safetensors file: dense, for whoever reads no .psc."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from psc_lightning.files import Place, write_atomic

try:
    from safetensors.torch import save
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("safetensors export needs safetensors: pip install safetensors") from error

__all__ = ["write_safetensors"]

_RESERVED = "__metadata__"  # a key of the format's header, and no tensor's name


def write_safetensors(tensors: Mapping[str, Tensor], path: Place, max_bytes: int = 2**31) -> None:
    """Write a plain state dict; the file loads strictly into the model's own class.

    Args:
        tensors: name → tensor; those that share memory are written each for itself.
        path: the file; one that exists is replaced only when the new one is complete.
        max_bytes: refuse, before taking memory, to write more: one tensor may have any number of names.

    Raises:
        ValueError: a name that the format has no room for, or more bytes than that.
        OSError: the folder is missing or not writable, or the disk is full; nothing is left behind.
    """
    if _RESERVED in tensors:
        raise ValueError(f"expected names that safetensors can hold, found a tensor {_RESERVED}: rename the module")
    if (size := sum(tensor.nbytes for tensor in tensors.values())) > max_bytes:
        raise ValueError(
            f"expected at most max_bytes = {max_bytes} bytes of tensors, each name for itself, found {size}: "
            "pass a larger max_bytes if you trust the file"
        )
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        # What shares memory is copied; all else is taken as it is.
        shared = tensor.untyped_storage().data_ptr() in seen
        apart[name] = tensor.clone() if shared else tensor.contiguous()
        seen.add(tensor.untyped_storage().data_ptr())
    write_atomic(path, save(apart))
