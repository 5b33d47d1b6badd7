"""The `psc` command: look into a .psc file, check it, and turn it into other formats."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from psc_lightning.artifact import ArtifactError, NamelessError, inspect, load, load_into, load_stored
from psc_lightning.checkpoint import bare, read_tensors
from psc_lightning.export import EXPORTERS
from psc_lightning.report.difference import difference_dict, difference_table, differences
from psc_lightning.strict_json import json_text

__all__ = ["main"]

_DTYPES = ("float32", "float64", "int64", "int32", "bool")

_FACTORY = "PACKAGE.MODULE:FACTORY"
_FACTORY_HELP = "what makes the plain model, called without arguments"

_NAMED = 6  # tensors that a message names

_EXAMPLES = {
    "inspect": """\
  psc inspect model.psc              a table: each tensor's shape, zeros, levels, bytes
  psc inspect model.psc --json       the same as JSON, for other programs
""",
    "verify": """\
  psc verify model.psc && deploy     checksum, structure and every symbol
  psc verify model.psc --against last.ckpt    and bit for bit the weights of a checkpoint
  psc verify model.psc --sha256 8c4f…         and the file that was meant
  psc verify model.psc --model package.module:factory    and that it goes into this model
""",
    "diff": """\
  psc diff old.psc new.psc           which tensors differ, how much, in how many bytes
""",
    "export": """\
  psc export runs/RUN --onnx model.onnx --example 1,1,8,8
  psc export model.psc --onnx model.onnx --model package.module:factory --example 1,3,32,32 --dynamic-batch
  psc export model.psc --safetensors model.safetensors
""",
}

_STATUS = """\

exit status: 0 good, 1 the file is bad, 2 wrong usage
             diff: 0 equal tensors, 1 different ones or a bad file; verify: 1 also for another checkpoint or SHA-256
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 good, 1 the file is bad or differs, 2 wrong usage.

    Args:
        arguments: instead of those of the process.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options) or 0)
    except NamelessError as error:  # the file is good, but this command needs more than is in it
        print(f"psc {options.command}: {options.file}: {_line(error)}", file=sys.stderr)
        return 2
    except (ArtifactError, OSError) as error:
        print(f"psc {options.command}: {options.file}: {_line(error)}", file=sys.stderr)
        return 1
    except (_UsageError, ModuleNotFoundError) as error:
        print(f"psc {options.command}: {_line(error)}", file=sys.stderr)
        return 2


class _UsageError(Exception):
    """Arguments that do not go together."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="psc",
        description="Look into .psc files (compressed models written by psc_lightning) and check them.",
        epilog="examples:\n" + "".join(_EXAMPLES.values()) + _STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, what: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
            epilog=f"examples:\n{_EXAMPLES[name]}{_STATUS}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    one = command("inspect", "list the tensors of a file, with shapes and bytes")
    one.add_argument("file", metavar="FILE", help="a .psc file")
    one.add_argument("--json", action="store_true", help="print JSON with the keys of report.json")
    one.add_argument("--all", action="store_true", help="a row for each plain tensor too, where there are many")
    one.set_defaults(run=_inspect)

    one = command("verify", "check a file from end to end; prints nothing if it is good")
    one.add_argument("file", metavar="FILE", help="a .psc file")
    one.add_argument(
        "--against",
        metavar="CHECKPOINT",
        type=Path,
        help="its tensors must be these: a state dict, a Lightning checkpoint, or safetensors",
    )
    one.add_argument("--sha256", metavar="HEX", type=_digest, help="the file's SHA-256, as `psc inspect` prints it")
    one.add_argument("--model", metavar=_FACTORY, help=f"{_FACTORY_HELP}: the file must go into it")
    one.set_defaults(run=_verify)

    one = command("diff", "compare the tensors of two files; exit status 1 if any differ")
    one.add_argument("file", metavar="A", help="a .psc file")
    one.add_argument("other", metavar="B", help="another")
    one.add_argument("--json", action="store_true", help="print JSON: all tensors, with the bytes in each file")
    one.add_argument("--all", action="store_true", help="a row for each equal tensor too")
    one.set_defaults(run=_diff)

    one = command("export", f"write a file's model in another format: {', '.join(EXPORTERS)}")
    one.add_argument("file", metavar="FILE", help="a .psc file, or the folder of a run, which knows its own model")
    for name, exporter in EXPORTERS.items():
        one.add_argument(f"--{name}", metavar="OUT", help=f"the file to write: {exporter.what}")
    one.add_argument("--model", metavar=_FACTORY, help=_FACTORY_HELP)
    one.add_argument(
        "--example",
        metavar="SHAPE",
        type=_example,
        action="append",
        help="an input: 1,3,32,32; 1,128:int64 where it is whole numbers; once for each input, in their order",
    )
    one.add_argument("--dynamic-batch", action="store_true", help="leave the first axis of all inputs of a graph open")
    one.set_defaults(run=_export)
    return parser


def _example(text: str) -> tuple[tuple[int, ...], str]:
    """Shape and type of an input: ``1,3,32,32`` of float32, ``1,128:int64``."""
    shape, _, dtype = text.partition(":")
    dtype = dtype or "float32"
    if not all(axis.isdecimal() for axis in shape.split(",")) or dtype not in _DTYPES:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers as in 1,3,32,32 or 1,128:int64 (one of {', '.join(_DTYPES)}), found {text!r}"
        )
    return tuple(map(int, shape.split(","))), dtype


def _digest(text: str) -> str:
    """A SHA-256 in hexadecimal digits."""
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"expected 64 hexadecimal digits, found {text!r}")
    return text.lower()


def _inspect(options: argparse.Namespace) -> None:
    report = inspect(options.file)
    if options.json:
        print(json_text(report.to_dict()))
    else:
        print(report.table(all_tensors=options.all), f"sha256 {report.sha256}", sep="\n")


def _verify(options: argparse.Namespace) -> None:
    if options.sha256:
        found = hashlib.sha256(Path(options.file).read_bytes()).hexdigest()
        if found != options.sha256:
            raise ArtifactError(f"expected SHA-256 {options.sha256}, found {found}: another file, or a damaged one")
    try:
        tensors = _tensors(options.file, options.model)
    except NamelessError:
        if options.against:
            raise
        print(
            f"psc verify: {options.file}: checksum and sections are good; names and shapes are not in this file, so that its "
            f"symbols can be checked with its model only: give --model {_FACTORY}",
            file=sys.stderr,
        )
        return
    if not options.against:
        return
    try:
        checkpoint = read_tensors(options.against)
    except ValueError as error:
        raise ArtifactError(f"--against {options.against}: {error}") from error
    # The file's own names, less what wrappers put in front of all of them, as in the checkpoint.
    held, wanted = (dict(zip(bare(state), state.values())) for state in (tensors, checkpoint))
    unequal = [one.text("the file", "the checkpoint") for one in differences(held, wanted) if not one.equal]
    if unequal:
        more = f"; and {len(unequal) - _NAMED} more" * (len(unequal) > _NAMED)
        raise ArtifactError(
            f"differs from {options.against} in {len(unequal)} of {len(held)} tensors: {'; '.join(unequal[:_NAMED])}{more}"
        )


def _tensors(file: str, factory: str | None) -> dict[str, Any]:
    """The tensors of a file, read from end to end, by a model where one is named."""
    if factory is None:
        return load(file)
    model = _made(factory)
    load_into(model, file)
    return dict(model.state_dict())


def _diff(options: argparse.Namespace) -> int:
    paths = (options.file, options.other)
    contents = []
    for options.file in paths:  # an error names the file that was being read
        contents.append((load(options.file), inspect(options.file)))
    (first, one), (second, other) = contents
    found = differences(first, second)
    equal = all(difference.equal for difference in found)
    if options.json:
        print(json_text(difference_dict(found, (one, other))))
    else:
        print(difference_table(found, (one, other), paths, all_tensors=options.all))
    return int(not equal)


def _export(options: argparse.Namespace) -> None:
    Path(options.file).stat()  # where nothing is, the other arguments are not what is wrong
    folder = Path(options.file) if Path(options.file).is_dir() else None
    file = folder / "model.psc" if folder else Path(options.file)
    chosen = {name: out for name in EXPORTERS if (out := getattr(options, name))}
    if not chosen:
        raise _UsageError(f"nothing to write: give at least one of {', '.join(f'--{name} OUT' for name in EXPORTERS)}")
    if graphs := [name for name in chosen if EXPORTERS[name].graph]:
        if options.example is None:
            raise _UsageError(f"--{graphs[0]} needs --example, the shape of an input, as in --example 1,3,32,32")
        if (options.model is None) == (folder is None):
            raise _UsageError(f"a .psc file holds no graph: give --model {_FACTORY}, or a run's folder instead")
    writers = {name: EXPORTERS[name].write for name in chosen}  # where one lacks a package, none writes
    for name, out in chosen.items():
        if name not in graphs:
            writers[name](_tensors(str(file), options.model), out)
            continue
        model = _of_run(folder) if folder else _made(options.model)
        example = _example_of(model, file, options.example)
        stored = load_stored(file, model=model)
        try:
            writers[name](model, stored, out, example, dynamic_batch=options.dynamic_batch)
        except ValueError as error:
            raise _UsageError(str(error)) from error


def _example_of(model: Any, file: Path, inputs: Sequence[tuple[tuple[int, ...], str]]) -> tuple[Any, ...]:
    """Inputs of these shapes and types, which the model takes with the weights of the file."""
    import torch

    load_into(model, file)
    example = tuple(torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in inputs)
    try:
        with torch.no_grad():
            model.eval()(*example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise _UsageError(f"--example: the model does not take such an input: {error}") from error
    return example


def _made(name: str) -> Any:
    """The plain model that a factory gives."""
    module, _, factory = name.partition(":")
    sys.path.insert(0, "")  # as `python -m` does: a user's own module beside them
    try:
        return getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError, TypeError) as error:
        raise _UsageError(
            f"--model {name}: expected PACKAGE.MODULE:FACTORY, callable without arguments: {error}"
        ) from error


def _of_run(folder: Path) -> Any:
    """The plain model of a run."""
    from omegaconf import DictConfig, OmegaConf

    from psc_lightning.app.build import build_module

    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig)
    return build_module(cfg)


def _line(error: Exception) -> str:
    """The message on one line, without the path that is printed before it."""
    text = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
