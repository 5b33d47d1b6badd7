"""A compressed model is an object like any other: saved whole, sent to other processes, hashed by joblib."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import joblib
import pytest
import torch
from training import COMBINATIONS, INPUTS, QUIET, differences, fit, latents

from psc_lightning.artifact import to_bytes

pytestmark = QUIET


@pytest.fixture(scope="module")
def model():
    return fit(COMBINATIONS["separable_lsq"]("constant"), max_epochs=1)[0].eval()


def same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    with torch.no_grad():
        assert torch.equal(model(INPUTS), other.eval()(INPUTS))
    assert to_bytes(other)[0] == to_bytes(model)[0]
    assert differences(latents(model), latents(other)) == []


def test_saved_whole(model, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    same(model, torch.load(tmp_path / "model.pt", weights_only=False))


def test_joblib(model, tmp_path):
    joblib.dump(model, tmp_path / "model.joblib")
    same(model, joblib.load(tmp_path / "model.joblib"))


def test_another_process_reads_it(model, tmp_path):
    """Where nothing of ours is loaded yet."""
    torch.save(model, tmp_path / "model.pt")
    script = (
        "import sys, torch; from training import INPUTS; torch.set_num_threads(1)\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): torch.save(model.eval()(INPUTS), sys.argv[2])"
    )
    folder = Path(__file__).parents[1]
    command = [sys.executable, "-c", script, str(tmp_path / "model.pt"), str(tmp_path / "out.pt")]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "out.pt"), model(INPUTS))
