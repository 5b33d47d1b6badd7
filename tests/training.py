"""A small network, its data and a Trainer, for tests that look at whole runs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer

from psc_lightning import (
    ActivationQuantization,
    ByteBudget,
    Distillation,
    MaskLearning,
    RatePenalty,
    StraightThroughQuantization,
    WeightSharing,
)
from psc_lightning.slots.live import compressed
from psc_lightning.slots.slots import Slots
from psc_lightning.training.conductor import Conductor
from psc_lightning.training.entry import KEY

# What Lightning says of small CPU runs; everything else stays an error.
QUIET = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before the epoch"),
    pytest.mark.filterwarnings("ignore:.*is not supported for this loader"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used"),
]

_generator = torch.Generator().manual_seed(0)
INPUTS = torch.randn(96, 2, 6, 6, generator=_generator)
LABELS = torch.randint(0, 4, (96,), generator=_generator)


class Loader:
    """Batches in a fixed order; remembers where it was, as a mid-epoch resume needs."""

    def __init__(self, size: int = 8, count: int = 12) -> None:
        self.size, self.count, self.next = size, count, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.next %= self.count  # Lightning stops at the last batch without asking for another
        while self.next < self.count:
            start = self.next * self.size
            self.next += 1
            yield INPUTS[start : start + self.size], LABELS[start : start + self.size]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def layers(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout) if dropout else nn.Identity(),
        nn.Linear(128, 4),
    )


class Net(LightningModule):
    def __init__(self, optimizer: str = "adamw", steps: int = 24, dropout: float = 0.0) -> None:
        super().__init__()
        self.optimizer_name, self.steps = optimizer, steps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = layers(dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        if self.optimizer_name == "sgd":
            sgd = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
            return [sgd], [torch.optim.lr_scheduler.StepLR(sgd, 1)]
        adamw = torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(adamw, max_lr=1e-2, total_steps=self.steps)
        return [adamw], [{"scheduler": schedule, "interval": "step"}]


class Shown(torch.optim.SGD):
    """SGD that lets a function look at what it is about to step: latent weights and their gradients."""

    def __init__(self, parameters: Any, look: Callable[[Optimizer], None], lr: float = 0.05, **options: Any) -> None:
        super().__init__(parameters, lr, **options)
        self.look = look

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        self.look(self)
        super().step()
        return loss


class CpuScaler(MixedPrecision):
    """fp16 with a GradScaler on a CPU, in the arithmetic of float32."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))

    def forward_context(self) -> Any:
        return torch.autocast("cpu", dtype=torch.float32, enabled=False)


def trainer(callbacks: Any = (), **options: Any) -> Trainer:
    callbacks = list(callbacks)
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any("Checkpoint" in type(callback).__name__ for callback in callbacks),
        "max_epochs": 2,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=callbacks, **{**quiet, **options})


def fit(callbacks: Any = (), model: LightningModule | None = None, ckpt: Any = None, **options: Any) -> Any:
    """Train a small network from seed 0; the model and its Trainer."""
    seed_everything(0, verbose=False)
    model = Net() if model is None else model
    made = trainer(callbacks, **options)
    made.fit(model, Loader(), Loader(count=2), ckpt_path=ckpt, **({"weights_only": True} if ckpt else {}))
    return model, made


def random_state() -> dict[str, Any]:
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Paths at which two nested states are not the same bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        bits = (tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
        return [] if same and torch.equal(*bits) else [path]
    if isinstance(a, np.ndarray):
        return [] if np.array_equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return [f"{path}: keys {list(a)} and {list(b)}"]
        return [found for key in a for found in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{path}: {len(a)} and {len(b)} items"]
        return [found for i, pair in enumerate(zip(a, b)) for found in differences(*pair, f"{path}.{i}")]
    return [] if type(a) is type(b) and a == b else [f"{path}: {a!r} and {b!r}"]


def conductor(made: Trainer) -> Conductor:
    """What of ours does something in a run."""
    (found,) = (callback for callback in made.callbacks if isinstance(callback, Conductor))
    return found


def slotted(model: nn.Module) -> Iterator[tuple[str, Slots, nn.Parameter]]:
    """Each compressed tensor: its name, its slots, its Parameter, which holds the hard weight."""
    for name, tensor, parameter in compressed(model):
        yield name, tensor.slots, parameter


def slots_at(model: nn.Module, name: str) -> Slots:
    """The slots of the tensor of that name."""
    return {own: slots for own, slots, _ in slotted(model)}[name]


def latents(model: nn.Module) -> dict[str, Tensor]:
    """Each compressed tensor's latent weight, as it is now."""
    return {name: tensor.dense(parameter).clone() for name, tensor, parameter in compressed(model)}


def sidecars(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained beside the weights."""
    return {f"{name}:{key}": p for name, slots, _ in slotted(model) for key, p in slots.named_parameters()}


def run_state(model: LightningModule, made: Trainer) -> dict[str, Any]:
    """All that a run leaves: what it trained, how it would go on."""
    ours: dict[str, Any] = {}
    for callback in made.callbacks:
        if isinstance(callback, Conductor):
            callback.on_save_checkpoint(made, model, ours)
    return {
        "model": dict(model.state_dict()),
        "optimizers": [optimizer.state_dict() for optimizer in made.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in made.lr_scheduler_configs],
        "metrics": dict(made.callback_metrics),
        "step": made.global_step,
        "ours": ours.get(KEY),
    }


A, Q, M, W = ActivationQuantization, StraightThroughQuantization, MaskLearning, WeightSharing

#: Callbacks of every method, in every order; `s` is their schedule.
COMBINATIONS: dict[str, Callable[[Any], list[Callback]]] = {
    "float": lambda s: [M("magnitude", threshold=0.5, schedule=s), Q("uniform", schedule=s)],
    "binary": lambda s: [Q("binary", schedule=s), M("magnitude", threshold=0.3, schedule=s)],
    "binary01": lambda s: [Q("binary", form="01", group=16, schedule=s)],
    "ternary_movement": lambda s: [Q("ternary", schedule=s), M("movement", threshold=0.6, schedule=s)],
    "saliency": lambda s: [M("saliency", threshold=0.6, calibration_steps=3, schedule=s), Q("log", schedule=s)],
    "fisher_rows": lambda s: [
        M("saliency", threshold=0.5, granularity="row", label="fisher", calibration_steps=4, schedule=s),
        Q("float16", schedule=s),
    ],
    "cross_channel": lambda s: [
        Q("uniform", bits=6, schedule=s),
        M("magnitude", threshold=0.25, schedule=s),
        W("cross_channel", groups=2, calibration_steps=3, schedule=s),
    ],
    "row": lambda s: [W("row", schedule=s), M("magnitude", threshold=0.2, group="channel", schedule=s), Q(schedule=s)],
    "column": lambda s: [Q("codebook", k=8, schedule=s), W("column", block=2, schedule=s)],
    "separable_lsq": lambda s: [
        W("separable", rank=2, schedule=s),
        M("magnitude", threshold=0.3, schedule=s),
        Q("uniform", bits=4, learned_step=True, schedule=s),
    ],
    "low_rank": lambda s: [M("movement", threshold=0.3, schedule=s), W("low_rank", schedule=s), Q("log", schedule=s)],
    "deep": lambda s: [M("movement", threshold=0.8, schedule=s), Q("codebook", schedule=s, refresh=2)],
    "channels": lambda s: [M("magnitude", threshold=0.5, granularity="channel", schedule=s, refresh=3)],
}

#: With a price on bytes, a budget, a teacher: what is steered and taught goes on where it was.
STEERED: dict[str, Callable[[Any], list[Callback]]] = {
    "priced": lambda s: [Q("ternary", schedule=s), RatePenalty(0.5, every=5)],
    "budget": lambda s: [
        Q("uniform", bits=3, group="tensor", learned_step=True, schedule=s),
        ByteBudget(1600, end=1.0),
        Distillation(),
    ],
    "budget_binary": lambda s: [M("magnitude", threshold=0.0, schedule=s), Q("binary", schedule=s), ByteBudget("28%")],
}

#: And one whose file, which holds weights only, is not all that the model computes with.
RUNS: dict[str, Callable[[Any], list[Callback]]] = {
    **COMBINATIONS,
    "integers": lambda s: [M("magnitude", threshold=0.2, schedule=s), Q("uniform", bits=7, schedule=s), A(schedule=s)],
}
