"""Measure every record again: the bytes on the disk, and the accuracy of a network of our own, from the official data.

    python -m recipes.evaluate [--data DIR] [--only digits]

A record is a file in recipes/results/records and a line in records.json beside it: the network, the data, what must hold,
the command that made it. The networks are written out here, so that nothing but `load_into` of the package is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import psc_lightning
from psc_lightning.app import sources

RECORDS = Path(__file__).parent / "results" / "records"
Data = tuple[Tensor, Tensor]


class Digits(nn.Module):
    """Three 3×3 convolutions with BatchNorm, for 8×8 digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv3, self.bn3 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.linear(F.relu(self.bn3(self.conv3(x))).mean((2, 3)))


class LeNet300(nn.Module):
    """LeNet-300-100."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


class LeNet5(nn.Module):
    """LeNet-5 as Caffe has it: 20-50-500-10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv2(F.max_pool2d(self.conv1(x), 2)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def digits(folder: Path) -> Data:
    """The 360 test images of the app's split of scikit-learn's digits."""
    splits = sources.digits()
    return (splits.test_images.float() / 255 - 0.3053) / 0.3765, splits.test_labels


def mnist(folder: Path) -> Data:
    """The 10,000 test images of MNIST, from its official files."""
    splits = sources.mnist(str(folder / "mnist"))
    return (splits.test_images.float() / 255 - 0.1307) / 0.3081, splits.test_labels


NETWORKS: dict[str, Callable[[], nn.Module]] = {"digits_cnn": Digits, "lenet_300_100": LeNet300, "lenet5": LeNet5}
DATA: dict[str, Callable[[Path], Data]] = {"digits": digits, "mnist": mnist}


@torch.no_grad()
def accuracy(network: str, file: Path, data: Data) -> float:
    """Of a fresh network with the file's weights; its names are those under `net.` of the app's module."""
    module = nn.Module()
    module.net = NETWORKS[network]()
    psc_lightning.load_into(module, file)
    images, labels = data
    guesses = torch.cat([module.eval().net(part).argmax(1) for part in images.split(500)])
    return float((guesses == labels).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data"), help="a folder with mnist/ in it (default: data)")
    parser.add_argument("--only", default="", help="records whose name has this in it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    records = json.loads((RECORDS / "records.json").read_text())
    table = Table("record", "bytes", "limit", "accuracy", "at least", title="records, measured again")
    missed = 0
    for record in records:
        if args.only not in record["file"]:
            continue
        file = RECORDS / record["file"]
        found = accuracy(record["network"], file, DATA[record["data"]](args.data))
        size = file.stat().st_size
        missed += size > record["bytes"] or found < record["accuracy"] - 1e-9
        table.add_row(record["file"], f"{size:,}", f"{record['bytes']:,}", f"{found:.4f}", f"{record['accuracy']:.4f}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    sys.exit(f"{missed} of them do not hold" if missed else 0)


if __name__ == "__main__":
    main()
