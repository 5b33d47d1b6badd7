"""Files of version 1 that lie in `golden/`: what a reader must read for ever, and what the writer writes now.

    python tests/artifact/golden.py

writes a file for each network whose bytes are not those of its newest file there, beside the older ones, which stay:
a change of the writer is to be seen, and what was written before is to be read after it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from models import bag, fill
from torch import Tensor, nn

from psc_lightning.artifact import to_bytes
from psc_lightning.artifact.directory import DTYPES
from psc_lightning.slots.live import held
from psc_lightning.strict_json import json_text

FOLDER = Path(__file__).parent / "golden"
CENTROIDS = [
    -1.7744140625,
    -1.28125,
    -0.779296875,
    -0.278564453125,
    0.22216796875,
    0.720703125,
    1.228515625,
    1.7431640625,
]
MASK = ("magnitude", {"threshold": 0.25})


def numbers(*shape: int, step: int = 7919) -> Tensor:
    """Whole numbers over 64, without a source of random numbers: the same everywhere."""
    entries = torch.Size(shape).numel()
    return ((torch.arange(entries) * step % 257 - 128) / 64).reshape(shape)


def network(**slots: str | tuple[str, dict[str, object]]) -> nn.Module:
    """A convolution behind these slots, BatchNorm, and a plain layer that shares its name's last part."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Linear(3, 2))
    for at, parameter in enumerate(model.parameters()):
        parameter.data.copy_(numbers(*parameter.shape, step=7919 + 2 * at))
    fill(model, ("0.weight",), **slots)
    tensor = held(model[0], "weight")
    assert tensor is not None
    for name, parameter in tensor.slots.named_parameters():
        if name.startswith("tying."):  # factors come from an SVD, which differs from machine to machine
            parameter.data.copy_(numbers(*parameter.shape))
        if name.endswith("centroids"):  # the file is about how they are written, not where a clustering puts them
            parameter.data.copy_(torch.tensor([CENTROIDS]))
    tensor.slots.stale = True
    tensor.show_if_stale(model[0].weight)
    return model


def every_type() -> nn.Module:
    """Leftovers of every type, an empty one, a single number, and a tensor under two names."""
    tensors = {f"of_{str(dtype)[6:]}": (numbers(3, 5) * 64).to(dtype) for dtype in DTYPES[:10]}  # complex came later
    tensors["again"] = tensors["of_float32"]
    return bag({**tensors, "none": torch.zeros(0, 3), "one": torch.tensor(7)})


def noise(number: int, size: int) -> Tensor:
    """Symbols that no coding makes shorter, from SHA-256."""
    blocks = b"".join(hashlib.sha256(bytes([size - 1, i & 255, i >> 8])).digest() for i in range(-(-number // 32)))
    return torch.tensor(list(blocks[:number]), dtype=torch.uint8) & (size - 1)


#: these are one array where they are written as float16
HALVES = {"a": torch.float32, "b": torch.float16, "c": torch.float32}

NETWORKS = {
    "plain": lambda: bag(
        {"fc.weight": torch.tensor([[1.0, -2.5]]), "fc.bias": torch.tensor([0.5]), "n": torch.tensor(7)}
    ),
    "every_type": every_type,
    "halves": lambda: bag({f"{name}.bias": numbers(5).to(dtype) for name, dtype in HALVES.items()}),
    "noise": lambda: bag(
        {
            "bits": noise(65_537, 2) > 0,
            "threes": noise(21_847, 8) + 3,
            "nibbles": noise(16_384, 16),
            "bytes": noise(8193, 256),
            "few": noise(8191, 256),
        }
    ),
    "rare": lambda: bag({"ones": noise(1 << 19, 256) < 4, "zeros": noise(1 << 16, 256) > 0}),
    "none": lambda: network(mask=MASK),
    "float16": lambda: network(levels="float16"),
    "bfloat16": lambda: network(levels="bfloat16", mask=MASK),
    "uniform": lambda: network(levels=("uniform", {"bits": 4, "group": 50})),
    "one_bit": lambda: network(levels=("uniform", {"bits": 1})),
    "binary": lambda: network(levels="binary", mask=MASK),
    "binary_01": lambda: network(levels=("binary", {"form": "01", "group": "tensor"})),
    "ternary": lambda: network(levels="ternary"),
    "ttq": lambda: network(levels=("ttq", {"group": 50}), mask=MASK),
    "log": lambda: network(levels=("log", {"bits": 4, "root": 2})),
    "codebook": lambda: network(levels=("codebook", {"k": 8})),
    "log8": lambda: network(levels=("binary", {"scales": "log8"}), mask=MASK),
    "float32": lambda: network(levels=("uniform", {"bits": 3, "scales": "float32"})),
    "cross_channel": lambda: network(tying=("cross_channel", {"groups": 2}), levels="uniform"),
    "row": lambda: network(tying="row", levels="uniform", mask=MASK),
    "column": lambda: network(tying=("column", {"block": 3}), levels="ternary"),
    "separable": lambda: network(tying=("separable", {"rank": 2}), levels="uniform"),
    "low_rank": lambda: network(tying=("low_rank", {"rank": 2}), mask=MASK, levels="binary"),
}


#: how a network is written, where it is not the default
OPTIONS: dict[str, dict[str, Any]] = {"halves": {"leftovers": "float16"}}


def generations(name: str) -> list[Path]:
    """The files of a network, oldest first."""
    return sorted(FOLDER.glob(f"{name}.[0-9].psc"))


def digests(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Type, shape and SHA-256 of the entries of each tensor."""
    found = {}
    for name, tensor in tensors.items():
        entries = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""
        found[name] = f"{str(tensor.dtype)[6:]} {list(tensor.shape)} {hashlib.sha256(entries).hexdigest()}"
    return found


def main() -> None:
    """Add what is new."""
    FOLDER.mkdir(exist_ok=True)
    for name, build in NETWORKS.items():
        model = build()
        data, before = to_bytes(model, **OPTIONS.get(name, {}))[0], generations(name)
        if not before or before[-1].read_bytes() != data:
            path = FOLDER / f"{name}.{len(before)}.psc"
            path.write_bytes(data)
            # What the model holds, not what the reader makes of the file.
            path.with_suffix(".json").write_text(json_text(digests(model.state_dict()), indent=1) + "\n")
            print(path.name, len(data))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
