"""JSON that every reader takes: JSON has no NaN and no Infinity, but Python's `json` writes them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["json_text"]

Default = Callable[[Any], Any] | None


def json_text(value: Any, indent: int | None = 2, sort_keys: bool = False, default: Default = None) -> str:
    """A value as strict JSON; numbers that are not finite become null.

    Args:
        value: dictionaries, lists, tuples, strings, numbers, booleans, None.
        indent: spaces a level; None: all on one line.
        sort_keys: write the keys of dictionaries in their order.
        default: makes one of these of anything else.

    Raises:
        TypeError: something else is in it, and there is no `default`.

    >>> json_text({"loss": float("nan"), "bounds": (-float("inf"), 0.5)}, indent=None)
    '{"loss": null, "bounds": [null, 0.5]}'
    """
    return json.dumps(_finite(value), indent=indent, sort_keys=sort_keys, default=default, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_key(key): _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _key(key: Any) -> Any:
    """A float is no key of JSON, and NaN not even as a number that becomes text."""
    return str(key) if isinstance(key, float) else key
