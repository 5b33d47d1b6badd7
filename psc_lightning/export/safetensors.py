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


def write_safetensors(tensors: Mapping[str, Tensor], path: Place) -> None:
    """Write a plain state dict; the file loads strictly into the model's own class.

    Args:
        tensors: name → tensor; those that share memory are written each for itself.
        path: the file; one that exists is replaced only when the new one is complete.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; nothing is left behind.
    """
    write_atomic(path, save({name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}))
