"""A run is repeated from its folder, to the byte; where it is not, what differs is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from training import QUIET

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*GPU available but not used")]

Command = Callable[..., tuple[int, str]]
TINY = ["baseline.max_epochs=1", "trainer.max_epochs=1", "logger=none", "data.batch_size=256"]


def test_a_run_again_is_the_same_file_or_says_what_differs(cli: Command, tmp_path: Path) -> None:
    folder = tmp_path / "it's mine"
    status, said = cli("compression=ternary", "seed=3", "hydra.run.dir='it\\'s mine'", *TINY)
    assert status == 0, said
    status, said = cli("--rerun", "it's mine")
    assert status == 0, said
    assert "the same file, byte for byte: sha256 " in said
    assert (tmp_path / "it's mine-rerun/model.psc").read_bytes() == (folder / "model.psc").read_bytes()

    record, report = (json.loads((folder / f"{name}.json").read_text()) for name in ("run", "report"))
    record["versions"]["torch"] = "1.0"
    report["sha256"] = "0" * 64
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "report.json").write_text(json.dumps(report))
    status, said = cli("--rerun", "it's mine")
    assert status == 1
    assert f"another file: sha256 {'0' * 64} then, " in said
    assert "What differs: torch 1.0 then, " in said


@pytest.mark.parametrize(
    "words", [["--rerun"], ["--rerun", "nowhere"], ["--rerun", ".", "seed=1"], ["seed=1", "--rerun", "."]]
)
def test_what_is_no_run_is_refused(cli: Command, words: list[str]) -> None:
    status, said = cli(*words)
    assert status == 1
    assert "error: --rerun: expected the folder of a finished run, and nothing else" in said
