"""Law 7: the same callbacks, seed and thread count give the same file, byte for byte, in any process."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
from training import COMBINATIONS, QUIET, fit

from psc_lightning import GradientClipping
from psc_lightning.artifact import to_bytes

pytestmark = QUIET

RAMP = {"kind": "cosine", "begin": 0.2, "end": 0.6}
NAMES = ("cross_channel", "low_rank", "column")


def digests() -> list[str]:
    found = []
    for name in NAMES:
        model, _ = fit(COMBINATIONS[name](RAMP), max_epochs=1)
        found.append(hashlib.sha256(to_bytes(model)[0]).hexdigest())
    return found


def test_two_processes_write_the_same_bytes(tmp_path):
    """Another process with another hash seed and in another folder, and this one."""
    code = "import torch; torch.set_num_threads(1); from test_same_run_same_file import digests; print(*digests())"
    tests = Path(__file__).parents[1]
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONHASHSEED": "77",
            "PYTHONPATH": os.pathsep.join(map(str, (tests, tests / "laws", tests.parent))),
        },
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert found == digests()


@pytest.mark.parametrize("name", ["separable_lsq", "cross_channel", "low_rank"])
def test_any_order_of_the_callbacks(name):
    files = set()
    for order in list(permutations(range(4)))[::6]:  # each comes first once
        callbacks = [*COMBINATIONS[name](RAMP), GradientClipping(max_norm=0.1, scope="layer")]
        model, _ = fit([callbacks[i] for i in order], max_epochs=1)
        files.add(to_bytes(model)[0])
    assert len(files) == 1


def test_another_run_writes_another_file():
    """A check of the test: the bytes depend on the run."""
    long, _ = fit(COMBINATIONS["column"](RAMP), max_epochs=1)
    short, _ = fit(COMBINATIONS["column"](RAMP), max_steps=11)
    assert to_bytes(long)[0] != to_bytes(short)[0]
