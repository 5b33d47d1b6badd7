"""Errors a user can mend: shown as one line with the key and what it allows, never as a traceback."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from torch import Tensor

from psc_lightning.callbacks.presets import readers
from psc_lightning.words import hint

__all__ = ["UsageError", "check_finite", "explain", "one_line"]


class UsageError(ValueError):
    """A setting or an input file is wrong; the message says which, what was found, and what to do."""


@contextmanager
def explain(key: str) -> Iterator[None]:
    """Turn what a setting's reader raises into a `UsageError` that starts with the setting's key."""
    try:
        yield
    except UsageError:
        raise
    except InstantiationException as error:
        raise UsageError(f"{key}: {error.__cause__ or error}") from error
    except (ValueError, TypeError, ImportError, OmegaConfBaseException) as error:
        raise UsageError(f"{key}: {error}") from error


def one_line(error: BaseException) -> str | None:
    """Return the line to show for a mendable error, None for one that deserves its traceback.

    >>> one_line(UsageError("trainer.devices:\\n  must be 1"))
    'error: trainer.devices: must be 1'
    >>> one_line(KeyError("x")) is None
    True
    """
    parts: list[str] = []
    unopened = error if isinstance(error, OSError) else error.__cause__  # of what logging says of a log file
    if isinstance(error, UsageError) or (isinstance(error, ValueError) and raised_in(error, "psc_lightning")):
        parts = [str(error)]
    elif isinstance(error, ValueError) and raised_in(error, "hydra"):  # of an override, which it does not name
        parts = [str(error), "in", *sys.argv[1:]]
    elif isinstance(unopened, OSError) and unopened.filename is not None:
        parts = [f"{unopened.filename}: {unopened.strerror}"]
    elif isinstance(error, HydraException | OmegaConfBaseException):
        cause = error.__cause__ or error
        parts = [str(error).partition("Config search path:")[0]]
        if cause is not error and isinstance(cause, OmegaConfBaseException):
            parts.append(str(cause))
        if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
            parts.append(f"keys there: {', '.join(sorted(map(str, cause.parent_node))) or 'none'}")
            meant = hint(str(cause.key), dotted(OmegaConf.to_container(cause.parent_node)))
            of_another = str(cause.full_key).startswith("compression.")
            parts[-1] += meant or (readers(str(cause.key)) if of_another else "")
        elif isinstance(cause, MissingConfigException) and cause.options and cause.missing_cfg_file:
            parts[0] += hint(cause.missing_cfg_file.rpartition("/")[2], cause.options)
        elif isinstance(cause, OverrideParseException):
            key, _, value = str(cause.override).partition("=")
            parts.append(
                f"in {cause.override}: quote a value with signs in it, within the shell's quotes: \"{key}='{value}'\""
            )
    if not parts:
        return None
    text = " ".join(" ".join(parts).split())
    text = re.sub(r" object_type=\w+| full_key: hydra\.\S+|\w+ raised while resolving interpolation: ", "", text)
    return f"error: {text}"


def dotted(node: Any, path: str = "") -> list[str]:
    """Return the keys of a plain configuration at all depths, the higher ones first.

    >>> dotted({"a": {"b": 1}, "c": 2})
    ['a', 'c', 'a.b']
    """
    here = {f"{path}{key}": value for key, value in node.items()} if isinstance(node, dict) else {}
    return [*here, *(name for key, value in here.items() for name in dotted(value, f"{key}."))]


def raised_in(error: BaseException, package: str) -> bool:
    """Whether the package itself raised it: the messages of ours are written for users."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith(f"{package}.")


def check_finite(state: Mapping[str, Tensor], what: str, key: str) -> None:
    """Raise for NaN and infinity."""
    broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        hint = f"; a lower {key} may help" if key else ""
        raise UsageError(f"{what}: NaN or infinity in {', '.join(broken[:3])}{' and more' * (len(broken) > 3)}{hint}")
