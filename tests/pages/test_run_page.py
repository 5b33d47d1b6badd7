"""A run's own page, as a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from made import run
from test_pareto import EVIL, Page

from psc_lightning.pages.drawing import drawing
from psc_lightning.pages.general import general_size
from psc_lightning.pages.run_figures import bytes_figure, training_figure, weights_figure
from psc_lightning.pages.run_page import write_run

HISTORY = {"train_loss": [[10, 1.0], [20, None], [30, 0.5]], "val_loss": [[15, 0.7]], "val_accuracy": [[15, 0.9]]}
HISTORY |= {"psc/sparsity": [[15, 0.5]], "psc/strength/mask": [[15, 0.1]], "learning_rate": [[10, 0.1]]}


def written(folder: Path, **states: Any) -> Page:
    report = json.loads((folder / "report.json").read_text())
    write_run(folder, report, **states)
    return Page(folder / "report.html")


def test_what_it_says(tmp_path: Path) -> None:
    folder = run(tmp_path / "7", "t=0.5", "seed=3", size=500, accuracy=0.93, dense=0.95, versions={"torch": "2.9"})
    (folder / "history.json").write_text(json.dumps({"series": HISTORY}))
    (folder / "config.yaml").write_text("seed: 3\n")
    weights = {f"net.layers.{i}.weight": torch.randn(16, 16) for i in range(2)}
    page = written(folder, dense=weights, stored={name: value.sign() for name, value in weights.items()})
    for said in (
        "500 bytes, 20.0 times smaller",
        "of 10,000 dense",
        "accuracy of the file −2.00 points to dense",
        "dense start 0.95",
    ):
        assert said in page.text
    assert "one-shot, without training 0.5 file 0.93" in page.text
    assert "names, header, checksum 50 10.0 %" in page.text
    assert "Linear weights in slots 65 13.0 %" in page.text
    assert "1.03 bits a weight in slots, 25 % zeros" not in page.text  # 65 bytes of 512 weights
    assert "1.02 bits a weight in slots, 25 % zeros" in page.text
    for said in ("python train.py t=0.5 seed=3", 'load_into(model, "model.psc")', "torch 2.9", "seed: 3"):
        assert said in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 3
    assert {path.name for path in (folder / "plots").iterdir()} == {"bytes.png", "training.png"}
    text = (folder / "report.html").read_text()
    assert not re.search(r"https?://", text)
    assert not any("src" in attributes for _, attributes in page.tags)


def test_confusions_are_counts_by_row(tmp_path: Path) -> None:
    folder = run(tmp_path / "0", "t=1", confusion=[[3, 1], [0, 2]])
    text = (written(folder), (folder / "report.html").read_text())[1]
    assert "What is taken for what" in text
    table = text[text.index('aria-label="confusion matrix"') :]
    cells = re.findall(r'<td(?: style="--v:([\d.]+)")?>(\d*)</td>', table[: table.index("</table>")])
    assert cells == [("0.75", "3"), ("0.25", "1"), ("", ""), ("1.00", "2")]
    assert (
        "What is taken for what"
        not in (written(run(tmp_path / "1", "t=1")), (tmp_path / "1/report.html").read_text())[1]
    )


def test_names_stay_text(tmp_path: Path) -> None:
    folder = run(tmp_path / EVIL.replace("/", "|"), f"x={EVIL}", git={"commit": EVIL, "clean": False})
    report = json.loads((folder / "report.json").read_text())
    report["tensors"][0] |= {"name": EVIL + "$\\frac", "method": EVIL, "layer_type": EVIL}
    report["notes"] = [EVIL]
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "config.yaml").write_text(EVIL)
    weight = {EVIL + "$\\frac": torch.zeros(4, 4)}
    page = written(folder, dense=weight, stored=weight)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert page.text.count(EVIL) >= 6


def test_missing_numbers_and_three_hundred_layers(tmp_path: Path) -> None:
    folder = run(tmp_path / "0", accuracy=None, dense=None, layers=300)
    report = json.loads((folder / "report.json").read_text())
    report["tensors"] += [
        dict(report["tensors"][0], name="n" * 300, shape=[], sparsity=None, levels=None, method="plain")
    ]
    (folder / "report.json").write_text(json.dumps(report))
    page = written(folder)
    assert "dense start –" in page.text
    assert "nothing was recorded" in (folder / "report.html").read_text()
    assert sum(tag == "tr" for tag, _ in page.tags) > 300
    assert (folder / "report.html").stat().st_size < 500_000


def test_bars_are_as_long_as_the_bytes_are_many(tmp_path: Path) -> None:
    folder = run(tmp_path / "0", size=500, layers=2)
    with drawing():
        (axes,) = bytes_figure(json.loads((folder / "report.json").read_text())).axes
        assert axes.get_xscale() == "linear"
        assert [bar.get_width() for bars in axes.containers for bar in bars] == [33, 32, 50]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            "in slots: 13 %",
            "names, header, checksum: 10 %",
        ]


def test_every_panel_says_what_it_shows() -> None:
    with drawing():
        figure = training_figure(HISTORY, "accuracy")  # type: ignore[arg-type]
        assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "accuracy", "share", "learning rate"]
        legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
        assert legends == [
            ["train_loss", "val_loss"],
            ["val_accuracy"],
            ["sparsity", "strength/mask"],
            ["learning_rate"],
        ]
        assert figure.axes[-1].get_xlabel() == "optimizer step"
        assert [*figure.axes[0].lines[0].get_ydata()] == [1.0, 0.5]  # what is no number is left out


def test_levels_are_drawn_where_they_are_few() -> None:
    dense = {"a": torch.linspace(-1, 1, 100), "b": torch.full((4,), float("nan"))}
    with drawing():
        figure = weights_figure(dense, {"a": dense["a"].sign() / 2, "b": torch.zeros(4)}, ["a", "b", "c"])
        assert figure is not None
        first, second = figure.axes
        assert [*first.lines[0].get_xdata()] == [-0.5, 0.5]
        assert [*second.lines[0].get_xdata()] == [0.0]
        assert weights_figure({}, {}, ["a"]) is None


def test_the_size_under_a_general_compressor() -> None:
    same = torch.zeros(1000)
    found = general_size({"a": same, "b": same, "half": torch.ones(3, dtype=torch.bfloat16), "one": torch.tensor(1)})
    assert found is not None
    assert found["name"].split()[0] in ("zlib", "zstd")
    assert 0 < found["bytes"] < 200
    noise = torch.randn(1000)
    assert general_size({"a": noise, "b": noise}) == general_size({"a": noise})
    assert general_size({"a": torch.empty(1).expand(1 << 28)}) is None


@pytest.mark.parametrize("file", ["model.psc", 'odd "name".psc'])
def test_the_example_names_the_file(tmp_path: Path, file: str) -> None:
    folder = run(tmp_path / "0")
    assert f"load_into(model, {json.dumps(file)})" in written(folder, file=file).text
