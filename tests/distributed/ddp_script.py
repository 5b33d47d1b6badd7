"""Trains under DDP with two gloo processes, or alone with the double batch, and writes what came out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from training import RUNS, Loader, Net, conductor, latents, layers, sidecars, slotted

import psc_lightning
from psc_lightning.activations import activations
from psc_lightning.callbacks.slot import SlotCallback

torch.set_num_threads(1)

# Every method of every slot.
NAMES = ("float", "binary", "ternary_movement", "saliency", "fisher_rows", "cross_channel", "row", "column")
NAMES += ("separable_lsq", "low_rank", "deep", "integers")


class Nets(Net):
    """A network for each combination, all in one run; without BatchNorm, whose statistics are of each process's half."""

    def __init__(self, names: Sequence[str] = NAMES) -> None:
        super().__init__()
        del self.net
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.nets = nn.ModuleDict({f"of_{name}": layers() for name in names})
        for net in self.nets.values():
            net[1] = nn.Identity()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return sum(nn.functional.cross_entropy(net(batch[0]), batch[1]) for net in self.nets.values())

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


class Shares(Loader):
    """Samples are dealt in turn: two batches of four are one of eight."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels in super().__iter__():
            yield inputs[self.rank :: self.world], labels[self.rank :: self.world]


class Keep(Callback):
    """Saves a checkpoint after some step, in the midst of the ramps and of the epoch; notes the norms of all gradients."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step
        self.norms: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.norms.append(trainer.callback_metrics.get("grad_norm/before", torch.tensor(0.0)))
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Measures(Callback):
    """Asks for the size on the last rank alone, which no other rank waits for, and which changes nothing."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank == 1:
            psc_lightning.measure(pl_module)


def slot_callbacks(names: Sequence[str]) -> list[SlotCallback]:
    found = []
    for name in names:
        for callback in RUNS[name]({"kind": "linear", "begin": 3, "end": 8}):
            callback.targets = [f"nets.of_{name}.*.weight"]
            found.append(callback)
    return found


def trainer(callbacks: Sequence[Callback], **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        max_epochs=1,
        val_check_interval=4,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def beside(model: nn.Module) -> dict[str, Tensor]:
    """What lies beside the weights: ``<name>:latent``, buffers and Parameters of each tensor's slots, ranges of inputs."""
    found = {f"{name}:latent": latent for name, latent in latents(model).items()}
    for name, _, inputs in activations(model):
        found |= {f"{name}:inputs.{key}": value for key, value in inputs.training_state().items()}
    return found | {
        f"{name}:{key}": value for name, slots, _ in slotted(model) for key, value in slots.state_dict().items()
    }


def main(devices: int, folder: Path) -> None:
    """In double precision a sum in another order is no reason to drop, or to round, another weight."""
    warnings.simplefilter("ignore")
    for run in ("", "-resumed", "-double") if devices > 1 else ("-double",):
        seed_everything(0, verbose=False)
        callbacks = slot_callbacks(NAMES)
        made = trainer(
            [*callbacks, Measures(), Keep(folder / f"{devices}{run}.ckpt", step=12 if run else 6)],
            devices=devices,
            precision="64-true" if run == "-double" else "32-true",
            strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=False) if devices > 1 else "auto",
        )
        model = Nets()
        data = [Shares(made.global_rank, devices) for _ in range(2)]
        made.fit(model, *data, ckpt_path=folder / f"{devices}.ckpt" if run == "-resumed" else None)
        state = {**model.state_dict(), "steps": torch.tensor(made.global_step), **beside(model)}
        optimizer = conductor(made).cast.sidecars.optimizer
        for name, sidecar in sidecars(model).items():
            state |= {f"{name}.{key}": value for key, value in optimizer.state[sidecar].items()}
        torch.save(state, folder / f"{devices}{run}-{made.global_rank}.pt")
        psc_lightning.save(model, folder / f"{devices}{run}-{made.global_rank}.psc")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
