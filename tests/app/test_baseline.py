"""A user's checkpoint, in the forms people have it; and the cache of dense baselines."""

from __future__ import annotations

from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import nn

from psc_lightning.app import baseline
from psc_lightning.app.baseline import cached, fingerprint, read_checkpoint
from psc_lightning.app.errors import UsageError
from psc_lightning.app.models import DigitsCNN, LeNet5
from psc_lightning.app.task import Classifier


def classifier(net: nn.Module | None = None) -> Classifier:
    return Classifier(net or DigitsCNN(), torch.optim.SGD)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "net.", "module.net."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_forms_of_a_checkpoint(tmp_path: Path, prefix: str, wrapped: bool) -> None:
    net = DigitsCNN()
    state = {prefix + name: value for name, value in net.state_dict().items() if "num_batches" not in name}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else state, tmp_path / "x.pt")
    module = classifier()
    module.load_state_dict(read_checkpoint(tmp_path / "x.pt", module))
    assert torch.equal(module.net.conv1.weight, net.conv1.weight)


def test_errors_name_the_file_and_the_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    module = classifier()
    with pytest.raises(UsageError, match=r"model\.checkpoint=.*no such file"):
        read_checkpoint(path, module)
    torch.save(LeNet5().state_dict(), path)
    with pytest.raises(
        UsageError,
        match=r"another architecture.*conv1\.weight is \(20, 1, 5, 5\).*missing bn1\.weight.*; give a checkpoint of",
    ):
        read_checkpoint(path, module)
    state = DigitsCNN().state_dict()
    torch.save(state | {"extra.weight": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match=r"unexpected extra\.weight"):
        read_checkpoint(path, module)
    state["conv2.weight"][3, 2, 1, 0] = float("nan")
    torch.save(state, path)
    with pytest.raises(UsageError, match=r"NaN or infinity in net\.conv2\.weight; give one from before"):
        read_checkpoint(path, module)
    torch.save(DigitsCNN(), path)  # a pickled object
    with pytest.raises(UsageError, match="weights_only=True"):
        read_checkpoint(path, module)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UsageError, match="damaged"):
        read_checkpoint(path, module)
    torch.save([1, 2], path)
    with pytest.raises(UsageError, match="not a state dict"):
        read_checkpoint(path, module)


def test_a_baseline_is_trained_once_for_the_same_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = classifier()
    trained = []

    def train(work: Path) -> Classifier:
        trained.append(work)
        return module

    key = fingerprint({"seed": 0}, module)
    first = cached(tmp_path, key, train)
    again = cached(tmp_path, key, train)
    assert len(trained) == 1
    assert all(torch.equal(first[name], again[name]) for name in module.state_dict())
    assert fingerprint({"seed": 1}, module) != key
    with torch.no_grad():
        module.net.conv1.weight += 1
    assert fingerprint({"seed": 0}, module) != key
    key = fingerprint({"seed": 0}, module)
    monkeypatch.setattr(torch, "__version__", "another")
    assert fingerprint({"seed": 0}, module) != key


def test_two_at_once_train_a_baseline_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second asks while the first trains, and gets what that has trained."""
    trained, found = [], []
    asked = Event()

    class Lock(FileLock):
        def acquire(self, *args: Any, **settings: Any) -> Any:
            if trained:
                asked.set()
            return super().acquire(*args, **settings)

    def train(work: Path) -> Classifier:
        trained.append(work)
        if len(trained) == 1:
            second.start()
            assert asked.wait(60)
        return classifier()

    def ask() -> None:
        found.append(cached(tmp_path, "key", train))

    second = Thread(target=ask)
    monkeypatch.setattr(baseline, "FileLock", Lock)
    ask()
    second.join(60)
    assert len(trained) == 1
    assert torch.equal(*(state["net.conv1.weight"] for state in found))


def test_a_baseline_that_fails_leaves_no_file(tmp_path: Path) -> None:
    def train(work: Path) -> Classifier:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="luck"):
        cached(tmp_path, "key", train)
    assert not list(tmp_path.glob("*.pt"))
