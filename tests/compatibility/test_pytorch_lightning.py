"""`pytorch_lightning`, the other name of Lightning: its Trainer and its LightningModule, our callbacks."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from training import COMBINATIONS, INPUTS, QUIET, Loader, layers, slotted

from psc_lightning import GradientClipping, load, save
from psc_lightning.artifact import to_bytes

pytestmark = QUIET

RAMP = {"kind": "linear", "begin": 4, "end": 12}


class Other(pl.LightningModule):
    """A user's module by the old import."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = layers()

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


def fit(folder, ckpt=None):
    pl.seed_everything(0, verbose=False)
    model = Other()
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    made = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*COMBINATIONS["separable_lsq"](RAMP), GradientClipping(max_norm=1.0), saver],
    )
    made.fit(model, Loader(), ckpt_path=ckpt)
    return model


def test_it_trains_saves_plain_checkpoints_and_resumes(tmp_path):
    model = fit(tmp_path / "whole")
    assert all(slots.begun for _, slots, _ in slotted(model))
    save(model, tmp_path / "model.psc")
    state = torch.load(tmp_path / "whole" / "step=24.ckpt", weights_only=True)["state_dict"]
    for weights in (load(tmp_path / "model.psc"), state):
        plain = Other()
        plain.load_state_dict(weights)
        with torch.no_grad():
            assert torch.equal(plain.net.eval()(INPUTS), model.net.eval()(INPUTS))
    resumed = fit(tmp_path / "resumed", ckpt=tmp_path / "whole" / "step=9.ckpt")
    assert to_bytes(resumed)[0] == to_bytes(model)[0]
