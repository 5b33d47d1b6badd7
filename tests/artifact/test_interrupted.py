"""Whatever happens during a save, the final name holds a whole good file: the old one or the new one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import interrupted
import pytest

from psc_lightning.artifact import load, save, to_bytes


def run(*arguments: object) -> str:
    command = [sys.executable, interrupted.__file__, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_killed_at_fifty_moments(tmp_path: Path) -> None:
    assert run("killed", tmp_path, 50, 0).split() == ["whole"] * 50
    # A killed process cannot clean up; what it leaves is hidden, is no *.psc, and stands in nobody's way.
    parts = set(tmp_path.iterdir()) - {tmp_path / "model.psc"}
    assert parts, "no process was killed while it wrote"
    assert all(part.name.startswith(".model.psc.") and part.suffix == ".part" for part in parts)
    assert list(tmp_path.glob("*.psc")) == [tmp_path / "model.psc"]
    save(interrupted.models()[1], tmp_path / "model.psc")
    assert load(tmp_path / "model.psc")["weight"].shape == (10_000,)


def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk's: the write itself fails, half-way."""
    said = run("full", tmp_path)
    assert "cannot write model.psc" in said
    assert "with room for" in said
    assert os.listdir(tmp_path) == ["model.psc"]
    assert (tmp_path / "model.psc").read_bytes() == to_bytes(interrupted.models()[0])[0]


if not hasattr(os, "fork"):
    pytestmark = pytest.mark.skip(reason="a process is forked, which this system cannot")
