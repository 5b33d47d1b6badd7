"""What people look at: plots of a run (tables are the `Report`'s own)."""

from __future__ import annotations

from psc_lightning.report.plots import Curve, draw

__all__ = ["Curve", "draw"]
