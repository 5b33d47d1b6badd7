"""Every YAML composes and builds what it names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import Callback, LightningDataModule, Trainer
from omegaconf import DictConfig, OmegaConf

from psc_lightning.app.run_folder import register_resolvers
from psc_lightning.callbacks.presets import wanted
from psc_lightning.configs import config_dir, register
from psc_lightning.schedule import Schedule

FILES = sorted(path.relative_to(config_dir()).with_suffix("") for path in config_dir().glob("*/**/*.yaml"))
PRESETS = ["none", "float", "binary", "ternary", "mask", "cross_channel", "row", "column", "separable", "low_rank"]
PRESETS += ["log", "codebook", "deep", "small"]


def composed(*overrides: str) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(config_dir()), version_base=None):
        return compose("train", list(overrides))


def choice(path: Path) -> tuple[str, str]:
    """The group of a file and its name there: an experiment's may be in a folder, a compression's folders are groups."""
    parts = 1 if path.parts[0] == "experiment" else len(path.parts) - 1
    return "/".join(path.parts[:parts]), "/".join(path.parts[parts:])


@pytest.mark.parametrize("path", FILES, ids=str)
def test_each_file_composes_and_resolves(path: Path) -> None:
    group, name = choice(path)
    own = {"model": "model.net._target_=torch.nn.Identity", "data": "data._target_=lightning.LightningDataModule"}
    cfg = composed(f"{group}={name}", *([own[group]] if name == "custom" else []))
    OmegaConf.to_container(cfg, resolve=True)


def nodes(cfg: DictConfig, key: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every outermost node that names what it builds; Hydra's own are Hydra's."""
    for name, node in cfg.items_ex(resolve=False):
        if isinstance(node, DictConfig) and name != "hydra":
            yield from [(f"{key}{name}", node)] if "_target_" in node else nodes(node, f"{key}{name}.")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_each_file_builds_what_it_names(path: Path, tmp_path: Path) -> None:
    group, name = choice(path)
    if name == "tensorboard":
        pytest.importorskip("tensorboard", reason="an optional logger")
    own = {"model": "model.net._target_=torch.nn.Identity", "data": "data._target_=lightning.LightningDataModule"}
    cfg = composed(f"{group}={name}", "trainer.accelerator=cpu", *([own[group]] if name == "custom" else []))
    built = {}
    for key, node in nodes(cfg):
        if key.startswith("compression.callbacks.") and key.split(".")[-1] not in wanted(cfg.compression):
            continue
        more = {"save_dir": str(tmp_path)} if key == "logger" else {"logger": False} if key == "trainer" else {}
        built[key] = instantiate(node, _convert_="all", **more)
    assert {"data", "model.net", "trainer"} <= set(built)
    assert isinstance(built["model.net"], torch.nn.Module)
    assert isinstance(built["data"], LightningDataModule)
    assert isinstance(built["trainer"], Trainer)
    assert all(isinstance(made, Callback) for key, made in built.items() if "callbacks" in key or key == "clipping")


def test_there_are_the_promised_presets() -> None:
    assert sorted(path.name for path in FILES if str(path.parent) == "compression") == sorted(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_builds_its_callbacks(name: str) -> None:
    cfg = composed(f"compression={name}", "compression.threshold=0.25", "schedule=linear", "schedule.end=0.5")
    built = {key: instantiate(node, _convert_="all") for key, node in wanted(cfg.compression).items()}
    assert cfg.compression.name == name
    assert ("mask" in built) == (name != "none")
    if built:
        assert built["mask"].options["threshold"] == 0.25
    assert ("budget" in built) == (name == "small")
    schedules = {key: callback.schedule for key, callback in built.items() if key != "budget"}
    if name == "small":
        assert schedules.pop("levels") == Schedule("constant")  # whatever the others follow: its price grows instead
    assert all(schedule == Schedule("linear", 0.0, 0.5) for schedule in schedules.values())


@pytest.mark.parametrize("levels", ["uniform", "codebook"])
def test_bits_of_inputs_are_one_key(levels: str) -> None:
    """Whatever the weights are rounded to; without it the callback is left out."""
    overrides = ["compression=binary", f"compression/levels={levels}", "compression.targets=net.*"]
    assert "activations" not in wanted(composed(*overrides).compression)
    made = instantiate(
        wanted(composed(*overrides, "compression.activations=4").compression)["activations"], _convert_="all"
    )
    assert (type(made).__name__, made.bits, made.targets) == ("ActivationQuantization", 4, ["net.*"])


@pytest.mark.parametrize("name", ["weight", "layer", "global", "agc"])
def test_each_clipping_builds_its_callback(name: str) -> None:
    assert type(instantiate(composed(f"clipping={name}").clipping)).__name__ == "GradientClipping"


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_each_optimizer_builds(name: str) -> None:
    make = instantiate(composed(f"optimizer={name}").optimizer, _convert_="all")
    assert isinstance(make([torch.nn.Parameter(torch.zeros(1))]), torch.optim.Optimizer)


def test_a_users_own_application_finds_the_presets(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("epochs: 3\n")
    register()
    with initialize_config_dir(str(tmp_path), version_base=None):
        cfg = compose("mine", ["+compression=binary", "compression.threshold=0.5"])
        with_schedule = compose("mine", ["+compression=binary", "+schedule=cosine"])
    assert isinstance(cfg.compression, DictConfig)
    assert instantiate(cfg.compression.callbacks.mask).options["threshold"] == 0.5
    assert instantiate(with_schedule.compression.callbacks.mask).schedule.kind == "cosine"
