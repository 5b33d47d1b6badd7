"""What fills a slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Spec"]


@dataclass(frozen=True)
class Spec:
    """What fills a slot: a method's name, its options, and the callback that asked for it (for error messages)."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    owner: str = ""
