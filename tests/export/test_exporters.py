"""One dictionary of formats: the command, its help and the extras to install follow it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import psc_lightning
from psc_lightning.cli import main
from psc_lightning.export import EXPORTERS, Exporter
from psc_lightning.slots.stored import Stored


@pytest.mark.parametrize("name", EXPORTERS)
def test_every_format_has_a_function_and_an_extra(name: str) -> None:
    assert callable(EXPORTERS[name].write)
    pyproject = (Path(psc_lightning.__file__).parents[1] / "pyproject.toml").read_text()
    assert f"\n{name} = [" in pyproject.partition("[project.optional-dependencies]")[2].partition("\n[")[0]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def write_sizes(tensors: Mapping[str, Tensor], path: str) -> None:
    Path(path).write_text(" ".join(f"{name}:{tensor.numel()}" for name, tensor in tensors.items()))


def write_outputs(
    model: nn.Module, stored: Mapping[str, Stored], path: str, example: Any, dynamic_batch: bool, **names: Any
) -> None:
    assert not any(names.values())
    if not dynamic_batch:
        raise ValueError("batch: this format leaves it open; give --dynamic-batch")
    Path(path).write_text(f"{sorted(stored)} {tuple(model(*example).shape)}")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file, and two formats of the test's own: one module and one line each."""
    own = SimpleNamespace(write_sizes=write_sizes, write_outputs=write_outputs)
    monkeypatch.setitem(sys.modules, "psc_lightning.export.own", own)
    monkeypatch.setitem(EXPORTERS, "sizes", Exporter("how long each tensor is", "own:write_sizes"))
    monkeypatch.setitem(EXPORTERS, "outputs", Exporter("the outputs' shape", "own:write_outputs", graph=True))
    monkeypatch.chdir(tmp_path)
    model = net()
    psc_lightning.compress(model, levels="binary", min_size=1)
    psc_lightning.save(model, tmp_path / "model.psc")
    return tmp_path / "model.psc"


def test_a_new_format_of_weights(file: Path) -> None:
    assert main(["export", str(file), "--sizes", "sizes.txt"]) == 0
    assert Path("sizes.txt").read_text() == "0.weight:6 0.bias:2 1.weight:2 1.bias:1"


def test_a_new_format_of_graphs(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(file), "--outputs", "out.txt"]
    assert main(arguments) == 2
    assert "psc export: --outputs needs --example" in capsys.readouterr().err
    arguments += ["--example", "5,3"]
    assert main(arguments) == 2
    assert "holds no graph: give --model" in capsys.readouterr().err
    arguments += ["--model", "test_exporters:net"]
    assert main(arguments) == 2
    assert capsys.readouterr().err == "psc export: batch: this format leaves it open; give --dynamic-batch\n"
    assert not Path("out.txt").exists()
    with torch.no_grad():
        assert main([*arguments, "--dynamic-batch"]) == 0
    assert Path("out.txt").read_text() == "['0.weight', '1.weight'] (5, 1)"


def test_help_and_messages_name_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(file)]) == 2
    names = "--onnx OUT, --safetensors OUT, --sizes OUT, --outputs OUT"
    assert f"nothing to write: give at least one of {names}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "in another format: onnx, safetensors, sizes, outputs" in said
    assert "--sizes OUT the file to write: how long each tensor is" in said


def test_where_one_lacks_a_package_none_is_written(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(EXPORTERS, "later", Exporter("nothing", "not_installed:write"))
    assert main(["export", str(file), "--sizes", "sizes.txt", "--later", "later.txt"]) == 2
    assert "not_installed" in capsys.readouterr().err
    assert list(file.parent.iterdir()) == [file]


def test_a_damaged_file_is_no_wrong_usage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])
    for arguments in (["--sizes", "s"], ["--outputs", "o", "--example", "5,3", "--model", "test_exporters:net"]):
        assert main(["export", str(file), *arguments]) == 1
