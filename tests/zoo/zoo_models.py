"""The zoo: name → how to build a small network of that architecture, a batch for it, its loss.

All start from random numbers; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.models import convnext, efficientnet, mobilenetv3, swin_transformer, vision_transformer

__all__ = ["MODELS", "Entry"]

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """One network of the zoo.

    Attributes:
        home: the package that it comes from.
        build: makes it.
        batch: what it is trained on.
        output: network, batch → logits.
        loss: network, batch → a scalar.
        ignore: what cannot be compressed, and why the table says so.
        targets: patterns, where a default would leave out what it holds frozen.
    """

    home: str
    build: Callable[[], nn.Module]
    batch: Batch
    output: Callable[[nn.Module, Batch], Tensor]
    loss: Callable[[nn.Module, Batch], Tensor]
    ignore: tuple[str, str] | None = None
    targets: str | None = None


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _tokens(*shape: int, below: int = 40) -> Tensor:
    return torch.randint(3, below, shape, generator=torch.Generator().manual_seed(0))


def classifier(home: str, build: Callable[[], nn.Module], *shape: int) -> Entry:
    """A network that gives each of a batch's inputs one of four classes."""
    batch = {"x": _numbers(*shape), "y": torch.arange(shape[0]) % 4}
    return Entry(home, build, batch, lambda net, b: net(b["x"]), lambda net, b: cross_entropy(net(b["x"]), b["y"]))


def hugging_face(
    name: str, config: transformers.PretrainedConfig, ignore: tuple[str, str] | None = None, **batch: Tensor
) -> Entry:
    """A transformers model, which computes its own loss."""
    return Entry(
        "transformers",
        partial(getattr(transformers, name), config),
        batch,
        lambda net, b: net(**b).logits,
        lambda net, b: net(**b).loss,
        ignore,
    )


def mobilenet() -> nn.Module:
    settings, last = mobilenetv3._mobilenet_v3_conf("mobilenet_v3_small", width_mult=0.25)
    return mobilenetv3.MobileNetV3(settings, last_channel=last // 4, num_classes=4)


def efficient() -> nn.Module:
    blocks = [
        efficientnet.MBConvConfig(t, 3, s, i, o, 1) for t, s, i, o in ((1, 1, 8, 8), (4, 2, 8, 16), (4, 2, 16, 24))
    ]
    return efficientnet.EfficientNet(blocks, dropout=0.1, num_classes=4, last_channel=64)


def conv_next() -> nn.Module:
    blocks = [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, 48, 1), convnext.CNBlockConfig(48, None, 1)]
    return convnext.ConvNeXt(blocks, stochastic_depth_prob=0.1, num_classes=4)


def swin() -> nn.Module:
    return swin_transformer.SwinTransformer(
        [4, 4], 16, [2, 2], [2, 2], [2, 2], stochastic_depth_prob=0.1, num_classes=4
    )


def vit() -> nn.Module:
    return vision_transformer.VisionTransformer(
        image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=24, mlp_dim=48, dropout=0.1, num_classes=4
    )


class Recurrent(nn.Module):
    """Two recurrent layers, both ways, and a class by their mean."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(12, 16, num_layers=2, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0].mean(1))


class UNet(nn.Module):
    """One level down, one up by a transposed convolution, a skip between; it labels pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.deep = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2, groups=2)
        self.head = nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.head(torch.cat([skip, self.up(self.deep(skip))], 1))


def unet() -> Entry:
    """Its classes are those of pixels."""
    entry = classifier("torch", UNet, 2, 3, 16, 16)
    labels = _tokens(2, 16, 16, below=7) - 3
    return Entry(entry.home, entry.build, {**entry.batch, "y": labels}, entry.output, entry.loss)


class Volumes(nn.Sequential):
    """A sequence whose input is called as the batch calls it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def volumes() -> nn.Module:
    return Volumes(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 16, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4**3, 4),
    )


def gpt2_config() -> transformers.GPT2Config:
    return transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=24, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )


def adapted() -> nn.Module:
    """GPT-2, frozen, with trained low-rank adapters beside its Conv1D layers."""
    settings = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    return get_peft_model(transformers.GPT2LMHeadModel(gpt2_config()), settings)


TEXT = {"input_ids": _tokens(2, 10), "labels": _tokens(2, 10)}
ATTENTION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}

MODELS: dict[str, Entry] = {
    "ResNet": classifier(
        "timm",
        partial(timm.create_model, "resnet18", channels=(8, 16, 24, 32), stem_width=8, num_classes=4),
        2,
        3,
        32,
        32,
    ),
    "MobileNetV3": classifier("torchvision", mobilenet, 2, 3, 32, 32),
    "EfficientNet": classifier("torchvision", efficient, 2, 3, 16, 16),
    "ViT": classifier("torchvision", vit, 2, 3, 16, 16),
    "ViT, fused qkv": classifier(
        "timm",
        partial(
            timm.create_model, "test_vit", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2, num_classes=4
        ),
        2,
        3,
        32,
        32,
    ),
    "ConvNeXt": classifier("torchvision", conv_next, 2, 3, 16, 16),
    "Swin": classifier("torchvision", swin, 2, 3, 16, 16),
    "BERT": hugging_face(
        "BertForMaskedLM", transformers.BertConfig(vocab_size=40, max_position_embeddings=16, **ATTENTION), **TEXT
    ),
    "DistilBERT": hugging_face(
        "DistilBertForSequenceClassification",
        transformers.DistilBertConfig(
            vocab_size=40, max_position_embeddings=16, dim=24, n_layers=2, n_heads=2, hidden_dim=48, num_labels=4
        ),
        input_ids=TEXT["input_ids"],
        labels=torch.tensor([0, 3]),
    ),
    "GPT-2": hugging_face("GPT2LMHeadModel", gpt2_config(), **TEXT),
    "T5": hugging_face(
        "T5ForConditionalGeneration",
        transformers.T5Config(
            vocab_size=40,
            d_model=24,
            d_kv=12,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
        ),
        **TEXT,
    ),
    "Llama": hugging_face(
        "LlamaForCausalLM",
        transformers.LlamaConfig(vocab_size=40, max_position_embeddings=16, num_key_value_heads=1, **ATTENTION),
        **TEXT,
    ),
    "wav2vec2": hugging_face(
        "Wav2Vec2ForSequenceClassification",
        transformers.Wav2Vec2Config(
            **ATTENTION,
            conv_dim=(16, 16),
            conv_stride=(4, 4),
            conv_kernel=(8, 4),
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            num_labels=4,
            classifier_proj_size=16,
            mask_time_length=2,
            layerdrop=0.0,  # a layer left out is not trained in that step
        ),
        ignore=("*.pos_conv_embed.*", "weight-normed"),
        input_values=_numbers(2, 400),
        labels=torch.tensor([0, 3]),
    ),
    "LoRA on GPT-2": Entry(
        "peft", adapted, TEXT, lambda net, b: net(**b).logits, lambda net, b: net(**b).loss, targets="*"
    ),
    "LSTM": classifier("torch", partial(Recurrent, nn.LSTM), 2, 7, 12),
    "GRU": classifier("torch", partial(Recurrent, nn.GRU), 2, 7, 12),
    "U-Net": unet(),
    "3-D convolutions": classifier("torch", volumes, 2, 1, 8, 8, 8),
}
