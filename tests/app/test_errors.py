"""A wrong setting: one line with its key, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from psc_lightning.app.build import check_settings
from psc_lightning.app.errors import UsageError
from psc_lightning.app.models import LeNet5
from psc_lightning.app.run_folder import register_resolvers
from psc_lightning.configs import config_dir

Command = Callable[..., tuple[int, str]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compression=foo"], ["compression/foo", "binary codebook column"]),
        (["compression=binary", "compression.threshold=1.5"], ["threshold", "1.5", "0 ≤ threshold < 1"]),
        (["compression=float", "compression.bits=-1"], ["bits", "1 to 8", "-1"]),
        (["compression=binary", "compression.targets=nothing.*"], ["targets", "nothing.*", "net.conv1.weight"]),
        (["compression.targets=re:.*conv[12]"], ["mismatched", "\"compression.targets='re:.*conv[12]'\""]),
        (["compression=binary", "compression.bits=3"], ["compression.bits", "threshold"]),
        (["nonsense=3"], ["nonsense", "compression"]),
        (["compression=binary", "compression.amount=0.5"], ["amount", "did you mean threshold (the share of weights"]),
        (["compression=binary", "+compression.n_bits=3"], ["n_bits", "bits is an option of levels='log', levels='uni"]),
        (["compression=prune"], ["compression/prune", "did you mean mask?"]),
        (["epochs=3"], ["epochs", "did you mean trainer.max_epochs?"]),
        (["trainer.max_epoch=3"], ["trainer.max_epoch", "max_epochs"]),
        (["clipping.max_norm=1"], ["clipping.max_norm", "keys there: none"]),
        (["model.checkpoint=none.pt"], ["model.checkpoint=none.pt", "no such file"]),
        (["model.net._target_=torch.zeros", "~model.net.classes", "+model.net.size=[1]"], ["model.net", "Tensor"]),
        (["model=custom"], ["model.net._target_"]),
        (["data=custom"], ["data._target_"]),
        (["model.decay=linear"], ["decay", "cosine", "linear"]),
        (["optimizer.lr=abc"], ["optimizer"]),
        (["leftovers=int8"], ["leftovers=int8", "float16"]),
        (["data.validation=2"], ["validation", "2"]),
        (["data._target_=torch.nn.Identity"], ["data"]),
        (["resume=true"], ["resume=True", "no run there"]),
        (["resume=nowhere"], ["resume=nowhere", "no run there"]),
        (["clipping=layer", "clipping.max_norm=-1"], ["clipping", "max_norm"]),
        (["+seed.x=1"], ["seed", "whole number", "{'x': 1}"]),
        (["seed=1.5"], ["seed", "1.5"]),
        (["threads=0"], ["threads", "0"]),
        (["batchnorm=true"], ["batchnorm", "True"]),
        (["baseline=null"], ["baseline", "None"]),
        (["baseline.max_epochs=abc"], ["baseline.max_epochs", "abc"]),
        (["baseline.lr=abc"], ["baseline.lr", "abc"]),
        (["checkpoint.every_n_steps=abc"], ["checkpoint.every_n_steps", "abc"]),
        (["compression=binary", "compression.callbacks=null"], ["compression.callbacks", "None"]),
        (["clipping=null"], ["clipping=null", "must be a string"]),
        (["~clipping"], ["clipping", "None", "conf/clipping"]),
        (["fold_batchnorm=abc"], ["fold_batchnorm=abc"]),
        (["leftovers={nothing.*:float16}"], ["leftovers", "nothing.*", "net.bn1.weight"]),
        (["trainer.max_epochs=abc"], ["trainer.max_epochs", "abc"]),
        (["trainer.max_epochs=-1"], ["trainer.max_epochs=-1", "no end"]),
        (["compression=binary", "trainer.max_epochs=0"], ["trainer.max_epochs=0", "nothing compressed"]),
        (["compression=binary", "trainer.max_steps=0"], ["trainer.max_steps=0", "nothing compressed"]),
        (["trainer.limit_test_batches=0"], ["trainer.limit_test_batches=0"]),
        (["compression=binary", "trainer.fast_dev_run=true"], ["trainer.fast_dev_run", "limit_train_batches"]),
        (["cache=/dev/null"], ["/dev/null/baselines", "Not a directory"]),
        (["objective=nothing"], ["objective=nothing", "accuracy, loss"]),
        (["data.batch_size=1.5"], ["batch_size", "1.5"]),
        (["data.validation=abc"], ["validation", "abc"]),
        (["data.mean=abc"], ["mean", "abc"]),
        (["data.mean=[0.1,0.2]"], ["mean", "1 channels"]),
        (["data.std=[0]"], ["std", "above 0"]),
        (["data.augment=maybe"], ["augment", "maybe"]),
        (["model.classes=3"], ["model, data", "a batch fails", "HYDRA_FULL_ERROR=1"]),
        (["model=resnet20"], ["model, data", "3 channels"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_one_line(cli: Command, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    status, said = cli(*arguments, "hydra.run.dir=run")
    assert status == 1
    lines = said.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert [word for word in words if word not in lines[0]] == []
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="tensorboard is here, and its logger works")
def test_a_logger_whose_package_is_missing_says_how_to_get_it(cli: Command, tmp_path: Path) -> None:
    status, said = cli("logger=tensorboard")
    assert status == 1
    assert said.startswith("error: logger: ")
    assert "pip install" in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_refused_run_leaves_what_was_there(cli: Command, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("mine")
    assert cli("objective=nothing", "hydra.run.dir=run")[0] == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]
    assert cli("objective=nothing")[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["run"]  # no empty runs/


@pytest.mark.parametrize("group", ["compression", "clipping", "callbacks"])
def test_a_group_that_became_a_string(group: str) -> None:
    """What Hydra makes of `+compression=codebook` where it does not find our folder."""
    register_resolvers()
    with initialize_config_dir(str(config_dir()), version_base=None):
        cfg = compose("train")
    check_settings(cfg)
    OmegaConf.set_struct(cfg, False)
    cfg[group] = "codebook"
    with pytest.raises(UsageError, match=rf"^{group}: .* found 'codebook': choose one of the files in conf/{group}"):
        check_settings(cfg)


def test_a_folder_that_cannot_be_made(cli: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    status, said = cli("hydra.run.dir=file/run")
    assert status == 1
    assert "file/run: Not a directory" in said
    assert "Traceback" not in said


def test_a_folder_that_cannot_be_written(cli: Command, tmp_path: Path) -> None:
    """Before Hydra's log of the run is open. (A folder in the log's place, for root may write anywhere.)"""
    (tmp_path / "run/train.log").mkdir(parents=True)
    status, said = cli("hydra.run.dir=run")
    assert status == 1
    assert said.startswith("error: ")
    assert said.rstrip().endswith(".log: Is a directory")
    assert said.count("\n") == 1


WRONG = [
    "compression.threshold=1.5",
    "compression.targets=nothing.*",
    "model.checkpoint=other.pt",
    "trainer.precision=7",
    "objective=nothing",
    "baseline.lr=abc",
    "model.classes=3",
    "leftovers={nothing.*:float16}",
    "cache=/dev/null",
    "optimizer._target_=torch.optim.SparseAdam ~optimizer.weight_decay",  # only a training step finds it
    "resume=run",
]


def test_a_wrong_setting_costs_no_older_run(cli: Command, tmp_path: Path) -> None:
    torch.save(LeNet5().state_dict(), tmp_path / "other.pt")
    tiny = ["baseline.max_epochs=2", "trainer.max_epochs=1", "logger=none", "data.batch_size=256"]
    assert cli("compression=binary", "hydra.run.dir=run", *tiny)[0] == 0
    names = ("model.psc", "report.json", "config.yaml", "run.json", "checkpoints/last.ckpt")
    before = [(tmp_path / "run" / name).read_bytes() for name in names]
    for wrong in WRONG:
        assert cli("compression=binary", "hydra.run.dir=run", *tiny, "seed=1", *wrong.split())[0] == 1, wrong
        assert [(tmp_path / "run" / name).read_bytes() for name in names] == before, wrong
