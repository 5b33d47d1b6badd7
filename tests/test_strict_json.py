"""Whatever ends in .json is JSON that every reader takes: no NaN, no Infinity."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import psc_lightning
from psc_lightning import Report, save
from psc_lightning.app.run_folder import Run
from psc_lightning.app.sweep import summarise
from psc_lightning.cli import main
from psc_lightning.strict_json import json_text

ROOT = Path(__file__).parents[1]
NAN, INF = float("nan"), float("inf")


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_become_null_wherever_they_are() -> None:
    value = {"a": NAN, "b": [1.5, -INF, {"c": (INF, "NaN", None, True, 2)}], 3: [], "d": {}}
    found = strict(json_text(value))
    assert found == {"a": None, "b": [1.5, None, {"c": [None, "NaN", None, True, 2]}], "3": [], "d": {}}
    assert json_text({"b": 1, "a": [2]}, indent=None, sort_keys=True) == '{"a": [2], "b": 1}'
    assert strict(json_text({NAN: 1, 0.5: 2})) == {"nan": 1, "0.5": 2}
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        json_text({"a": torch.zeros(1)})


def test_a_report_whose_metrics_diverged_is_json_and_reads_back(tmp_path: Path) -> None:
    report = save(nn.Linear(2, 1), tmp_path / "model.psc")
    report.metrics = {"one_shot": {"accuracy": 0.5, "loss": NAN}}
    report.save(tmp_path / "report.json")
    found = strict((tmp_path / "report.json").read_text())
    assert found == report.to_dict()
    assert found["metrics"] == {"one_shot": {"accuracy": 0.5, "loss": None}}
    again = Report.from_dict(found)
    assert again.table().splitlines()[-1] == "one_shot: accuracy 0.5, loss nan"


def test_the_records_of_runs_and_sweeps_are_json(tmp_path: Path) -> None:
    run = Run(tmp_path / "0")
    run.folder.mkdir()
    run.note(status="failed", overrides=[], best=INF)
    run.report.write_text('{"file_bytes": 1, "compression_ratio": Infinity, "metrics": {"dense": {"loss": NaN}}}')
    summarise(tmp_path)
    assert strict(run.record.read_text())["best"] is None
    (job,) = strict((tmp_path / "sweep.json").read_text())["jobs"]
    assert job["compression_ratio"] is None
    assert job["metrics"] == {"dense": {"loss": None}}


def test_what_a_command_prints_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "model.psc")
    save(nn.Linear(2, 1), file)
    assert main(["inspect", file, "--json"]) == main(["diff", file, file, "--json"]) == 0
    first, second = capsys.readouterr().out.split("}\n{")
    assert strict(first + "}")["file_bytes"]
    assert strict("{" + second)["equal"]


def writers(path: Path) -> list[int]:
    """The lines of a module in which it takes `dump` or `dumps` of json, however it has imported it."""
    tree = ast.parse(path.read_text())
    names = {"json"} | {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "json" and alias.asname
    }
    taken = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in ("dump", "dumps", "JSONEncoder")
        and isinstance(node.value, ast.Name)
        and node.value.id in names
    ]
    return taken + [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module == "json"
        and any(alias.name != "loads" for alias in node.names)
    ]


def test_nobody_else_writes_json() -> None:
    package = Path(psc_lightning.__file__).parent
    own = package / "strict_json.py"
    assert writers(own)
    paths = [*package.rglob("*.py"), *(ROOT / "recipes").rglob("*.py"), ROOT / "train.py"]
    assert not {str(path): lines for path in paths if path != own and (lines := writers(path))}
