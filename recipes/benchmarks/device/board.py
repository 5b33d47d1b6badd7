"""Where the rows of a section go: to a file after each, with what went wrong, until the section's time is over."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from psc_lightning.strict_json import json_text

__all__ = ["Board", "Row"]

Row = dict[str, Any]


@dataclass
class Board:
    """One section's rows.

    Args:
        path: the JSON file.
        device: `cuda` or `cpu`.
        small: small networks and few steps, to try the script.
        end: the `time.monotonic` after which no other row is started.
        all: whether to measure all rows, not those alone that a few minutes are for.
    """

    path: Path
    device: str
    small: bool
    end: float
    all: bool = False
    rows: list[Row] = field(default_factory=list)

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self.end

    def row(self, name: str, fill: Callable[[Row], None]) -> Row:
        """Let `fill` write a row's cells; what it had written before an error counts."""
        row: Row = {"what": name}
        self.rows.append(row)
        start = time.monotonic()
        if self.late:
            row["error"] = "left out: the section's time is over"
        else:
            try:
                fill(row)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"
                row["traceback"] = traceback.format_exc()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        row["seconds"] = round(time.monotonic() - start, 2)
        print(
            {key: value for key, value in row.items() if key != "traceback" and not isinstance(value, dict)}, flush=True
        )
        self.path.write_text(json_text(self.rows, indent=1, default=str))
        return row
