"""The .psc file: write, read, check. Needs torch, numpy and constriction; Lightning is not imported."""

from __future__ import annotations

from psc_lightning.artifact.errors import ArtifactError, NamelessError
from psc_lightning.artifact.file import (
    dense_bytes,
    inspect,
    is_part,
    load,
    load_into,
    load_stored,
    measure,
    save,
    to_bytes,
    verify,
)

__all__ = [
    "ArtifactError",
    "NamelessError",
    "dense_bytes",
    "inspect",
    "is_part",
    "load",
    "load_into",
    "load_stored",
    "measure",
    "save",
    "to_bytes",
    "verify",
]
