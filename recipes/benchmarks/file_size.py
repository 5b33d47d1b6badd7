"""How small a .psc file is beside what others make of the same numbers.

    python recipes/benchmarks/file_size.py model.psc another.psc
    python recipes/benchmarks/file_size.py --encoder model.safetensors

Each file is taken apart into what its methods store: mask bits, codes, scales, leftovers. Others get these arrays bit-packed,
and with each symbol in bytes of its own, and the smaller result counts; beside it they get our names, shapes and options for
nothing. `safetensors+zstd` is the plain state dict. NNCodec's entropy coder, if installed (`pip install --no-deps nncodec`),
gets the codes of each core as whole numbers, zero where the mask is, and our scales and leftovers as they are. `--encoder`
adds a transformer, masked and in 16 levels by `compress`, from a file of weights. Writes recipes/results/file_size.md.
Needs `pip install zstandard brotli safetensors`.
"""

from __future__ import annotations

import argparse
import lzma
import tempfile
import zlib
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import brotli
import numpy as np
import safetensors.torch
import zstandard
from torch import Tensor, nn

import psc_lightning
from psc_lightning import MaskLearning, StraightThroughQuantization
from psc_lightning.artifact import file, streams
from psc_lightning.slots import stored
from psc_lightning.symbols import look_up

RESULTS = Path(__file__).resolve().parents[1] / "results" / "file_size.md"
COMPRESSORS = {
    "zlib -9": lambda data: zlib.compress(data, 9),
    "zstd -22": lambda data: zstandard.ZstdCompressor(level=22).compress(data),
    "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    "brotli -11": lambda data: brotli.compress(data, quality=11, lgwin=24),
}


class Recorder(streams.SymbolReader):
    """Keeps every array that is read: its symbols, their alphabet, and what it cost, in bits."""

    arrays: ClassVar[list[tuple[np.ndarray[Any, Any], int, float]]] = []
    matrices: ClassVar[list[tuple[np.ndarray[Any, Any], int, np.ndarray[Any, Any]]]] = []

    def symbols(self, count: int, size: int, grid: Tensor | None = None) -> Tensor:
        before = self.bits
        found = super().symbols(count, size, grid)
        symbols = found.numpy().copy()  # a method makes its values of them in place
        Recorder.arrays.append((symbols, size, self.bits - before))
        if grid is not None:
            Recorder.matrices.append((symbols, size, grid.reshape(len(grid), -1).numpy()))
        return found

    def values(self, count: int, table: Tensor, grid: Tensor | None = None) -> Tensor:
        return look_up(table.numpy(), self.symbols(count, len(table), grid).numpy())


def packed(symbols: np.ndarray[Any, Any], size: int) -> bytes:
    """As many bits a symbol as the alphabet needs."""
    width = max(1, (size - 1).bit_length())
    planes = [np.packbits(symbols >> bit & 1) for bit in range(width)]
    return np.concatenate(planes).tobytes()


def whole(matrix: tuple[np.ndarray[Any, Any], int, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Codes as numbers about zero, which is where the mask is: of an even alphabet none means zero."""
    symbols, size, grid = matrix
    numbers = symbols.astype(np.int32) - size // 2
    out = np.zeros(grid.shape, np.int32)
    out[grid] = numbers + (numbers >= 0) * (size % 2 == 0)
    return out


def nncodec() -> int | None:
    """Bytes of the last file's codes by DeepCABAC, the better of its two scan orders each; their mask costs nothing more."""
    try:
        from nncodec.extensions import deepCABAC
    except ImportError:
        return None
    total = 0
    # A mask has a matrix of its own: all of it is marked, and the codes of what it keeps come next.
    pairs = zip(Recorder.matrices, [*Recorder.matrices[1:], None])
    codes = [one for one, after in pairs if after is None or one[0].sum() != after[2].sum() or after[2].all()]
    for core in map(whole, codes):
        tries = []
        for order in (0, 1):
            encoder = deepCABAC.Encoder()
            encoder.initCtxModels(11, 1)
            off = (deepCABAC.HdspMode.AlwaysOff, np.zeros(2, np.int8))
            encoder.encodeLayer(core, 0, order, 0, 0, 0, np.zeros(len(core), np.int32), *off, 0, 0)
            tries.append(len(encoder.finish().tobytes()))
        total += min(tries)
    return total


def sizes(path: Path) -> dict[str, int]:
    """Bytes of a file by each way of writing it."""
    Recorder.arrays.clear()
    Recorder.matrices.clear()
    coded = 0.0  # bits of masks, codes and indices
    original = stored.decode

    def decode(*arguments: Any) -> Any:
        nonlocal coded
        first = len(Recorder.arrays)
        found = original(*arguments)
        coded += sum(bits for _, size, bits in Recorder.arrays[first:] if size <= 256)
        return found

    with mock.patch.object(file, "SymbolReader", Recorder), mock.patch.object(file, "decode", decode):
        state = psc_lightning.load(path)
    ours = path.stat().st_size
    arrays = list(Recorder.arrays)
    rest = ours - sum(bits for _, _, bits in arrays) / 8
    tight = b"".join(packed(symbols, size) for symbols, size, _ in arrays)
    wide = b"".join(symbols.astype("<u2" if size > 256 else "u1").tobytes() for symbols, size, _ in arrays)
    found = {
        "dense": sum(tensor.nbytes for tensor in state.values()),
        "psc": ours,
        "bit-packed": round(rest + len(tight)),
    }
    for name, compress in COMPRESSORS.items():
        found[name] = round(rest + min(len(compress(tight)), len(compress(wide))))
    plain = safetensors.torch.save({name: tensor.clone() for name, tensor in state.items()})
    found["safetensors+zstd"] = len(COMPRESSORS["zstd -22"](plain))
    if (theirs := nncodec()) is not None:
        found["NNCodec"] = round(ours - coded / 8 + theirs)
    return found


def encoder(weights: Path, folder: Path) -> Path:
    """A transformer's weights, half of them zero, the others in 16 levels a row."""
    state = safetensors.torch.load_file(weights)
    model = nn.Module()
    for name in dict.fromkeys(key.rpartition(".")[0] for key in state):
        leaves = {key.rpartition(".")[2]: state[key] for key in state if key.rpartition(".")[0] == name}
        weight = leaves.get("weight")
        if weight is not None and weight.dim() == 2:
            layer: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in leaves)
            layer.load_state_dict(leaves)
        else:
            layer = nn.Module()
            for leaf, value in leaves.items():
                layer.register_buffer(leaf, value)
        model.add_module(name.replace(".", "-"), layer)
    psc_lightning.compress(
        model, [MaskLearning("magnitude", threshold=0.5), StraightThroughQuantization("codebook", k=16)]
    )
    psc_lightning.save(model, folder / f"{weights.parent.parent.name}.psc")
    return folder / f"{weights.parent.parent.name}.psc"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--names", nargs="*", default=[], help="what to call them in the table (default: their paths)")
    parser.add_argument("--encoder", type=Path, help="model.safetensors of a transformer")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the table (default: recipes/results/file_size.md)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = dict(zip([*args.names, *map(str, args.files[len(args.names) :])], args.files))
        if args.encoder:
            files["transformer, 22.7 M"] = encoder(args.encoder, Path(folder))
        table = {name: sizes(path) for name, path in files.items()}
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    lines = [f"| file | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for name, row in table.items():
        cells = [f"{row[column]:,}" if column in row else "" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    title = (
        "# Bytes of the same numbers\n\nBy `python recipes/benchmarks/file_size.py`, which says what is compared.\n\n"
    )
    args.out.write_text(title + text)


if __name__ == "__main__":
    main()
