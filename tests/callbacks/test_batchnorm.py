"""BatchNorm's statistics are those of the weights as they are, before each validation and at the end (case 25)."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from psc_lightning import StraightThroughQuantization, refresh_batchnorm, save

BATCHES = 6


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))
        self.seen: list[torch.Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch[0])
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def data(**options: Any) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCHES * 32, 8, generator=generator) * 3 + 1
    return DataLoader(TensorDataset(x, (x[:, 0] > 1).long()), 32, **options)


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # of a run that goes on
    warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")


def fit(model: LightningModule, *callbacks: Callback, path: Any = None, **options: Any) -> Trainer:
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(
        callbacks=list(callbacks), **{"max_epochs": 2, "enable_checkpointing": False, **settings, **options}
    )
    torch.manual_seed(2)
    trainer.fit(model, data(), data(), ckpt_path=path)
    return trainer


def binary(batches: int | None = None) -> StraightThroughQuantization:
    return StraightThroughQuantization("binary", refresh_batchnorm=batches, schedule="constant")


def mean_over(model: Net, batches: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.stack([model.net[0](x).mean(0) for x in batches]).mean(0)


@pytest.mark.parametrize(("asked", "taken"), [(None, 8), (3, 3), (100, 2 * BATCHES)])
def test_the_end_has_the_statistics_of_the_last_batches(asked: int | None, taken: int):
    model = Net()
    fit(model, binary(asked))
    torch.testing.assert_close(model.net[1].running_mean, mean_over(model, model.seen[-taken:]))
    assert int(model.net[1].num_batches_tracked) == 2 * BATCHES  # as in training
    assert model.net[1].momentum == 0.1
    assert all(module.training for module in model.net)


def test_zero_leaves_the_running_average():
    plain, ours = Net(), Net()
    fit(plain, binary(0))
    fit(ours, binary())
    assert all(map(torch.equal, plain.net.parameters(), ours.net.parameters()))
    assert not torch.equal(plain.net[1].running_mean, ours.net[1].running_mean)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(plain.net[1].running_mean, mean_over(plain, plain.seen[-8:]))


def test_validations_see_them_and_training_does_not():
    class Look(Callback):
        def __init__(self) -> None:
            self.right: list[bool] = []

        def on_validation_batch_start(self, trainer: Trainer, model: Any, *args: Any) -> None:
            if not trainer.sanity_checking:
                last = trainer.global_step == 2 * BATCHES
                mean = mean_over(model, model.seen[-8:] if last else model.seen[-1:])  # 2 % of six batches' time: one
                self.right.append(torch.allclose(model.net[1].running_mean, mean, atol=1e-6))

    look, with_it, without = Look(), Net(), Net()
    fit(with_it, binary(), look)
    fit(without, binary(0))
    assert look.right == [True] * 2 * BATCHES
    assert all(map(torch.equal, with_it.net.parameters(), without.net.parameters()))


def test_no_random_number_is_drawn_and_modules_are_plain_between_steps():
    class Plain(Callback):
        def on_train_batch_end(self, trainer: Trainer, model: Any, *args: Any) -> None:
            assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
            copy.deepcopy(model.net)

    states = []
    for batches in (0, 5):
        fit(Net(), binary(batches), Plain() if batches else Callback())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_frozen_statistics_stay_and_nothing_happens_before_a_slot_begins():
    model = Net()
    model.net[1].eval()
    with pytest.warns(UserWarning, match="eval mode"):  # Lightning's
        fit(model, binary())
    assert model.net[1].running_mean.count_nonzero() == 0
    early, off = Net(), Net()
    late = StraightThroughQuantization("binary", schedule={"kind": "constant", "begin": 1000})
    with pytest.warns(UserWarning, match="never began"):
        fit(early, late)
    fit(off)
    assert all(map(torch.equal, early.state_dict().values(), off.state_dict().values()))


def test_a_run_stopped_in_mid_epoch_goes_on_with_the_inputs_of_before(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == BATCHES + 4:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    whole, again = Net(), Net()
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    fit(whole, binary(5), Stop(), **options)
    kept = torch.load(tmp_path / "mid.ckpt", weights_only=True)["psc_lightning"]["inputs"]
    kept = [x for (x,), names in kept if not names]
    assert len(kept) == 5
    assert all(map(torch.equal, kept, whole.seen[BATCHES - 1 : BATCHES + 4]))
    fit(again, binary(5), path=tmp_path / "mid.ckpt", max_epochs=-1, max_steps=BATCHES + 5, **options)
    assert len(again.seen) == 1
    torch.testing.assert_close(again.net[1].running_mean, mean_over(again, [*kept[1:], *again.seen]))


def test_a_checkpoint_holds_the_statistics_of_its_weights(tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, model: Any, *args: Any) -> None:
            path = tmp_path / "any.ckpt"
            trainer.save_checkpoint(path)
            state = torch.load(path, weights_only=True)["state_dict"]
            last = trainer.global_step == 2 * BATCHES
            torch.testing.assert_close(state["net.1.running_mean"], mean_over(model, model.seen[-8 if last else -1 :]))

    saved, alone = Net(), Net()
    fit(saved, binary(), Save())
    fit(alone, binary())
    assert all(map(torch.equal, saved.state_dict().values(), alone.state_dict().values()))


def test_of_large_batches_as_many_samples_are_kept_as_fit(monkeypatch):
    monkeypatch.setattr("psc_lightning.training.batchnorm._BYTES", 10 * 8 * 4)
    model = Net()
    fit(model, binary(2))
    torch.testing.assert_close(model.net[1].running_mean, mean_over(model, [x[:10] for x in model.seen[-2:]]))


def test_a_model_that_cannot_be_called_with_a_batch_is_told():
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.BatchNorm1d(4)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.other(self.net(batch[0])), batch[1])

    class Pair(Two):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.other(self.net(x + y))

    for kind, why in ((Two, "no `forward`"), (Pair, "forward needs x, y, and which of a batch's 2 entries")):
        with pytest.warns(UserWarning, match=f"could not be taken anew.*{why}") as told:
            fit(kind(), binary())
        assert len([one for one in told if "refresh_batchnorm" in str(one.message)]) == 1


class Taker(LightningModule):
    """A BatchNorm of what `forward` computes; its subclasses say what that takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm, self.head = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 1)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layer(x)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ByName(Taker):
    """As a transformer: what it takes by name, labels among them; what else is in a batch is not for it."""

    def forward(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: Any = None
    ) -> Any:
        assert attention_mask is not None
        return self.inner(input_values * attention_mask)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        named = {name: batch[name] for name in ("input_values", "attention_mask", "labels")}
        return (self(**named) - batch["labels"]).square().mean()


class OfAnyName(Taker):
    def forward(self, **names: torch.Tensor) -> torch.Tensor:
        return self.inner(names["a"] * names["b"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(**batch).mean()


class OfTwo(Taker):
    """Two inputs, then a target."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.inner(x * mask)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self(batch[0], batch[1]) - batch[2]).square().mean()


class OfAPair(OfTwo):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return (self(*batch[0]) - batch[1]).square().mean()


class OneOfMany(Taker):
    """A mapping of which no name is the input's: what it is called with cannot be known."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self(batch["image"]).mean()


def items(kind: type) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(BATCHES * 32, 8, generator=generator) * 3 + 1, torch.ones(BATCHES * 32, 1)
    m = (torch.rand(x.shape, generator=generator) > 0.3).float()
    names = {
        ByName: lambda i: {"input_values": x[i], "attention_mask": m[i], "labels": y[i], "idx": i},
        OfAnyName: lambda i: {"a": x[i], "b": m[i]},
        OfTwo: lambda i: (x[i], m[i], y[i]),
        OfAPair: lambda i: ((x[i], m[i]), y[i]),
        OneOfMany: lambda i: {"image": x[i], "label": y[i]},
    }
    return [names[kind](i) for i in range(len(x))]


@pytest.mark.parametrize("kind", [ByName, OfAnyName, OfTwo, OfAPair])
def test_a_model_gets_what_its_signature_asks_of_a_batch(kind: type, tmp_path: Any):
    loader, model = DataLoader(items(kind), 32), kind()
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[binary(100)], enable_checkpointing=False, max_epochs=1, **settings)
    trainer.fit(model, loader)
    x, m = (
        torch.stack(part)
        for part in zip(
            *[
                (list(one.values()) if isinstance(one, dict) else one)[:2]
                for one in (item if kind is not OfAPair else item[0] for item in items(kind))
            ]
        )
    )
    with torch.no_grad():
        mean = model.layer(x * m).mean(0)
    torch.testing.assert_close(model.norm.running_mean, mean)
    assert save(model, tmp_path / "model.psc").batchnorm_batches == BATCHES
    model.norm.reset_running_stats()
    assert refresh_batchnorm(model, loader) == BATCHES
    torch.testing.assert_close(model.norm.running_mean, mean)


def test_names_that_fit_none_of_a_models_are_told_not_guessed(tmp_path: Any):
    loader, model = DataLoader(items(OneOfMany), 32), OneOfMany()
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(callbacks=[binary()], enable_checkpointing=False, max_epochs=1, **settings)
    with pytest.warns(UserWarning, match=r"could not be taken anew \(forward takes x, a batch has image, label\)"):
        trainer.fit(model, loader)
    report = save(model, tmp_path / "model.psc")
    assert report.batchnorm_batches == 0
    assert "BatchNorm's statistics: running averages of training" in str(report)
    with pytest.raises(ValueError, match=r"^batches: forward takes x, a batch has image, label: give forward="):
        refresh_batchnorm(model, loader)
    assert refresh_batchnorm(model, loader, forward=lambda net, batch: net(batch["image"])) == BATCHES
    assert "taken anew from 6 training batches" in str(save(model, tmp_path / "model.psc"))


def test_the_function_takes_them_from_any_batches():
    model = Net().eval()
    batches = list(data())
    assert refresh_batchnorm(model.net, batches) == BATCHES
    torch.testing.assert_close(model.net[1].running_mean, mean_over(model, [x for x, _ in batches]))
    assert not any(module.training for module in model.modules())
    assert refresh_batchnorm(model.net, iter(batches[:2]), forward=lambda net, batch: net(batch[0])) == 2
    torch.testing.assert_close(model.net[1].running_mean, mean_over(model, [x for x, _ in batches[:2]]))
    assert refresh_batchnorm(nn.Linear(8, 2), batches) == 0


def test_a_network_without_batchnorm_keeps_nothing():
    model = Net()
    model.net[1] = nn.Identity()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".*does not have many workers")
        fit(model, binary())
