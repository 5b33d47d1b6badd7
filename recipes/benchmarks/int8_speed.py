"""How much faster ResNet-20 runs in onnxruntime in 8 bit integers, and what it then still gets right.

    python recipes/benchmarks/int8_speed.py --data DIR --checkpoint resnet20-12fca82f.th

Fine-tunes a CIFAR-10 checkpoint for a few steps with rounded weights and inputs, exports it, and lets its session and the
dense network's take turns in one process, one thread each, so that a drift of the machine's speed meets both. A ratio is
the median over the pairs (CPU time); accuracies are of all test images, in onnxruntime, and with torch's own rounding.
Writes recipes/results/int8_speed_KIND.md, after the kind of processor: with VNNI, without, or another.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from lightning import Trainer, seed_everything
from torch import Tensor, nn

from psc_lightning import ActivationQuantization, StraightThroughQuantization, export_onnx
from psc_lightning.app.baseline import read_checkpoint
from psc_lightning.app.data import ImageData
from psc_lightning.app.models import ResNet20
from psc_lightning.app.sources import cifar10
from psc_lightning.app.task import Classifier

BATCHES = (1, 64)
BITS = (7, 4, 8)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def fine_tuned(net: nn.Module, args: argparse.Namespace, bits: int) -> nn.Module:
    """A copy, trained for a few steps with weights of so many bits and inputs of 8."""
    seed_everything(0, verbose=False)
    adamw = functools.partial(torch.optim.AdamW, lr=args.lr)
    module = Classifier(copy.deepcopy(net), adamw)
    rounding = [
        StraightThroughQuantization("uniform", bits=bits, schedule="constant"),
        ActivationQuantization(schedule="constant"),
    ]
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    data = ImageData(cifar10, MEAN, STD, folder=args.data, batch_size=128, validation=0.02, augment="crop_and_flip")
    trainer = Trainer(accelerator="cpu", max_steps=args.steps, limit_val_batches=0, callbacks=rounding, **quiet)
    trainer.fit(module, data)
    return module.net.eval()


def sessions(net: nn.Module, folder: str) -> dict[int, onnxruntime.InferenceSession]:
    """One for each batch size."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made = {}
    for batch in BATCHES:
        path = Path(folder, "model.onnx")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "8 bit weights times 8 bit inputs")  # the table shows it
            export_onnx(net, path, torch.zeros(batch, 3, 32, 32))
        made[batch] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return made


def logits(session: onnxruntime.InferenceSession, x: np.ndarray) -> np.ndarray:
    found: np.ndarray = session.run(None, {session.get_inputs()[0].name: x})[0]
    return found


def cpu_time(session: onnxruntime.InferenceSession, x: np.ndarray, runs: int) -> float:
    """CPU seconds of a run, the mean of some."""
    start = time.process_time()
    for _ in range(runs):
        logits(session, x)
    return (time.process_time() - start) / runs


def accuracy(predictions: list[np.ndarray], labels: Tensor) -> float:
    """In percent."""
    found = np.concatenate([one.argmax(1) for one in predictions])
    return 100 * float((found == labels[: len(found)].numpy()).mean())


def write(args: argparse.Namespace, dense_accuracy: float, count: int, rows: list[dict[str, float]]) -> None:
    """The results so far."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    processor = "with VNNI" if "vnni" in flags else "without VNNI" if "avx2" in flags else "of another kind"
    command = f"python recipes/benchmarks/int8_speed.py --data DIR --checkpoint FILE --steps {args.steps}"
    lines = [
        "# ResNet-20 in 8 bit integers in onnxruntime",
        "",
        f"CPU time, one thread, median of {args.repeats} pairs; ratio: median (lowest – highest) of the pairs.",
        f"Accuracy on {count} test images in %, one seed: of the dense network {dense_accuracy:.2f}; `torch` is what",
        f"training reports. Onnxruntime {onnxruntime.__version__}, a processor {processor}.",
        f"By `{command} --repeats {args.repeats}`.",
        "",
        "| weights | batch | dense, ms | int8, ms | ratio | accuracy, torch | accuracy, onnxruntime |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines += [
            f"| {row['bits']:.0f} bit | {b} | {row[f'dense {b}']:.2f} | {row[f'int8 {b}']:.2f} | {row[f'ratio {b}']:.2f} "
            f"({row[f'low {b}']:.2f} – {row[f'high {b}']:.2f}) | {row['torch']:.2f} | {row['onnxruntime']:.2f} |"
            for b in BATCHES
        ]
    results = Path(__file__).resolve().parents[1] / "results"
    results.mkdir(exist_ok=True)
    (results / f"int8_speed_{processor.lower().replace(' ', '_')}.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with (or for) cifar-10-batches-bin")
    parser.add_argument("--checkpoint", required=True, type=Path, help="state dict of a ResNet-20")
    parser.add_argument("--steps", type=int, default=150, help="of fine-tuning (default: 150)")
    parser.add_argument("--lr", type=float, default=1e-4, help="of fine-tuning (default: 1e-4)")
    parser.add_argument("--repeats", type=int, default=31, help="measured pairs a row (default: 31)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dense = ResNet20()
    dense.load_state_dict(read_checkpoint(args.checkpoint, dense))
    dense.eval()
    data = ImageData(cifar10, MEAN, STD, folder=args.data, eval_batch_size=64)
    data.setup("test")
    images, labels = (torch.cat(column) for column in zip(*data.test_dataloader()))
    tests = images[: len(images) // 64 * 64].split(64)
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        plain = sessions(dense, folder)
        dense_accuracy = accuracy([logits(plain[64], x.numpy()) for x in tests], labels)
        for bits in BITS:
            net = fine_tuned(dense, args, bits)
            made = sessions(net, folder)
            row: dict[str, float] = {"bits": bits, "bytes": Path(folder, "model.onnx").stat().st_size}
            for batch in BATCHES:
                x = images[:batch].numpy()
                runs = max(1, 64 // batch)
                cpu_time(plain[batch], x, runs), cpu_time(made[batch], x, runs)
                pairs = [(cpu_time(plain[batch], x, runs), cpu_time(made[batch], x, runs)) for _ in range(args.repeats)]
                for name, column in zip(("dense", "int8"), zip(*pairs)):
                    row[f"{name} {batch}"] = 1e3 * statistics.median(column)
                ratios = [one / other for one, other in pairs]
                row |= {
                    f"ratio {batch}": statistics.median(ratios),
                    f"low {batch}": min(ratios),
                    f"high {batch}": max(ratios),
                }
            with torch.no_grad():
                row["torch"] = accuracy([net(x).numpy() for x in tests], labels)
            row["onnxruntime"] = accuracy([logits(made[64], x.numpy()) for x in tests], labels)
            rows.append(row)
            print(row, flush=True)
            write(args, dense_accuracy, len(tests) * 64, rows)


if __name__ == "__main__":
    main()
