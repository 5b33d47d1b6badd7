"""Checks of arguments: the value, or a ValueError that names the argument, what was expected and what was found."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

__all__ = ["grouping", "one_of", "positive", "whole"]


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> Any:
    """The value, if it is allowed; else a ValueError that names the argument and what is."""
    allowed = list(allowed)
    if not any(type(value) is type(item) and value == item for item in allowed):
        raise ValueError(f"{name}: expected one of {', '.join(map(str, allowed))}, found {value!r}")
    return value


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A whole number in a range; else a ValueError that names the argument."""
    bounds = f"a whole number from {low}" + (f" to {high}" if high is not None else " up")
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"{name}: expected {bounds}, found {value!r}")
    return value


def positive(name: str, value: Any) -> float:
    """A finite number ≥ 0; else a ValueError that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number ≥ 0, found {value!r}")
    return float(value)


def grouping(value: Any) -> str | int:
    """`tensor`, `channel` or a whole number ≥ 1; else a ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if value not in ("tensor", "channel"):
        raise ValueError(f"group: expected tensor, channel or a whole number from 1 up, found {value!r}")
    return str(value)
