"""The ways a stream of symbols may be coded: one file each, one line below each.

The number of a coding is written to files: it never changes its meaning, and a new coding takes the next free number.
"""

from __future__ import annotations

from psc_lightning.artifact.codings.adaptive import Adaptive
from psc_lightning.artifact.codings.coding import Coding, Grid, Plane, Proposal, full
from psc_lightning.artifact.codings.diagonals import Diagonals
from psc_lightning.artifact.codings.gaps import Gaps
from psc_lightning.artifact.codings.lines import Lines
from psc_lightning.artifact.codings.occupied import Occupied
from psc_lightning.artifact.codings.plain import Plain
from psc_lightning.artifact.codings.split import Split
from psc_lightning.artifact.codings.uniform import Uniform

__all__ = ["CODINGS", "Coding", "Grid", "Occupied", "Plane", "Proposal", "full"]

CODINGS: tuple[Coding, ...] = (
    Uniform(),
    Adaptive(),
    Lines(),
    Split(lambda: CODINGS),
    Diagonals(),
    Plain(),
    Occupied(lambda: CODINGS),
    Gaps(),
)
