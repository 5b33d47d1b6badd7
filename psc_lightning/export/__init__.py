"""A compressed model for other runtimes: a dictionary of formats, a module each.

A new format is one module with one function, and one line here: `psc export` then has it, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

__all__ = ["EXPORTERS", "Exporter"]


@dataclass(frozen=True)
class Exporter:
    """One format, imported on first use: its module needs the packages of the extra of the format's name.

    Args:
        what: the file that it writes, as help and messages call it.
        home: ``module:function`` within this folder. The function takes ``(tensors, path)``, a plain state dict; one that
            writes a graph ``(model, stored, path, example)``, and of axes and names what `export_stored` takes. It
            raises a ValueError for what the format, or the model's code, does not allow.
        graph: whether it writes the model's graph, for which it needs the model's code and an example of its inputs.
    """

    what: str
    home: str
    graph: bool = False

    @property
    def write(self) -> Callable[..., None]:
        """The function. Raises ModuleNotFoundError, which says what to install, where a package is missing."""
        module, _, function = self.home.partition(":")
        found: Callable[..., None] = getattr(import_module(f"{__name__}.{module}"), function)
        return found


EXPORTERS = {
    "onnx": Exporter("its graph and packed weights as ONNX", "onnx:export_stored", graph=True),
    "safetensors": Exporter("its dense weights as safetensors", "safetensors:write_safetensors"),
}
