"""A table's padding row, which is zero, stays exactly zero under every method, in the model and in its file."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import QUIET, trainer

from psc_lightning import MaskLearning, StraightThroughQuantization, WeightSharing, compress, load, save
from psc_lightning.levels import LEVELS
from psc_lightning.masks import MASKS
from psc_lightning.masks.units import GRANULARITIES
from psc_lightning.slots.live import compressed

pytestmark = QUIET

TOKENS = torch.randint(0, 12, (48, 4), generator=torch.Generator().manual_seed(0))


def words(kind: type[nn.Module] = nn.Embedding, padding: int | None = 3) -> nn.Sequential:
    torch.manual_seed(0)
    table = kind(12, 16, padding_idx=padding)
    return nn.Sequential(table, nn.Flatten(), nn.Linear(64 if kind is nn.Embedding else 16, 8))


def zero_rows(weight: Tensor) -> list[int]:
    return (weight == 0).all(1).nonzero().flatten().tolist()


def shrunk(model: nn.Module, tmp_path, *callbacks) -> Tensor:
    """The table after compression; its file has the same bits, and no -0.0 in that row."""
    batches = [TOKENS[:8], TOKENS[8:16]]
    compress(model, callbacks, batches=batches, loss=lambda net, batch: net(batch).square().mean())
    save(model, tmp_path / "model.psc")
    found = load(tmp_path / "model.psc")["0.weight"]
    assert torch.equal(found.view(torch.int32), model[0].weight.detach().view(torch.int32))
    return found


LEVELS_AND_OPTIONS = [
    *((name, {}) for name in LEVELS),
    ("binary", {"form": "01"}),
    ("binary", {"group": "tensor"}),
    ("codebook", {"group": 7}),  # groups that reach over rows
    ("uniform", {"bits": 1, "group": 5}),
]


@pytest.mark.parametrize(("levels", "options"), LEVELS_AND_OPTIONS)
@pytest.mark.parametrize("tying", [None, "row", "cross_channel", "low_rank"])
def test_levels_without_a_zero_leave_it(levels, options, tying, tmp_path):
    callbacks = [StraightThroughQuantization(levels, **options)] + ([WeightSharing(tying)] if tying else [])
    assert zero_rows(shrunk(words(), tmp_path, *callbacks)) == [3]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_every_granularity_leave_it(mask, granularity, tmp_path):
    masked = MaskLearning(mask, threshold=0.1, granularity=granularity, block=None)
    assert 3 in zero_rows(shrunk(words(), tmp_path, masked, StraightThroughQuantization("binary")))


def test_a_bag_of_them_too_and_the_last_row(tmp_path):
    assert zero_rows(shrunk(words(nn.EmbeddingBag, 11), tmp_path, StraightThroughQuantization("binary"))) == [11]


def test_it_has_no_part_in_a_scale(tmp_path):
    """±s of the whole table, s the mean of |w| over the other rows."""
    model = words()
    with torch.no_grad():
        model[0].weight.fill_(1.0)[3] = 0.0
    found = shrunk(model, tmp_path, StraightThroughQuantization("binary", group="tensor"))
    assert found.unique().tolist() == [0.0, 1.0]


def test_a_row_that_is_no_zero_is_one_like_others(tmp_path):
    """Pretrained tables have such; and without padding_idx a row of zeros gets what the levels have."""
    model = words()
    with torch.no_grad():
        model[0].weight[3] = 0.5
    assert zero_rows(shrunk(model, tmp_path, StraightThroughQuantization("binary"))) == []
    model = words(padding=None)
    with torch.no_grad():
        model[0].weight[3] = 0.0
    assert zero_rows(shrunk(model, tmp_path, StraightThroughQuantization("binary", group="tensor"))) == []


def test_column_sharing_cannot_and_says_so():
    model = words()
    taken = WeightSharing("column", targets="*").choose(model)
    assert taken.skipped["0.weight"].endswith("would become equal, and its padding_idx would not stay zero")
    with pytest.raises(ValueError, match=r"0\.weight cannot be tied by 'column'.*padding_idx would not stay zero"):
        WeightSharing("column", targets="0.weight").choose(model)


class Reader(LightningModule):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.net = words()
        self.out = nn.Linear(16, 12, bias=False)
        if tied:
            self.out.weight = self.net[0].weight

    def training_step(self, batch, batch_idx):
        logits = self.out(self.net[0](batch[0]).mean(1))
        return nn.functional.cross_entropy(logits, batch[0][:, 0]) + self.net(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2, weight_decay=0.1)


def run(callbacks, model):
    trainer(callbacks).fit(model, DataLoader(TensorDataset(TOKENS), batch_size=8))
    return next(iter(compressed(model)))


TYINGS = {
    "none": list,
    "low_rank": lambda: [WeightSharing("low_rank", targets="net.0", schedule="constant")],
    "cross_channel": lambda: [WeightSharing("cross_channel", labels="magnitude", targets="net.0", schedule="constant")],
}


@pytest.mark.parametrize("tying", TYINGS)
def test_in_training_it_stays(tying):
    levels = StraightThroughQuantization("codebook", k=4, targets="net.0")
    model = Reader()
    _, tensor, _ = run([levels, MaskLearning("movement", targets="net.0"), *TYINGS[tying]()], model)
    assert 3 in zero_rows(model.net[0].weight)
    assert len(zero_rows(model.net[0].weight)) < 6
    assert not tensor.latent[3].any()


def test_a_tied_head_trains_it_as_in_the_plain_model():
    model = Reader(tied=True)
    _, tensor, _ = run([StraightThroughQuantization("binary", targets="net.0", schedule="constant")], model)
    assert tensor.latent[3].all()
    assert model.net[0].weight[3].all()
