"""The tensors of a checkpoint, whoever wrote it; nothing is unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["bare", "matched", "plain_name", "read_content", "read_tensors", "tensors_of"]

PREFIXES = ("module.", "model.", "net.")


def read_content(path: Path) -> Any:
    """What a file of torch's or of safetensors holds: tensors and primitives.

    Args:
        path: the file; one that ends in ``.safetensors`` is read as such (needs safetensors).

    Raises:
        ValueError: no such file, damaged, or more than that.
    """
    if not path.is_file():
        raise ValueError("no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as error:
        raise ValueError("reading it needs safetensors: pip install safetensors") from error
    except Exception as error:  # both raise whatever the bytes make them stumble over
        raise ValueError(
            "damaged, or more than tensors (it is read with weights_only=True); save a state_dict()"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a plain state dict, a Lightning checkpoint, a dict with a `state_dict` in it, or a safetensors file.

    Raises:
        ValueError: as `read_content`, or not names and tensors.
    """
    return tensors_of(read_content(path))


def tensors_of(content: Any) -> dict[str, Tensor]:
    """The state dict in what was read, or that it is.

    Raises:
        ValueError: there is none.
    """
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"holds {type(content).__name__}, not a state dict (names and tensors)")
    return dict(content)


def plain_name(name: str) -> str:
    """A name without what torch.compile puts into it.

    >>> plain_name("net._orig_mod.0.weight")
    'net.0.weight'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def bare(state: Mapping[str, Any]) -> list[str]:
    """Return the names without what wrappers put in front of all of them.

    >>> bare({"module.net.conv.weight": 0, "module.net.conv.bias": 0})
    ['conv.weight', 'conv.bias']
    """
    names = list(state)
    while prefix := next((p for p in PREFIXES if names and all(name.startswith(p) for name in names)), None):
        names = [name.removeprefix(prefix) for name in names]
    return names


def matched(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under a model's names, whatever wrappers put in front of either.

    BatchNorm's `num_batches_tracked`, which old checkpoints lack, is the model's.

    Raises:
        ValueError: another architecture (the keys that differ are listed), or a value that is not finite.
    """
    by_name = dict(zip(bare(found), found.values(), strict=True))
    state: dict[str, Tensor] = {}
    wrong: list[str] = []
    for name, plain in zip(wanted, bare(wanted), strict=True):
        value = by_name.pop(plain, None)
        if value is None and plain.endswith("num_batches_tracked"):
            value = wanted[name]
        if value is None:
            wrong.append(f"missing {plain}")
        elif value.shape != wanted[name].shape:
            wrong.append(f"{plain} is {tuple(value.shape)}, not {tuple(wanted[name].shape)}")
        else:
            state[name] = value
    wrong += [f"unexpected {plain}" for plain in by_name]
    if wrong:
        more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise ValueError(
            f"another architecture than the model: {'; '.join(wrong[:6])}{more}; give a checkpoint of this model, or choose "
            "the model that it is of"
        )
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"NaN or infinity in {', '.join(broken)}; give one from before training diverged")
    return state
