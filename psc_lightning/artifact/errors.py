"""The one error a reader of .psc files has to know."""

from __future__ import annotations

__all__ = ["ArtifactError"]


class ArtifactError(ValueError):
    """A .psc file, or the model it should go into, is not what it should be; the message says what to do."""
