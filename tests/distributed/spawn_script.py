"""Trains alone; in processes that this one starts and that hand back a state dict; and there without having attached."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from ddp_script import trainer
from lightning.pytorch import seed_everything
from training import COMBINATIONS, Loader, Net, latents

import psc_lightning
from psc_lightning import ActivationQuantization
from psc_lightning.activations import activations


def main(devices: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in ("ternary_movement", "separable_lsq"):
        seed_everything(0, verbose=False)
        model = Net("sgd")
        schedule = {"kind": "linear", "begin": 3, "end": 8}
        callbacks = [*COMBINATIONS[name](schedule), ActivationQuantization(4, schedule=schedule)]
        psc_lightning.attach(model, callbacks)
        made = trainer(callbacks, devices=devices, strategy="ddp_spawn" if devices > 1 else "auto")
        made.fit(model, Loader(), Loader(count=1))
        psc_lightning.save(model, folder / f"{devices}-{name}.psc")
        ranges = {
            f"{layer}.{key}": value
            for layer, _, found in activations(model)
            for key, value in found.training_state().items()
        }
        states = {"model": dict(model.state_dict()), "latents": latents(model), "ranges": ranges}
        torch.save(states, folder / f"{devices}-{name}.pt")
    if devices > 1:
        try:
            trainer(callbacks, devices=1, strategy="ddp_spawn").fit(Net("sgd"), Loader(), Loader(count=1))
        except Exception as error:  # torch wraps what happens in another process
            (folder / "refused").write_text(str(error))


if __name__ == "__main__":
    for number in (1, int(sys.argv[1])):
        main(number, Path(sys.argv[2]))
