"""Trains under a byte budget, and under a price, in two gloo processes by DDP and by FSDP2, and writes what came out."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from ddp_script import Keep, Nets, Shares, trainer
from fsdp_script import Sharded, end, fsdp
from lightning.pytorch import seed_everything
from lightning.pytorch.strategies import DDPStrategy

from psc_lightning import ByteBudget, RatePenalty, StraightThroughQuantization

torch.set_num_threads(1)

NAME = ("priced",)
PENALTIES = {"budget": lambda: ByteBudget(1_300), "price": lambda: RatePenalty(0.5, every=4)}


def run(model: Nets, folder: Path, name: str, penalty: str, resumes: str | None = None, **options: Any) -> None:
    """Each process sees its half of every batch."""
    seed_everything(0, verbose=False)
    levels = StraightThroughQuantization(
        "uniform", bits=3, group="tensor", learned_step=True, step_lr=1e-3, schedule="constant"
    )
    steer = PENALTIES[penalty]()
    made = trainer([levels, steer, Keep(folder / f"{name}.ckpt", 9)], **options)
    data = [Shares(made.global_rank, made.world_size) for _ in range(2)]
    made.fit(model, *data, ckpt_path=None if resumes is None else folder / f"{resumes}.ckpt")
    end(model, made, folder, name, weight=steer.weight, rate=steer.rate.bits)


def main(devices: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    folder /= str(devices)
    folder.mkdir(exist_ok=True)
    for penalty in PENALTIES:
        ddp = {"devices": 2, "strategy": DDPStrategy(process_group_backend="gloo")}
        run(Nets(NAME), folder, f"{penalty}_ddp", penalty, **ddp)
        run(Sharded(NAME), folder, f"{penalty}_fsdp", penalty, **fsdp())
        run(Sharded(NAME), folder, f"{penalty}_resumed", penalty, f"{penalty}_fsdp", **fsdp())


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
