"""The networks that a training step is measured on, with random inputs, on which the times do not depend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning import LightningModule
from torch import Tensor, nn

from psc_lightning.app.models import ResNet20

__all__ = ["NETS", "Fit", "Net"]

WORDS, WIDTH, HEADS, LAYERS = 30522, 384, 12, 6  # MiniLM-L6
ROWS = 100_000  # of the large embedding
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Net:
    """A network, a few batches that repeat, and what trains it."""

    told: str
    build: Callable[[], nn.Module]
    batches: Callable[[], list[Batch]]
    adam: bool

    def weights(self) -> int:
        """Entries of its matrices and kernels, which are what a slot takes by default."""
        return sum(parameter.numel() for parameter in self.build().parameters() if parameter.dim() > 1)


class Fit(LightningModule):
    """A network, cross entropy, and SGD with momentum or AdamW."""

    def __init__(self, net: nn.Module, adam: bool) -> None:
        super().__init__()
        self.net, self.adam = net, adam

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.adam:
            return torch.optim.AdamW(self.parameters(), lr=1e-4)
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def encoder(width: int, heads: int, layers: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class Phrases(nn.Module):
    """A text classifier of the size of MiniLM-L6. Word 0 fills up a phrase."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(512, WIDTH)
        self.norm, self.encoder, self.head = nn.LayerNorm(WIDTH), encoder(WIDTH, HEADS, LAYERS), nn.Linear(WIDTH, 2)

    def forward(self, words: Tensor) -> Tensor:
        empty = words == 0
        x = self.norm(self.words(words) + self.positions(torch.arange(words.shape[1])))
        x = self.encoder(x, src_key_padding_mask=empty).masked_fill(empty[..., None], 0.0)
        return self.head(x.sum(1) / (~empty).sum(1, keepdim=True))


class Bag(nn.Module):
    """A large embedding, of which a batch meets little, and a small classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(ROWS, 64)
        self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.rows(rows).mean(1))


class Recurrent(nn.Module):
    """Two LSTM layers and a classifier of their last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(512, 512, 2, batch_first=True), nn.Linear(512, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def lenet() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))


def numbers(*shape: int) -> Callable[[], list[Batch]]:
    """Two batches of random numbers, of ten classes."""
    return lambda: [(torch.randn(shape), torch.randint(0, 10, shape[:1])) for _ in range(2)]


def zipf(count: int, *shape: int) -> Tensor:
    """Random words 1 … count - 1, the n-th as often as 1 / n says: most rows of a table get no gradient."""
    often = 1.0 / torch.arange(1, count, dtype=torch.float)
    drawn = torch.multinomial(often, int(torch.tensor(shape).prod()), replacement=True)
    return (drawn + 1).reshape(shape)


def phrases() -> list[Batch]:
    """Phrases of 5 to 20 words, filled up to the longest of a batch."""
    made = []
    for _ in range(4):
        lengths = torch.randint(5, 21, (32,))
        words = zipf(WORDS, 32, int(lengths.max()))
        words[torch.arange(words.shape[1]) >= lengths[:, None]] = 0
        made.append((words, torch.randint(0, 2, (32,))))
    return made


NETS: dict[str, Net] = {
    "resnet20": Net(
        "ResNet-20, batch 64",
        lambda: ResNet20(10).to(memory_format=torch.channels_last),
        lambda: [(x.to(memory_format=torch.channels_last), y) for x, y in numbers(64, 3, 32, 32)()],
        adam=False,
    ),
    "encoder": Net(
        "encoder 6 × 384, batch 8 × 64",
        lambda: nn.Sequential(encoder(384, 6, 6), nn.Flatten(), nn.Linear(384 * 64, 10)),
        numbers(8, 64, 384),
        adam=True,
    ),
    "lenet": Net("LeNet-300-100, batch 64", lenet, numbers(64, 784), adam=False),
    "lstm": Net("LSTM 2 × 512, batch 32 × 32", Recurrent, numbers(32, 32, 512), adam=True),
    "minilm": Net("text classifier as MiniLM-L6, 32 phrases", Phrases, phrases, adam=True),
    "embedding": Net(
        "embedding 100,000 × 64, batch 256 × 4",
        Bag,
        lambda: [(zipf(ROWS, 256, 4), torch.randint(0, 10, (256,))) for _ in range(2)],
        adam=True,
    ),
}
