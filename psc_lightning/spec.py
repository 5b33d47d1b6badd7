"""What fills a slot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Spec"]


@dataclass(frozen=True)
class Spec:
    """What fills a slot: a method's name, its options, and the callback that asked for it (for error messages).

    With levels may come `activations`: bits of the inputs of the layers that hold the tensor.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    owner: str = ""
    activations: int | None = None

    @property
    def given(self) -> dict[str, Any]:
        """All that was asked for."""
        return {**self.options, **({"activations": self.activations} if self.activations else {})}
