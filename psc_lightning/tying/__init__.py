"""The first slot: which weights are one weight."""

from __future__ import annotations

from psc_lightning.tying.base import Tying
from psc_lightning.tying.column import ColumnSharing
from psc_lightning.tying.cross_channel import CrossChannelSharing
from psc_lightning.tying.low_rank import LowRank
from psc_lightning.tying.row import RowSharing
from psc_lightning.tying.separable import Separable

__all__ = ["TYINGS", "Tying"]

#: Name → method; also the allow-list for reading files.
TYINGS: dict[str, type[Tying]] = {
    "cross_channel": CrossChannelSharing,
    "row": RowSharing,
    "column": ColumnSharing,
    "separable": Separable,
    "low_rank": LowRank,
}
