"""Small networks of the kinds that people export, and what onnxruntime makes of a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from psc_lightning.app.models import LeNet5, ResNet20

WIDTH, WORDS = 64, 500


def encoder(**options: bool) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=True, activation="gelu", **options)
    made = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for parameter in made.parameters():  # the layers are copies of one, and equal constants are kept once
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return made


class TextEncoder(nn.Module):
    """As MiniLM: embeddings, an encoder, a mean over the words; the output weight is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(16, WIDTH)
        self.norm, self.encoder = nn.LayerNorm(WIDTH), encoder()
        self.decoder = nn.Linear(WIDTH, WORDS)
        self.decoder.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.norm(self.words(words) + self.positions(torch.arange(words.shape[1])))
        return self.decoder(self.encoder(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, bidirectional=True, batch_first=True)
        self.linear = nn.Linear(2 * WIDTH, 10)

    def forward(self, words: Tensor) -> Tensor:
        return self.linear(self.lstm(self.words(words))[0][:, -1])


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 17, WIDTH) * 0.02)
        self.encoder, self.norm = encoder(norm_first=True), nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), 1) + self.positions
        return self.linear(self.norm(self.encoder(x))[:, 0])


def words() -> Tensor:
    return torch.randint(0, WORDS, (2, 7))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "ResNet-20": (ResNet20, lambda: torch.randn(1, 3, 32, 32)),
    "LeNet-5": (LeNet5, lambda: torch.randn(1, 1, 28, 28)),
    "text encoder": (TextEncoder, words),
    "LSTM": (Recurrent, words),
    "vision transformer": (VisionTransformer, lambda: torch.randn(1, 3, 16, 16)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A network in eval, its BatchNorms as if trained, and an input."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make, example = NETS[name]
        model = make().eval()
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
                layer.weight.data.uniform_(0.5, 2)
                layer.bias.data.normal_()
        return model, example()


def session(path: Path, folded: Path | None = None, as_it_is: bool = False) -> onnxruntime.InferenceSession:
    """A session with the default options, or `as_it_is`, without optimisations; `folded` takes the graph that it runs."""
    options = onnxruntime.SessionOptions()
    if as_it_is:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    if folded is not None:
        options.optimized_model_filepath = str(folded)
        options.log_severity_level = 3  # it says that such a file suits this machine only
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(path: Path, x: Tensor, as_it_is: bool = False) -> Tensor:
    made = session(path, as_it_is=as_it_is)
    return torch.from_numpy(made.run(None, {made.get_inputs()[0].name: x.numpy()})[0])


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in units of the largest number where that is above 1."""
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / max(1.0, float(wanted.abs().max())))


def stripped_bytes(path: Path) -> int:
    """Bytes of a file without the values of its constants."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
    return model.ByteSize()
