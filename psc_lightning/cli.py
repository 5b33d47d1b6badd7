"""The `psc` command: make a .psc file of a checkpoint, look into one, check it, turn it into other formats; pages of runs."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psc_lightning
from psc_lightning import arguments
from psc_lightning.artifact import (
    ArtifactError,
    NamelessError,
    container,
    inspect,
    is_part,
    load,
    load_into,
    load_stored,
)
from psc_lightning.artifact.file import MAX_BYTES
from psc_lightning.artifact.leftovers import LEFTOVERS
from psc_lightning.artifact.reading import SLACK
from psc_lightning.checkpoint import bare, matched, read_tensors
from psc_lightning.export import EXPORTERS
from psc_lightning.pages import command as report_command
from psc_lightning.report.difference import difference_dict, difference_table, differences
from psc_lightning.strict_json import json_text
from psc_lightning.terminal import closed_pipes, printable, speaking_plainly

__all__ = ["main"]

_FACTORY = "PACKAGE.MODULE:FACTORY"
_FACTORY_HELP = "what makes the plain model, called without arguments"

_NAMED = 6  # tensors that a message names

_EXAMPLES = {
    "inspect": """\
  psc inspect model.psc              a table: each tensor's shape, zeros, levels, bytes
  psc inspect runs/RUN               the same of a run's file (verify, diff, export take a folder, too)
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
  psc export last.ckpt --onnx model.onnx --model package.module:factory --example 1,128:int64 --dynamic 1=length
  psc export model.psc --safetensors model.safetensors
""",
    "pack": """\
  psc pack best.ckpt --model package.module:factory -o best.psc
  psc pack best.ckpt --model package.module:factory -o best.psc --leftovers float16 --fold-batchnorm
""",
}

_STATUS = """\

exit status: 0 good, 1 the file is bad, 2 wrong usage
             diff: 0 equal tensors, 1 different ones or a bad file; verify: 1 also for another checkpoint or SHA-256
"""


def main(given: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 good, 1 the file is bad or differs, 2 wrong usage.

    Args:
        given: arguments instead of those of the process.
    """
    with closed_pipes(), speaking_plainly():
        return _run(_parser().parse_args(given))


def _run(options: argparse.Namespace) -> int:
    try:
        return int(options.run(options) or 0)
    except NamelessError as error:  # the file is good, but this command needs more than is in it
        print(f"psc {options.command}: {options.file}: {_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # of the output, not of the file
        raise
    except (ArtifactError, OSError) as error:
        print(f"psc {options.command}: {options.file}: {_line(error)}", file=sys.stderr)
        return 1
    except MemoryError as error:  # nor is the file bad
        print(f"psc {options.command}: {options.file}: not enough memory: {_line(error)}", file=sys.stderr)
        return 2
    except (_UsageError, ModuleNotFoundError) as error:
        print(f"psc {options.command}: {_line(error)}", file=sys.stderr)
        return 2


class _UsageError(Exception):
    """Arguments that do not go together."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="psc",
        description="Write .psc files (compressed models) of checkpoints, look into them and check them.",
        epilog="examples:\n" + "".join((*_EXAMPLES.values(), report_command.EXAMPLES)) + _STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, what: str) -> argparse.ArgumentParser:
        one = commands.add_parser(
            name,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
            epilog=f"examples:\n{_EXAMPLES[name]}{_STATUS}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.add_argument(
            "--max-bytes",
            metavar="N",
            type=arguments.size,
            help=f"refuse, before taking memory, a file whose tensors need more than this ({MAX_BYTES}, or what --model may)",
        )
        return one

    one = command("inspect", "list the tensors of a file, with shapes and bytes")
    one.add_argument("file", metavar="FILE", type=arguments.file, help="a .psc file, or the folder of a run")
    one.add_argument("--json", action="store_true", help="print JSON with the keys of report.json")
    one.add_argument("--all", action="store_true", help="a row for each plain tensor too, where there are many")
    one.set_defaults(run=_inspect)

    one = command("verify", "check a file from end to end; prints nothing if it is good")
    one.add_argument("file", metavar="FILE", type=arguments.file, help="a .psc file, or the folder of a run")
    one.add_argument(
        "--against",
        metavar="CHECKPOINT",
        type=Path,
        help="its tensors must be these: a state dict, a Lightning checkpoint, or safetensors",
    )
    one.add_argument(
        "--sha256", metavar="HEX", type=arguments.digest, help="the file's SHA-256, as `psc inspect` prints it"
    )
    one.add_argument("--model", metavar=_FACTORY, help=f"{_FACTORY_HELP}: the file must go into it")
    one.set_defaults(run=_verify)

    one = command("diff", "compare the tensors of two files; exit status 1 if any differ")
    one.add_argument("file", metavar="A", type=arguments.file, help="a .psc file, or the folder of a run")
    one.add_argument("other", metavar="B", type=arguments.file, help="another")
    one.add_argument("--json", action="store_true", help="print JSON: all tensors, with the bytes in each file")
    one.add_argument("--all", action="store_true", help="a row for each equal tensor too")
    one.set_defaults(run=_diff)

    one = command("export", f"write a file's model in another format: {', '.join(EXPORTERS)}")
    one.add_argument(
        "file", metavar="FILE", help="a .psc file, a checkpoint, or the folder of a run, which knows its own model"
    )
    for name, exporter in EXPORTERS.items():
        one.add_argument(f"--{name}", metavar="OUT", help=f"the file to write: {exporter.what}")
    one.add_argument("--model", metavar=_FACTORY, help=_FACTORY_HELP)
    one.add_argument(
        "--example",
        metavar="SHAPE",
        type=arguments.example,
        action="append",
        help="an input: 1,3,32,32; 1,128:int64 where it is whole numbers; once for each input, in their order",
    )
    one.add_argument("--dynamic-batch", action="store_true", help="leave the first axis of all inputs of a graph open")
    one.add_argument(
        "--dynamic",
        metavar="[INPUT:]AXIS=NAME",
        type=arguments.open_axis,
        action="append",
        default=[],
        help="leave an axis of a graph's input (of all inputs) open and name its length: 1=length, ids:1=length",
    )
    for which in ("input", "output"):
        one.add_argument(
            f"--{which}-names", metavar="A,B", type=arguments.names, help=f"what the graph's {which}s are called"
        )
    one.set_defaults(run=_export)

    one = command("pack", "write the model of a Lightning checkpoint as a .psc file, and print its table")
    one.add_argument(
        "file", metavar="CHECKPOINT", help="of a compressed run; of weights only what has few values is seen"
    )
    one.add_argument(
        "--model", metavar=_FACTORY, required=True, help=f"{_FACTORY_HELP}: the LightningModule, or the network in it"
    )
    one.add_argument("-o", "--out", metavar="OUT", required=True, help="the .psc file to write")
    one.add_argument(
        "--leftovers", choices=tuple(LEFTOVERS), default="float32", help="how tensors outside the slots are stored"
    )
    one.add_argument("--fold-batchnorm", action="store_true", help="fold each BatchNorm into the convolution before it")
    one.add_argument("--no-names", action="store_true", help="leave names and shapes out: only the same model reads it")
    one.set_defaults(run=_pack)

    report_command.add_to(commands, _STATUS)
    return parser


def _limit(options: argparse.Namespace) -> dict[str, Any]:
    """What a reader of files is told of their size."""
    return {} if options.max_bytes is None else {"max_bytes": options.max_bytes}


def _content(file: str, options: argparse.Namespace) -> bytes:
    """A file's bytes, read once whatever is asked of them."""
    return container.read(file, (MAX_BYTES if options.max_bytes is None else options.max_bytes) + SLACK)


def _inspect(options: argparse.Namespace) -> None:
    report = inspect(options.file, **_limit(options))
    if options.json:
        print(json_text(report.to_dict()))
    else:
        print(report.table(all_tensors=options.all), f"sha256 {report.sha256}", sep="\n")


def _verify(options: argparse.Namespace) -> None:
    data = _content(options.file, options)
    if options.sha256:
        found = hashlib.sha256(data).hexdigest()
        if found != options.sha256:
            raise ArtifactError(f"expected SHA-256 {options.sha256}, found {found}: another file, or a damaged one")
    try:
        tensors = _tensors(data, options)
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
    if is_part(data, **_limit(options)):
        wanted = {name: value for name, value in wanted.items() if name in held}
    unequal = [one.text("the file", "the checkpoint") for one in differences(held, wanted) if not one.equal]
    if unequal:
        more = f"; and {len(unequal) - _NAMED} more" * (len(unequal) > _NAMED)
        raise ArtifactError(
            f"differs from {options.against} in {len(unequal)} of {len(held)} tensors: {'; '.join(unequal[:_NAMED])}{more}"
        )


def _tensors(data: bytes, options: argparse.Namespace) -> dict[str, Any]:
    """The tensors of a file, read from end to end, by a model where one is named."""
    if options.model is None:
        return load(data, **_limit(options))
    model = _made(options.model)
    left = load_into(model, data, options.max_bytes)
    return {name: value for name, value in model.state_dict().items() if name not in left}


def _diff(options: argparse.Namespace) -> int:
    paths = (options.file, options.other)
    contents = []
    for options.file in paths:  # an error names the file that was being read
        data = _content(options.file, options)
        contents.append((load(data, **_limit(options)), inspect(data, **_limit(options))))
    (first, one), (second, other) = contents
    found = differences(first, second)
    equal = all(difference.equal for difference in found)
    if options.json:
        print(json_text(difference_dict(found, (one, other))))
    else:
        print(difference_table(found, (one, other), paths, all_tensors=options.all))
    return int(not equal)


def _export(options: argparse.Namespace) -> None:
    run = Path(options.file) if Path(options.file).is_dir() else None
    file = str(run / "model.psc") if run else options.file
    if run and not Path(file).is_file():
        raise _UsageError(f"{run} is a folder without a model.psc: give a run's, or a file")
    checkpoint = _is_checkpoint(file)
    chosen = {name: out for name in EXPORTERS if (out := getattr(options, name))}
    if not chosen:
        raise _UsageError(f"nothing to write: give at least one of {', '.join(f'--{name} OUT' for name in EXPORTERS)}")
    if graphs := [name for name in chosen if EXPORTERS[name].graph]:
        if options.example is None:
            raise _UsageError(f"--{graphs[0]} needs --example, the shape of an input, as in --example 1,3,32,32")
        if options.model is None and run is None:
            what = "checkpoint" if checkpoint else ".psc file"
            raise _UsageError(f"a {what} holds no graph: give --model {_FACTORY}, or a run's folder instead")
    shapes: dict[str, dict[int, str]] = {}
    for which, axis, length in options.dynamic:
        shapes.setdefault(which, {})[axis] = length
    asked = {"dynamic_shapes": shapes, "input_names": options.input_names, "output_names": options.output_names}
    data = None if checkpoint else _content(file, options)
    writers = {name: EXPORTERS[name].write for name in chosen}  # where one lacks a package, none writes
    for name, out in chosen.items():
        if name not in graphs:
            tensors = _checkpoint(file) if data is None else _tensors(data, options)
            try:
                writers[name](tensors, out, **_limit(options))
            except ValueError as error:
                raise ArtifactError(str(error)) from error
            continue
        model = _made(options.model) if options.model else _of_run(Path(options.file))
        stored = _fill(model, file, data, options.max_bytes)
        example = _example_of(model, options.example)
        try:
            writers[name](model, stored, out, example, dynamic_batch=options.dynamic_batch, **asked)
        except ValueError as error:
            raise _UsageError(str(error)) from error


def _is_checkpoint(file: str) -> bool:
    """Whether a file is another's; where there is none, the other arguments are not what is wrong."""
    if "://" in file:
        return False
    path = Path(file).expanduser()
    path.stat()
    if path.suffix == ".psc" or not path.is_file():
        return False
    with path.open("rb") as content:
        return content.read(len(container.MAGIC)) != container.MAGIC


def _checkpoint(file: str) -> dict[str, Any]:
    try:
        return read_tensors(Path(file).expanduser())
    except ValueError as error:
        raise ArtifactError(f"neither a .psc file nor a checkpoint: {error}") from error


def _fill(model: Any, file: str, data: bytes | None, max_bytes: int | None) -> dict[str, Any]:
    """Put a file's weights, or (None) a checkpoint's, into a model; how those that are compressed are stored."""
    if data is not None:
        load_into(model, data, max_bytes)
        return dict(load_stored(data, max_bytes, model))
    try:
        model.load_state_dict(matched(_checkpoint(file), model.state_dict()))
    except ValueError as error:
        raise ArtifactError(str(error)) from error
    return {}


def _example_of(model: Any, inputs: Sequence[tuple[tuple[int, ...], str]]) -> tuple[Any, ...]:
    """Inputs of these shapes and types, which the model takes."""
    import torch

    example = tuple(torch.zeros(shape, dtype=getattr(torch, dtype)) for shape, dtype in inputs)
    try:
        with torch.no_grad():
            model.eval()(*example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise _UsageError(f"--example: the model does not take such an input: {error}") from error
    return example


def _pack(options: argparse.Namespace) -> None:
    if (size := Path(options.file).stat().st_size) > (options.max_bytes or MAX_BYTES):
        raise ArtifactError(f"expected at most max_bytes = {options.max_bytes or MAX_BYTES} bytes, found {size}")
    model = _made(options.model)
    if not Path(options.out).absolute().parent.is_dir():
        raise _UsageError(f"-o {options.out}: no such folder")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        try:
            psc_lightning.load_checkpoint(model, options.file)
        except ValueError as error:
            raise ArtifactError(str(error).removeprefix(f"{options.file}: ")) from error
        writing = (options.leftovers, not options.no_names, options.fold_batchnorm)
        try:
            report = psc_lightning.save(model, options.out, *writing)
        except (ValueError, OSError) as error:
            raise _UsageError(f"-o {options.out}: {_line(error)}") from error
    for warning in said:
        print(f"psc pack: {' '.join(str(warning.message).split())}", file=sys.stderr)
    print(report)


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

    sys.path.insert(0, "")  # where the run's own command found it
    if not (folder / "config.yaml").is_file():
        raise _UsageError(f"{folder} holds no config.yaml, which says what a run's model is: give --model {_FACTORY}")
    cfg = OmegaConf.load(folder / "config.yaml")
    assert isinstance(cfg, DictConfig)
    return build_module(cfg)


def _line(error: Exception) -> str:
    """The message on one line, without the path that is printed before it."""
    text = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return printable(" ".join(text.split()))


if __name__ == "__main__":
    sys.exit(main())
