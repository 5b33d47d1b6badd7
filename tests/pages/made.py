"""Run folders as a run leaves them, without the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def run(
    folder: Path,
    *overrides: str,
    size: Any = 1000,
    accuracy: Any = 0.9,
    dense: Any = 0.95,
    status: str = "completed",
    layers: int = 2,
    metric: str = "accuracy",
    **record: Any,
) -> Path:
    """Write run.json, and report.json unless `size` is None."""
    folder.mkdir(parents=True)
    seeds = [int(one.removeprefix("seed=")) for one in overrides if one.startswith("seed=")]
    known = {
        "status": status,
        "overrides": [*overrides],
        "command": "train.py -m compression=binary",
        "seed": (seeds or [0])[0],
    }
    (folder / "run.json").write_text(json.dumps(known | record))
    if size is not None:
        tensors = [
            {
                "name": f"net.layers.{index}.weight",
                "layer_type": "Linear",
                "shape": [16, 16],
                "core_shape": [16, 16],
                "method": "magnitude+binary",
                "dense_bytes": 1024,
                "stored_bytes": 32 + index % 5,
                "sparsity": 0.25,
                "levels": 2,
            }
            for index in range(layers)
        ]
        report = {"dense_bytes": 10_000, "file_bytes": size, "compression_ratio": 10_000 / size, "tensors": tensors}
        report |= {"entropy_bytes": size, "overhead_bytes": 50, "notes": [], "batchnorm_batches": None, "sha256": None}
        stages = {"dense": dense, "one_shot": 0.5, "compressed": accuracy}
        report["metrics"] = {stage: {metric: value} for stage, value in stages.items()}
        (folder / "report.json").write_text(json.dumps(report))
    return folder
