"""Runs a script in two processes and in one; results are read from files: gloo workers may abort after their work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder that a script of this folder, given numbers of processes and that folder, has filled."""

    def run(script: str, *numbers: str) -> Path:
        folder = tmp_path_factory.mktemp(script)
        here = Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(here.parent), str(here.parents[1])))}
        for devices in numbers or ("2", "1"):
            command = [sys.executable, str(here / f"{script}.py"), devices, str(folder)]
            subprocess.run(command, cwd=folder, env=environment, timeout=600, check=False, capture_output=True)
        return folder

    return run
