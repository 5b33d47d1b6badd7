"""The Pareto page of many runs, as a file: what it says, that nothing escapes, that it needs nothing else."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made import run

from psc_lightning.cli import main
from psc_lightning.pages.jobs import find_jobs
from psc_lightning.pages.pareto import metric_of, write_pareto

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Tags, their attributes, and the text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & {*self.open}:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page_of(folder: Path, **settings: str) -> Page:
    write_pareto(find_jobs([folder]), folder, **settings)  # type: ignore[arg-type]
    return Page(folder / "pareto.html")


def test_it_says_how_small(tmp_path: Path) -> None:
    run(tmp_path / "0", "c=binary", "t=0", "seed=0", size=1000, accuracy=0.948)
    run(tmp_path / "1", "c=binary", "t=0", "seed=1", size=1200, accuracy=0.952)
    run(tmp_path / "2", "c=binary", "t=0.6", "seed=0", size=400, accuracy=0.94)
    run(tmp_path / "3", "c=binary", "t=0.9", "seed=0", size=None, status="failed", error="diverged")
    page = page_of(tmp_path)
    assert "4 runs, 1 without a result , 2 settings" in page.text
    assert "all with c=binary" in page.text
    assert "Dense: 10,000 bytes , accuracy 0.95." in page.text
    assert (
        "The smallest within 0.5 points of dense: 1,100 bytes , 9.1 times smaller, accuracy 0.95 ± 0.0028" in page.text
    )
    assert "The smallest within 1 and 2 points of dense: 400 bytes , 25.0 times smaller, accuracy 0.94" in page.text
    rows = {
        attributes["id"]: attributes["class"] for tag, attributes in page.tags if tag == "tr" and "id" in attributes
    }
    assert rows == {"j0": "done front", "j1": "done front", "j2": "done front", "j3": "failed"}
    assert "diverged" in page.text
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        "pareto.html",
        "pareto.png",
        "pareto.svg",
        "sweep.json",
    }
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert "t=0.6" in (tmp_path / "pareto.svg").read_text()


def test_a_metric_that_falls(tmp_path: Path) -> None:
    for name, size, loss in (("0", 100, 0.3), ("1", 200, 0.203), ("2", 300, 0.25)):
        run(tmp_path / name, f"t={name}", size=size, accuracy=loss, dense=0.2, metric="mae")
    page = page_of(tmp_path)
    assert "within 1 % of dense" not in page.text.replace("Nothing is within 1 % of dense", "")
    assert "The smallest within 5 and 10 % of dense: 200 bytes" in page.text
    rows = {
        attributes["id"]: attributes["class"] for tag, attributes in page.tags if tag == "tr" and "id" in attributes
    }
    assert rows == {"j0": "done front", "j1": "done front", "j2": "done"}
    assert "lower is better" in (tmp_path / "pareto.svg").read_text()


def test_names_stay_text(tmp_path: Path) -> None:
    folder = tmp_path / "a <b> & 'c'"
    run(folder / "0", f"name={EVIL}", 'q="--><svg onload=x>"', "m=$\\frac{$", "seed=0")
    run(folder / "1", "name=b", metric=f"acc{EVIL}", status=EVIL, error=EVIL)
    job = json.loads((folder / "0/report.json").read_text())
    job["tensors"][0]["name"] = f"{EVIL}.weight"
    (folder / "0/report.json").write_text(json.dumps(job))
    for settings in ({}, {"metric": f"acc{EVIL}"}):
        page = page_of(folder, **settings)
        assert sum(tag == "script" for tag, _ in page.tags) == 2  # the data and the page's own
        assert not any("onload" in attributes for _, attributes in page.tags)
        assert EVIL in page.text
        assert EVIL not in (folder / "pareto.svg").read_text()
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links[:1] == ["1/report.json"]


def test_it_asks_the_network_for_nothing(tmp_path: Path) -> None:
    run(tmp_path / "0")
    run(tmp_path / "1", "a=2", size=500)
    page = page_of(tmp_path)
    text = (tmp_path / "pareto.html").read_text()
    assert not re.search(r"https?://", text)
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert not re.match(r"\w+:|//", attributes.get(name) or "")
    assert "default-src 'none'" in text


def test_the_marks_are_in_the_order_of_the_data(tmp_path: Path) -> None:
    """The script goes by the order, so each group must have as many marks as there are points in the data."""
    for index in range(7):
        run(tmp_path / str(index), f"t={index}", size=100 + 100 * index, accuracy=0.9 + 0.01 * (index % 3))
    page_of(tmp_path)
    text = (tmp_path / "pareto.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert (data["front"], data["other"]) == ([0, 1, 2], [3, 4, 5, 6])
    for picture in ("wide", "narrow"):
        for series, indices in (("front", data["front"]), ("other", data["other"])):
            group = text[text.index(f'id="all-{picture}-{series}"') :]
            places = re.findall(r'<use [^>]* x="([\d.]+)"', group[: group.index("</g>")])
            assert len(places) == len(indices)
            assert [*map(float, places)] == sorted(map(float, places))  # as the sizes are


@pytest.mark.parametrize("count", [1, 2])
def test_a_sweep_of_one_or_two_marks_has_them_where_the_script_looks(tmp_path: Path, count: int) -> None:
    for index in range(count):
        run(tmp_path / str(index), f"t={index}", size=100 + 100 * index, accuracy=0.9 + 0.01 * index)
    page_of(tmp_path)
    text = (tmp_path / "pareto.html").read_text()
    group = text[text.index('id="all-wide-front"') :]
    marks = re.sub(r"<defs>.*?</defs>", "", group[: group.index("</g>")], flags=re.DOTALL)
    assert len(re.findall("<use |<path ", marks)) == count


def test_nothing_but_failures_is_still_a_page(tmp_path: Path) -> None:
    run(tmp_path / "0", "a=1", size=None, status="failed", error="ran out of luck")
    run(tmp_path / "1", "a=2", accuracy=None)
    page = page_of(tmp_path)
    assert "No run has a file and a metric yet." in page.text
    assert "ran out of luck" in page.text
    assert "no accuracy" in page.text


def test_an_unknown_dense_start_is_said(tmp_path: Path) -> None:
    run(tmp_path / "0", dense=None)
    assert "How far files are from dense is not known" in page_of(tmp_path).text


def test_what_a_general_compressor_makes_of_dense(tmp_path: Path) -> None:
    run(tmp_path / "0", dense_packed={"name": "zlib level 6", "bytes": 9200})
    assert "; zlib level 6 makes 9,200 bytes of it" in page_of(tmp_path).text
    assert "dense + zlib level 6" in (tmp_path / "pareto.svg").read_text()


def test_a_thousand_jobs_of_three_hundred_layers_with_long_names(tmp_path: Path) -> None:
    for index in range(1000):
        overrides = [f"compression.callbacks.levels.some_long_option_{n}={index * n % 7}" for n in range(6)]
        seed = f"seed={index % 3}"
        run(
            tmp_path / str(index),
            *overrides,
            f"x={index // 3}",
            seed,
            size=1000 + 7 * index % 997,
            layers=300 if index < 9 else 4,
        )
    page = page_of(tmp_path)
    assert (tmp_path / "pareto.html").stat().st_size < 1_000_000
    assert "1000 runs, 334 settings" in page.text or "1000 runs" in page.text
    assert "Not shown: " in page.text


def test_the_metric_is_the_runs_objective(tmp_path: Path) -> None:
    run(tmp_path / "0", metric="mae")
    run(tmp_path / "1", metric="loss", objective="loss")
    assert metric_of(find_jobs([tmp_path])) == "loss"
    assert metric_of(find_jobs([tmp_path / "0"])) == "mae"
    run(tmp_path / "2", metric="accuracy", objective="file_bytes")
    assert metric_of(find_jobs([tmp_path / "2"])) == "accuracy"


def test_psc_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "a/0")
    run(tmp_path / "b/0", "t=1")
    run(tmp_path / "b/0/notes", "t=2")  # a run within a run is not looked for there, but where it is named
    out = tmp_path / "out"
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b/0"), "-o", str(out)]) == 0
    assert "3 runs" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a/pareto.html").is_file()
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty"), str(tmp_path / "none")]) == 2
    assert "empty holds none; " in (said := capsys.readouterr().err)
    assert "none is no folder" in said
    assert main(["report", str(tmp_path / "a"), "--metric", "f1"]) == 2
    assert "--metric f1: not one of accuracy" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "a"), "--lower", "--metric", "accuracy"]) == 0
    assert "lower is better" in (tmp_path / "a/pareto.svg").read_text()
    assert not list(tmp_path.glob("a/*/report.html"))
    assert (
        main(["report", str(tmp_path / "a/0"), "-o", str(out)]) == 0
    )  # a run that is named has a page of its own then
    assert (tmp_path / "a/0/report.html").is_file()
    (tmp_path / "file").touch()
    assert main(["report", str(tmp_path / "a"), "-o", str(tmp_path / "file")]) == 2
    assert "File exists" in capsys.readouterr().err
