"""How small, how exact and how fast a sentence encoder is as ONNX, its weights packed.

    python recipes/benchmarks/onnx_encoder.py --encoder FOLDER

FOLDER holds an encoder as `save_pretrained` writes it (config.json, model.safetensors); transformers reads it. It is
compressed without training, exported, and run in onnxruntime with the default options, one thread. `limit`: 1.15 times the
weights in their bits (and what is not compressed), the dense file without its numbers, and 600 bytes for each compressed
tensor. `difference` is from torch, as a share of the largest number where that is above 1. A session's
start includes rebuilding the weights; a run is of two sentences of 64 words. Writes recipes/results/onnx_encoder.md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from copy import deepcopy
from pathlib import Path

import onnx
import onnxruntime
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from psc_lightning import MaskLearning, Report, StraightThroughQuantization, compress, export_onnx

BATCH, WORDS = 2, 64
MASK = MaskLearning("magnitude", threshold=0.5)

# name: a preset or callbacks, and bits a weight
SETTINGS: dict[str, tuple[str | list[Callback], float]] = {
    "half zero, 8 bit": ("float", 1 + 0.5 * 8),
    "half zero, 16 levels": ([MASK, StraightThroughQuantization("codebook", k=16)], 1 + 0.5 * 4),
    "ternary": ("ternary", 1.6),
    "binary": ("binary", 1),
}


class Sentences(nn.Module):
    """A vector a sentence: the mean over its words."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, words: Tensor, there: Tensor) -> Tensor:
        states = self.encoder(input_ids=words, attention_mask=there).last_hidden_state
        weights = there.unsqueeze(-1).to(states.dtype)
        total: Tensor = (states * weights).sum(1) / weights.sum(1)
        return total


def cpu_time(session: onnxruntime.InferenceSession, inputs: tuple[Tensor, ...], repeats: int) -> float:
    """CPU seconds of a run, the median."""
    feed = {one.name: x.numpy() for one, x in zip(session.get_inputs(), inputs, strict=True)}
    times = []
    for _ in range(repeats):
        start = time.process_time()
        session.run(None, feed)
        times.append(time.process_time() - start)
    return statistics.median(times)


def measure(model: nn.Module, inputs: tuple[Tensor, ...], path: Path, repeats: int) -> dict[str, float]:
    """Export a model, and run it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    export_onnx(model, path, inputs)
    start = time.process_time()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    started = time.process_time() - start
    feed = {one.name: x.numpy() for one, x in zip(session.get_inputs(), inputs, strict=True)}
    found = torch.from_numpy(session.run(None, feed)[0])
    with torch.no_grad():
        wanted = model(*inputs)
    difference = float((found - wanted).abs().max() / max(1.0, float(wanted.abs().max())))
    run = cpu_time(session, inputs, repeats)
    return {"bytes": path.stat().st_size, "difference": difference, "start": started, "run": run}


def limit(report: Report, bits: float, stripped: int) -> int:
    """The largest size that an export may have."""
    packed = [row for row in report.tensors if row.method not in ("plain", "shared")]
    plain = sum(row.dense_bytes for row in report.tensors if row.method == "plain")
    weights = sum(row.dense_bytes / 4 * bits / 8 for row in packed)
    return int(1.15 * (weights + plain)) + stripped + 600 * len(packed)


def line(name: str, found: dict[str, float], most: str) -> str:
    """A line of the table."""
    cells = [name, f"{found['bytes']:,.0f}", most, f"{found['difference']:.0e}"]
    cells += [f"{found['start']:.2f}", f"{1e3 * found['run']:.1f}"]
    text = f"| {' | '.join(cells)} |"
    print(text, flush=True)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, type=Path, help="folder with config.json and model.safetensors")
    parser.add_argument("--repeats", type=int, default=21, help="measured runs a row (default: 21)")
    args = parser.parse_args()
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense = Sentences(transformers.AutoModel.from_pretrained(args.encoder)).eval()
    words = torch.randint(1000, 20_000, (BATCH, WORDS))
    there = torch.ones_like(words)
    there[1, WORDS // 2 :] = 0
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        plain = measure(dense, (words, there), path, args.repeats)
        graph = onnx.load(path)
        for tensor in graph.graph.initializer:
            tensor.ClearField("raw_data")
        rows.append(line("dense", plain, ""))
        for name, (how, bits) in SETTINGS.items():
            model = deepcopy(dense)
            most = limit(compress(model, how), bits, graph.ByteSize())
            rows.append(line(name, measure(model, (words, there), path, args.repeats), f"{most:,}"))
    entries = sum(parameter.numel() for parameter in dense.parameters())
    lines = [
        "# A sentence encoder as ONNX",
        "",
        f"{entries:,} numbers; CPU time, one thread, a run is the median of {args.repeats}. onnxruntime",
        f"{onnxruntime.__version__}, default options. By `python recipes/benchmarks/onnx_encoder.py --encoder FOLDER`.",
        "",
        "| weights | bytes | limit | difference | session's start, s | a run, ms |",
        "|---|--:|--:|--:|--:|--:|",
        *rows,
    ]
    path = Path(__file__).parents[1] / "results" / "onnx_encoder.md"
    path.write_text("\n".join(lines) + "\n")
    print(path)


if __name__ == "__main__":
    main()
