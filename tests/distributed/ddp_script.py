"""Trains under DDP with two gloo processes, or alone with the double batch, and writes what came out."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import COMBINATIONS, INPUTS, LABELS, Net, layers

torch.set_num_threads(1)

NAMES = ("float", "ternary_movement", "separable_lsq", "cross_channel", "saliency", "column", "low_rank")


class Nets(Net):
    """A network for each combination, all in one run; without BatchNorm, whose statistics are of each process's half."""

    def __init__(self) -> None:
        super().__init__()
        del self.net
        self.nets = nn.ModuleDict({f"of_{name}": layers() for name in NAMES})
        for net in self.nets.values():
            net[1] = nn.Identity()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return sum(nn.functional.cross_entropy(net(batch[0]), batch[1]) for net in self.nets.values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def main(devices: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    seed_everything(0, verbose=False)
    callbacks = []
    for name in NAMES:
        for callback in COMBINATIONS[name]({"kind": "linear", "begin": 3, "end": 8}):
            callback.targets = [f"nets.of_{name}.*.weight"]
            callbacks.append(callback)
    made = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=False) if devices > 1 else "auto",
        use_distributed_sampler=False,
        callbacks=callbacks,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Samples are dealt in turn: two batches of four are one of eight.
    mine = slice(made.global_rank, None, devices)
    model = Nets()
    made.fit(model, DataLoader(TensorDataset(INPUTS[mine], LABELS[mine]), batch_size=8 // devices))
    state = {key: value.detach().clone() for key, value in model.state_dict().items()}
    state["steps"] = torch.tensor(made.global_step)
    for callback in callbacks:
        if callback._optimizer is not None:
            for index, slot in enumerate(callback._optimizer.state.values()):
                state |= {f"{callback.state_key}.{index}.{key}": value for key, value in slot.items()}
    made.save_checkpoint(folder / f"{devices}.ckpt")
    torch.save(state, folder / f"{devices}-{made.global_rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
