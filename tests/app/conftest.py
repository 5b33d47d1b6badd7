"""The command line in this process, with a cache of its own that all tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from psc_lightning.app.main import main
from psc_lightning.app.sweep import SweepFolder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cli(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run `psc-train` in an empty folder; gives exit status and what it said."""
    monkeypatch.setenv("PSC_CACHE", str(cache))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(SweepFolder, "current", None)

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["psc-train", *arguments])
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        status = 0
        capsys.readouterr()
        try:
            main()
        except SystemExit as error:
            status = 1 if isinstance(error.code, str) else int(error.code or 0)
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        said = capsys.readouterr()
        return status, said.out + said.err

    return call
