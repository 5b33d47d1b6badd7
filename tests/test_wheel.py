"""What people install: a wheel that carries `conf/` and works from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_it_holds_the_package_its_types_and_every_config(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"psc_lightning/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert configs <= held
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "psc_lightning/pages/templates").iterdir()}
    assert len(templates) >= 5
    assert templates <= held
    assert "psc_lightning/py.typed" in held
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert not {name.split("/")[0] for name in held if "dist-info" not in name} - {"psc_lightning"}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder


def python(packages: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in another folder, with the package from one of the three places that people have it in."""
    environment = {**os.environ, "PYTHONPATH": str(packages), "PSC_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


FROM = "import psc_lightning, sys; assert psc_lightning.__file__.startswith(sys.argv.pop(1)), psc_lightning.__file__;"
PSC_TRAIN = f"{FROM} from psc_lightning.app.main import main; main()"
TINY = ["baseline.max_epochs=1", "trainer.max_epochs=1", "logger=none"]


def test_it_does_what_the_checkout_does(installed: Path, tmp_path: Path) -> None:
    """From another folder, one run and two; `python train.py` of the checkout writes the same bytes."""
    done = python(
        installed, tmp_path, "-c", PSC_TRAIN, str(installed), "compression=binary", "hydra.run.dir=run", *TINY
    )
    assert done.returncode == 0, done.stdout + done.stderr
    many = ["-m", "compression=none,binary", "hydra.sweep.dir=sweep", *TINY]
    done = python(installed, tmp_path, "-c", PSC_TRAIN, str(installed), *many)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = json.loads((tmp_path / "sweep/sweep.json").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["completed"] * 2
    train = str(ROOT / "train.py")
    done = python(ROOT, tmp_path, train, "compression=binary", "hydra.run.dir=checkout", *TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    files = [(tmp_path / name / "model.psc").read_bytes() for name in ("run", "sweep/1", "checkout")]
    assert files[0] == files[1] == files[2]


def test_a_wrong_value_is_one_line(installed: Path, tmp_path: Path) -> None:
    done = python(installed, tmp_path, "-c", PSC_TRAIN, str(installed), "compression=binery")
    assert done.returncode == 1
    (line,) = (done.stdout + done.stderr).strip().splitlines()
    assert "compression/binery" in line
    assert "binary codebook column" in line


OWN = """
import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from psc_lightning.callbacks.presets import wanted
from psc_lightning.configs import register

register()

@hydra.main(version_base=None, config_path="conf", config_name="mine")
def app(cfg):
    assert isinstance(cfg.compression, DictConfig)
    made = [instantiate(node, _convert_="all") for node in wanted(cfg.compression).values()]
    print(cfg.epochs, [repr(one.state_key) for one in made])
    print(cfg.compression.threshold, instantiate(cfg.compression.callbacks.mask).schedule.kind)

app()
"""


@pytest.mark.parametrize("place", ["wheel", "checkout"])
def test_a_users_own_hydra_application(place: str, installed: Path, tmp_path: Path) -> None:
    """Its own configuration, and one of our presets and schedules in it; a misspelt one does not become a string."""
    packages = installed if place == "wheel" else ROOT
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/mine.yaml").write_text("epochs: 3\n")
    (tmp_path / "own.py").write_text(OWN)
    options = ["+compression=binary", "+schedule=cosine", "compression.threshold=0.25"]
    done = python(packages, tmp_path, "own.py", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 [")
    assert "MaskLearning" in done.stdout
    assert "StraightThroughQuantization" in done.stdout
    assert done.stdout.endswith("0.25 cosine\n")
    done = python(packages, tmp_path, "own.py", "+compression=binery")
    assert done.returncode == 1
    assert "Could not find 'compression/binery'" in done.stderr
