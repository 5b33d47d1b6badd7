"""LightningCLI builds our callbacks from YAML and from the command line, prints them, and names what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from training import QUIET, Net

from psc_lightning import GradientClipping, MaskLearning, StraightThroughQuantization, WeightSharing

# The deprecated call of jsonargparse is Lightning's own.
pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")]

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIG = str(RECIPES / "lightning_cli.yaml")


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch):
    """LightningCLI warns where both it and pytest were given arguments."""
    monkeypatch.setattr(sys, "argv", sys.argv[:1])


def command(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RECIPES / "lightning_cli.py"), *arguments], cwd=cwd, capture_output=True, text=True
    )


def built(*arguments: str) -> LightningCLI:
    return LightningCLI(Net, args=["--config", CONFIG, *arguments], run=False, seed_everything_default=0)


def test_the_recipe_fits_and_its_printed_config_is_the_same_run(tmp_path):
    short = (
        "--trainer.max_epochs",
        "1",
        "--trainer.limit_train_batches",
        "6",
        "--trainer.enable_progress_bar",
        "false",
    )
    printed = command("fit", "--config", CONFIG, *short, "--print_config", cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    (tmp_path / "printed.yaml").write_text(printed.stdout)
    files = []
    for name, arguments in (("a", ("--config", CONFIG, *short)), ("b", ("--config", str(tmp_path / "printed.yaml")))):
        done = command("fit", *arguments, "--trainer.default_root_dir", str(tmp_path / name), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "movement+uniform" in done.stdout
        files.append((tmp_path / name / "model.psc").read_bytes())
    assert files[0] == files[1]


def test_values_from_the_command_line():
    cli = built("--trainer.callbacks.init_args.threshold", "0.9", "--trainer.callbacks.init_args.group", "32")
    levels, clipping, mask = cli.trainer.callbacks[:3]
    assert isinstance(levels, StraightThroughQuantization)
    assert levels.options == {"bits": 4}
    assert isinstance(clipping, GradientClipping)
    assert isinstance(mask, MaskLearning)
    assert (mask.options["threshold"], mask.options["group"]) == (0.9, 32)
    assert (mask.schedule.kind, mask.schedule.begin, mask.schedule.end) == ("cubic", 0.1, 0.7)


def test_every_callback_from_a_dictionary_of_primitives(tmp_path):
    callbacks = [
        {
            "class_path": "psc_lightning.WeightSharing",
            "init_args": {"method": "low_rank", "rank": 0.5, "targets": ["Linear"]},
        },
        {"class_path": "psc_lightning.MaskLearning", "init_args": {"schedule": "linear", "ignore": "net.0"}},
    ]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": {"logger": False, "callbacks": callbacks}}))
    arguments = ["--config", str(tmp_path / "config.yaml")]
    tying, mask = LightningCLI(Net, args=arguments, run=False, seed_everything_default=0).trainer.callbacks[:2]
    assert isinstance(tying, WeightSharing)
    assert tying.targets == ["Linear"]
    assert mask.schedule.kind == "linear"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("threshold", "much", ["'psc_lightning.MaskLearning'", '"threshold"', "float", "much"]),
        ("treshold", "0.3", ["'psc_lightning.MaskLearning'", "'treshold' is not accepted"]),
        ("threshold", "1.5", ["threshold: expected a share 0 ≤ threshold < 1, found 1.5"]),
        ("granularity", "3", ["granularity: expected one of element, row, column, channel, found '3'"]),
        ("schedule.kind", "quick", ["constant, linear, cubic, cosine", "quick"]),
        ("schedule.start", "3", ["begin", "start"]),
    ],
)
def test_what_is_wrong_is_named(key, value, said, capsys):
    with pytest.raises((SystemExit, ValueError)) as stopped:
        built(f"--trainer.callbacks.init_args.{key}", value)
    message = capsys.readouterr().err + str(stopped.value)
    assert [part for part in said if part not in message] == []
