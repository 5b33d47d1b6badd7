"""A table that grows while it is compressed, as `resize_token_embeddings` does, is compressed as a whole again."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training import QUIET, conductor, slots_at, trainer

from psc_lightning import MaskLearning, StraightThroughQuantization, attach, compress, detach, load, measure, save

pytestmark = QUIET

TOKENS = torch.randint(0, 20, (48, 4), generator=torch.Generator().manual_seed(0))


class Words(LightningModule):
    def __init__(self, tied: bool = True, number: int = 16) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.table, self.body = nn.Embedding(number, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, number, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def training_step(self, batch, batch_idx):
        tokens = batch[0] % len(self.table.weight)
        return nn.functional.cross_entropy(self.head(self.body(self.table(tokens).mean(1))), tokens[:, 0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


def grow(model: Words, how: str, tied: bool) -> None:
    """Four words more."""
    longer = torch.cat([model.table.weight.detach(), torch.linspace(-1, 1, 32).reshape(4, 8)])
    if how == "data":
        model.table.weight.data = longer
    elif how == "parameter":
        model.table.weight = nn.Parameter(longer)
    else:
        model.table = nn.Embedding.from_pretrained(longer, freeze=False)
    if tied:
        model.head.weight = model.table.weight
    else:
        model.head = nn.Linear(8, 20, bias=False)


def run(model: Words, *callbacks):
    made = trainer(callbacks, max_epochs=1)
    made.fit(model, DataLoader(TensorDataset(TOKENS), batch_size=8))
    return made


HOWS = [("data", True), ("parameter", True), ("layer", True), ("data", False), ("parameter", False)]


@pytest.mark.parametrize(("how", "tied"), HOWS)
def test_the_file_holds_the_longer_table_compressed(how, tied, tmp_path):
    model = Words(tied)
    compress(model, "binary", targets=["table", "body"])
    before = model.table.weight.detach().clone()
    grow(model, how, tied)
    rows = {row.name: row for row in measure(model).tensors}
    assert rows["table.weight"].shape == (20, 8)
    assert rows["table.weight"].method == "magnitude+binary"
    assert rows["head.weight"].method == ("shared" if tied else "plain")
    save(model, tmp_path / "model.psc")
    found = load(tmp_path / "model.psc")
    assert torch.equal(found["table.weight"][:16], before)
    assert all(row.abs().unique().numel() == 1 for row in found["table.weight"][16:])
    detach(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, found[name]), name


@pytest.mark.filterwarnings(
    "ignore:.* of it is zero already"
)  # a new layer has the zeros that ternary gave the old one
@pytest.mark.parametrize(("how", "tied"), HOWS)
def test_training_goes_on_with_the_longer_table(how, tied, tmp_path):
    """Scores of the new size learn, and what comes out is the file's."""
    callbacks = [MaskLearning("movement", threshold=0.5, schedule="constant", targets=["table", "body"]),
                 StraightThroughQuantization("ternary", schedule="constant", targets=["table", "body"])]  # fmt: skip
    model = Words(tied)
    run(model, *callbacks)
    grow(model, how, tied)
    made = run(model, *callbacks)
    slots = slots_at(model, "table.weight")
    assert slots.stored_shape == (20, 8)
    (scores,) = slots.sidecars("mask")
    assert scores.numel() == 160
    assert scores.detach().reshape(20, 8)[16:].any()
    assert any(parameter is scores for parameter in conductor(made).cast.sidecars.parameters)
    assert 80 <= int((model.table.weight == 0).sum()) < 140
    save(model, tmp_path / "model.psc")
    plain = Words(tied, 20)
    plain.load_state_dict(load(tmp_path / "model.psc"))
    assert torch.equal(plain.table.weight, model.table.weight)


def test_before_anything_has_begun():
    callbacks = [StraightThroughQuantization("binary", schedule="constant")]
    model = Words()
    attach(model, callbacks)
    grow(model, "parameter", True)
    run(model, *callbacks)
    assert slots_at(model, "table.weight").stored_shape == (20, 8)
    assert all(row.abs().unique().numel() == 1 for row in model.table.weight.detach())


def test_weights_that_were_one_and_are_two_now(tmp_path):
    callbacks = [StraightThroughQuantization("binary", schedule="constant")]
    model = Words()
    run(model, *callbacks)
    model.head.weight = nn.Parameter(torch.randn(16, 8))
    save(model, tmp_path / "model.psc")
    assert torch.equal(load(tmp_path / "model.psc")["head.weight"], model.head.weight)
    run(model, *callbacks)
    assert slots_at(model, "head.weight") is not slots_at(model, "table.weight")
    save(model, tmp_path / "model.psc")
    for name, value in load(tmp_path / "model.psc").items():
        assert torch.equal(value, model.state_dict()[name]), name
