"""A model as ONNX: packed weights, integers where inputs are rounded, factors as layers of their own."""

from __future__ import annotations

from psc_lightning.export.onnx.exporter import export_onnx, export_stored

__all__ = ["export_onnx", "export_stored"]
