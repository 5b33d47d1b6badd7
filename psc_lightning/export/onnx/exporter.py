"""A model to an ONNX file: the plain graph, its compressed weights as packed constants."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

try:
    from onnx import GraphProto, ModelProto, checker
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("ONNX export needs onnx and onnxscript: pip install onnx onnxscript") from error

from psc_lightning.activations import Ranges, activations
from psc_lightning.artifact.model.snapshots import snapshots_of
from psc_lightning.copies import copied
from psc_lightning.export.onnx.axes import Shapes, check_open, open_axes, set_names, shapes_of, with_lengths
from psc_lightning.export.onnx.channels import remove_dead_channels
from psc_lightning.export.onnx.graph import Graph, reads
from psc_lightning.export.onnx.integers import run_in_integers
from psc_lightning.export.onnx.separable import split_convolutions
from psc_lightning.export.onnx.weights import write_weight
from psc_lightning.files import Place, write_atomic
from psc_lightning.slots.layout import Layout
from psc_lightning.slots.live import detach
from psc_lightning.slots.stored import Stored

__all__ = ["export_onnx", "export_stored"]

Example = Tensor | tuple[Any, ...]

_WEIGHTS = ("packed", "dequantize")


def export_onnx(
    model: nn.Module,
    path: Place,
    example: Example,
    weights: str = "packed",
    dynamic_batch: bool = False,
    dynamic_shapes: Shapes | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> None:
    """Write a model as ONNX, of standard operators only; its weights are rebuilt exactly when a session starts.

    The file is about as small as the bit-packed weights; a runtime that computes constant expressions before it runs
    (onnxruntime does by default) then works at the speed of the dense model. Convolutions under `separable` become
    two; channels that are zero are left out where nothing branches. The model itself stays as it is.

    Where the model rounds the inputs of layers (`ActivationQuantization`), these layers compute in 8
    bit integers: between QuantizeLinear and DequantizeLinear, BatchNorm folded. A convolution's result is rounded once
    more than in training then, to one of 256 numbers. The ranges are the live model's: export it before `detach`; a .psc
    file holds weights only. What cannot run in integers is named in a warning, and so is a choice of bits that some
    processors compute wrongly.

    Args:
        model: any module, with or without compressed weights; it is exported as in eval, on the CPU.
        path: the file to write, as for `psc_lightning.save`; an older one is replaced only when the new one is complete.
        example: an input (several: a tuple), whose shapes and types become the graph's.
        weights: `packed`; or `dequantize`: DequantizeLinear where weights are 8 bit multiples of a scale, for runtimes
            that look for it. Onnxruntime computes that one at every run, not at the start. It, and others, may multiply
            such matrices with 8 bit activations (an error of about 5e-3); 1.32 is exact for what is written here, 1.23
            takes the file with ORT_DISABLE_ALL only.
        dynamic_batch: leave the length of the first axis open, which all inputs then share; the model's code must not
            depend on it. The same as ``dynamic_shapes={"*": {0: "batch"}}``.
        dynamic_shapes: other axes to leave open, by input, each with a name for its length: ``{"ids": {1: "length"}}``. An
            input is named as in `input_names` or as `forward` names it, or by a glob (``"*"``: all). Lengths of one name
            are equal.
        input_names, output_names: what the graph's inputs and outputs are called, in their order. None: as torch does.

    Raises:
        ModuleNotFoundError: onnx or onnxscript is missing; the message says how to install them.
        ValueError: a wrong argument, a length that the model's code fixes, or code that torch cannot export.
        OSError: the folder is missing or not writable, or the disk is full; nothing is left behind.
    """
    plain = copied(model)
    with torch.no_grad():
        snapshots = {id(form): (name, form, latent) for name, (form, latent) in snapshots_of(plain).items()}
        stored = {name: form.stored(latent) for name, form, latent in snapshots.values()}
    rounding = {f"{name}.weight".removeprefix("."): found.ranges() for name, _, found in activations(plain)}
    ranges = {name: one for name, one in rounding.items() if one is not None}
    opened = (dynamic_batch, dynamic_shapes, input_names, output_names)
    export_stored(detach(plain), stored, path, example, weights, *opened, ranges)


def export_stored(
    plain: nn.Module,
    stored: Mapping[str, Stored],
    path: Place,
    example: Example,
    weights: str = "packed",
    dynamic_batch: bool = False,
    dynamic_shapes: Shapes | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    ranges: Mapping[str, Ranges] | None = None,
) -> None:
    """Write a plain model whose named weights are also known as what a file stores; see `export_onnx`.

    Args:
        plain: the model, which is put into eval on the CPU.
        stored: name → how the weight is stored.
        path: the file to write.
        example: an input, or a tuple of several.
        weights: `packed` or `dequantize`.
        dynamic_batch, dynamic_shapes: axes of inputs to leave open.
        input_names, output_names: what to call inputs and outputs.
        ranges: name of a weight → what the inputs of its layers are rounded to.
    """
    if weights not in _WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(_WEIGHTS)}, got {weights!r}")
    if isinstance(example, Tensor):
        example = (example,)
    # A tied weight has several names, and the exporter chooses one.
    tensors = {id(plain.get_parameter(name)): held for name, held in stored.items()}
    rounded = {id(plain.get_parameter(name)): one for name, one in (ranges or {}).items()}
    for name in ranges or ():  # of a weight that no slot makes
        weight = plain.get_parameter(name).detach()
        tensors.setdefault(id(plain.get_parameter(name)), Stored("plain", {"core": weight}, weight, Layout(), None))
    named = plain.named_parameters(remove_duplicate=False)
    held = {name: tensors[id(tensor)] for name, tensor in named if id(tensor) in tensors}
    opaque = {name for name in held if _is_float32(held[name])}
    axes = open_axes(plain, example, dynamic_shapes, dynamic_batch, input_names)
    model, names = _trace(plain.cpu().eval(), with_lengths(example, axes), opaque, axes, input_names, output_names)
    held = {value: held[name] for value, name in names.items()}
    check_open(model.graph, axes, dynamic_batch)
    parameters = {value: id(plain.get_parameter(name)) for value, name in names.items()}
    seen = {value: rounded[parameter] for value, parameter in parameters.items() if parameter in rounded}
    graph = Graph(_names(model.graph))
    held = remove_dead_channels(model.graph, graph, held, seen)
    model.graph.ClearField("value_info")
    held = run_in_integers(model.graph, graph, held, seen)
    held = split_convolutions(model.graph, graph, held)
    for name, one in held.items():
        graph.rename(write_weight(graph, one, dequantize=weights == "dequantize"), name)
    model.graph.initializer.extend(graph.initializers)
    nodes = [*graph.nodes, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    checker.check_model(model)
    write_atomic(path, model.SerializeToString())


def _is_float32(held: Stored) -> bool:
    """Whether no number of the cores is lost in float32, the type that packing knows."""
    return all(torch.equal(core.float().to(core.dtype), core) for core in held.cores.values())


def _names(graph: GraphProto) -> frozenset[str]:
    """What the values of a graph are called."""
    values = [value.name for value in (*graph.input, *graph.output, *graph.initializer)]
    return frozenset([*values, *(name for node in graph.node for name in (*reads(node), *node.output))])


def _trace(
    plain: nn.Module,
    example: tuple[Any, ...],
    opaque: set[str],
    axes: list[dict[int, str]],
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> tuple[ModelProto, dict[str, str]]:
    """The optimized graph of a model, without the weights named in `opaque`; value in the graph → name of such a weight.

    While it is optimized they are inputs, the last ones: no optimizer touches these.
    """
    with _quiet(), torch.no_grad(), _refused():
        program = torch.onnx.export(
            plain,
            example,
            dynamo=True,
            dynamic_shapes=shapes_of(plain, example, axes),
            optimize=False,
            external_data=False,
            verbose=False,
        )
        assert program is not None
        inner = program.model.graph
        set_names(inner, "input_names", inner.inputs, input_names)
        set_names(inner, "output_names", inner.outputs, output_names)
        others, names = len(inner.inputs), [name for name in inner.initializers if name in opaque]
        for name in names:
            value = inner.initializers.pop(name)
            value.const_value = None
            inner.inputs.append(value)
        program.optimize()
    model: ModelProto = program.model_proto
    model.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    for node in model.graph.node:
        for field in ("metadata_props", "doc_string", "name"):
            node.ClearField(field)
    for value in (*model.graph.input, *model.graph.output):
        value.ClearField("metadata_props")
    # An input of the user's may have had a weight's name: the weight then has another one.
    values = [value.name for value in model.graph.input[others:]]
    del model.graph.input[others:]
    return model, dict(zip(values, names, strict=True))


@contextmanager
def _refused() -> Iterator[None]:
    """Say in one line what torch says in hundreds."""
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        why = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"model: torch cannot export this model's code: {why}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what the exporter says of its own uses of torch, torchvision's operators, constants it cannot fold."""
    names = ("torch.onnx._internal.exporter._registration", "onnxscript.optimizer._constant_folding")
    levels = {log: log.level for log in map(logging.getLogger, names)}
    for log in levels:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated")
            warnings.filterwarnings("ignore", r"The tensor attributes? .*_flat_weights.* assigned during export")
            warnings.filterwarnings("ignore", r"# The axis name: \w+ will not be used")  # again: inputs share it
            warnings.filterwarnings("ignore", "_check_is_size will be removed", FutureWarning)
            yield
    finally:
        for log, level in levels.items():
            log.setLevel(level)
