"""Names that a stranger chose, where people read them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import forge
import pytest
import torch
from torch import nn

from psc_lightning.artifact import ArtifactError, inspect, load_into, save
from psc_lightning.cli import main
from psc_lightning.export.safetensors import write_safetensors
from psc_lightning.terminal import printable, speaking_plainly

RECIPE = Path(__file__).parents[1] / "recipes" / "read_with_numpy.py"
# Erase the screen, set the title, a null, a C1 introducer, the other direction of writing, an isolate, a line separator.
NASTY = "a\x1b[2J\x1b]0;t\x07\x00\x9b31m\u202eb\u2066c\u2028d\x7f\r"
SHOWN = r"a\x1b[2J\x1b]0;t\x07\x00\x9b31m\u202eb\u2066c\u2028d\x7f\r"


def clean(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "f.psc").write_bytes(forge.named(NASTY))
    return str(tmp_path / "f.psc")


def test_escapes() -> None:
    assert printable(NASTY) == SHOWN
    assert printable("Größe 重み é\nb") == "Größe 重み é\nb"


def test_every_command_escapes_names(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(nn.Linear(2, 1), tmp_path / "other.psc")
    torch.save(nn.Linear(2, 1).state_dict(), tmp_path / "f.ckpt")
    commands = (
        ["inspect", path],
        ["inspect", path, "--json"],
        ["diff", path, str(tmp_path / "other.psc")],
        ["diff", path, str(tmp_path / "other.psc"), "--json"],
        ["verify", path, "--against", str(tmp_path / "f.ckpt")],
        ["verify", path, "--model", "torch.nn:Identity"],
    )
    for arguments in commands:
        main(arguments)
        said = capsys.readouterr()
        assert clean(said.out + said.err), arguments
        assert r"\u202eb" in said.out + said.err, arguments


def test_errors_and_tables_escape_names(path: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        load_into(nn.Linear(2, 1), path)
    assert clean(str(caught.value))
    assert SHOWN in str(caught.value)
    report = inspect(path)
    assert report.tensors[0].name == NASTY  # what it is for a program stays what it is
    assert clean(str(report))


def test_a_narrow_encoding_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "f.psc").write_bytes(forge.named("größe.重み"))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for command in (
        [sys.executable, "-m", "psc_lightning.cli", "inspect", "f.psc"],
        [sys.executable, str(RECIPE), "f.psc"],
    ):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert rb"gr\xf6\xdfe.\u91cd\u307f" in done.stdout


def test_the_reader_of_a_stranger_escapes_names(path: str) -> None:
    done = subprocess.run([sys.executable, str(RECIPE), path], capture_output=True, text=True, timeout=120, check=True)
    assert clean(done.stdout)
    assert r"\u202eb" in done.stdout


def test_streams_are_given_back_as_they_were() -> None:
    before = [sys.stdout.errors, sys.stderr.errors]
    with speaking_plainly():
        assert sys.stdout.errors == "backslashreplace"
    assert [sys.stdout.errors, sys.stderr.errors] == before


def test_no_memory_is_not_the_files_fault(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("9 bytes")

    monkeypatch.setattr("psc_lightning.artifact.leftovers.decode", fail)
    assert main(["verify", path]) == 2
    assert "not enough memory" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- safetensors


def test_a_name_that_safetensors_keeps_for_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "f.psc").write_bytes(forge.named("__metadata__"))
    assert main(["export", str(tmp_path / "f.psc"), "--safetensors", str(tmp_path / "out")]) == 1
    assert "found a tensor __metadata__" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_one_tensor_of_many_names_is_not_copied_without_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """615 bytes became 5 GB: each name is written for itself, if all of them may be."""
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file

    (tmp_path / "f.psc").write_bytes(forge.aliases(30, 64, 64))
    size = 31 * 64 * 64 * 4
    export = ["export", str(tmp_path / "f.psc"), "--safetensors", str(tmp_path / "out"), "--max-bytes"]
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", lambda *_: pytest.fail("a copy"))
        assert main([*export, str(size - 1)]) == 1
    assert f"each name for itself, found {size}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*export, str(size)]) == 0
    assert len(load_file(tmp_path / "out")) == 31


def test_what_shares_no_memory_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    tensors = {name: torch.arange(6.0).reshape(2, 3) for name in "ab"}
    monkeypatch.setattr(torch.Tensor, "clone", lambda *_: pytest.fail("a copy"))
    write_safetensors(tensors, tmp_path / "out")
