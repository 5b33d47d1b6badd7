"""What may be given: checks of arguments, and the options of a method, read from the signature of its class.

A method says its options once, as arguments with a default and, in `Annotated`, a check of the range:

    def __init__(self, shape: Shape, bits: Annotated[int, partial(whole, low=1, high=8)] = 8) -> None: …

Callbacks, configs, errors and tests read them from there.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, get_type_hints

from psc_lightning.words import hint

__all__ = [
    "Option",
    "checked",
    "grouping",
    "one_of",
    "options_of",
    "positive",
    "share",
    "share_or_whole",
    "whole",
]


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> Any:
    """The value, if it is allowed; else a ValueError that names the argument and what is."""
    allowed = list(allowed)
    if not any(type(value) is type(item) and value == item for item in allowed):
        raise ValueError(
            f"{name}: expected one of {', '.join(map(str, allowed))}, found {value!r}{hint(str(value), map(str, allowed))}"
        )
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


def grouping(name: str, value: Any) -> str | int:
    """`tensor`, `channel` or a whole number ≥ 1; else a ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    if value not in ("tensor", "channel"):
        raise ValueError(f"{name}: expected tensor, channel or a whole number from 1 up, found {value!r}")
    return str(value)


def share(name: str, value: Any) -> float:
    """A number 0 ≤ x < 1; else a ValueError that names the argument."""
    if not positive(name, value) < 1:
        raise ValueError(f"{name}: expected a share 0 ≤ {name} < 1, found {value!r}")
    return float(value)


def share_or_whole(name: str, value: Any) -> int | float:
    """A share 0 < x < 1, or a whole number from 1 up; else a ValueError that names the argument."""
    if not isinstance(value, float):
        return whole(name, value, 1)
    if not 0 < value < 1:
        raise ValueError(f"{name}: expected a whole number from 1 up or a share in (0, 1), found {value!r}")
    return value


# --------------------------------------------------------------------------------------------- options of methods


class Option(NamedTuple):
    """What is taken where an option is not given, and what checks it."""

    default: Any
    check: Callable[[str, Any], Any] | None


def options_of(method: type) -> dict[str, Option]:
    """The options of a method: the arguments of its `build`, or of its `__init__`, after the shape.

    Arguments that are handed on (``**options``) are those of the class it derives from.

    >>> from psc_lightning.levels import LEVELS
    >>> {name: option.default for name, option in options_of(LEVELS["log"]).items()}
    {'bits': 8, 'group': 'channel', 'root': 1}
    """
    found: dict[str, Option] = {}
    for base in method.__mro__:
        builder = base.__dict__.get("build", base.__dict__.get("__init__"))
        if builder is None:
            continue
        function = builder.__func__ if isinstance(builder, classmethod) else builder
        hints = get_type_hints(function, include_extras=True)
        parameters = list(inspect.signature(function).parameters.values())[2:]  # self or cls, and the shape
        for parameter in parameters:
            if parameter.kind is not parameter.VAR_KEYWORD:
                checks = [check for check in getattr(hints[parameter.name], "__metadata__", ()) if callable(check)]
                found.setdefault(parameter.name, Option(parameter.default, checks[0] if checks else None))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def checked(name: str, method: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given (None: was not) to a method of this name, in range.

    Raises:
        ValueError: the method does not read an option, or its value is out of range; it is named.
    """
    options = options_of(method)
    for key, value in given.items():
        if value is not None and key not in options:
            raise ValueError(f"{key}: {name!r} does not read it; it takes {', '.join(options) or 'no options'}")
    chosen = {key: value for key, value in given.items() if value is not None}
    for key, value in chosen.items():
        check = options[key].check
        chosen[key] = value if check is None else check(key, value)
    return chosen
