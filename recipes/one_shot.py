"""Compress any torch model without training.

python recipes/one_shot.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import psc_lightning


def main() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.Sequential(nn.Linear(16, 64), layer, nn.Flatten(), nn.Linear(64 * 8, 10))
    x = torch.randn(32, 8, 16)
    before = model.eval()(x)

    report = psc_lightning.compress(model, "float", threshold=0.3, bits=6)
    print(report)
    print(f"mean change of an output: {(model(x) - before).abs().mean().item():.4f}")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.psc")
        psc_lightning.save(model, path)
        after = model(x)
        psc_lightning.detach(model)  # bakes the compressed weights into the plain model
        assert torch.equal(model(x), after)
        psc_lightning.load_into(model, path)
        assert torch.equal(model(x), after)

    # Labels need batches and a loss: here the mask keeps the weights that matter most to it.
    batches = [(torch.randn(32, 8, 16), torch.randint(0, 10, (32,))) for _ in range(4)]
    report = psc_lightning.compress(
        model, "mask", threshold=0.8, batches=batches, loss=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])
    )
    print(f"mask: {report.dense_bytes:,} -> {report.file_bytes:,} bytes, {report.compression_ratio:.1f}x smaller")


if __name__ == "__main__":
    main()
