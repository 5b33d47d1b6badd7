"""What people install: a wheel that carries `conf/` and works from another folder."""

from __future__ import annotations

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
    assert "psc_lightning/py.typed" in held
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert not {name.split("/")[0] for name in held if "dist-info" not in name} - {"psc_lightning"}


def test_it_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(installed), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(installed),
        "PSC_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    program = (
        "import psc_lightning, sys; assert psc_lightning.__file__.startswith(sys.argv.pop(1)), psc_lightning.__file__;"
        "from psc_lightning.app.train import main; main()"
    )
    tiny = ["baseline.max_epochs=1", "trainer.max_epochs=1", "hydra.run.dir=run"]
    command = [sys.executable, "-c", program, str(installed), "compression=binary", *tiny]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (elsewhere / "run" / "model.psc").is_file()
