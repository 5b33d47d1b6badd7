"""The one error a reader of .psc files has to know."""

from __future__ import annotations

from psc_lightning.terminal import printable

__all__ = ["ADVICE", "ArtifactError", "NamelessError"]

#: what ends a message about damage
ADVICE = "the file is damaged or was not written by psc_lightning; get a fresh copy, or save the model again"


class ArtifactError(ValueError):
    """A .psc file, or the model it should go into, is not what it should be; the message says what to do.

    Names in it are a stranger's: what would move a cursor comes as an escape.

    Args:
        message: what was expected, what was found, what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class NamelessError(ArtifactError):
    """The file is undamaged as far as its checksum and sections tell, but only the model it was saved from can read on."""
