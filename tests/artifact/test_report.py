from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import bag, compressed, net
from torch import nn

from psc_lightning.artifact import inspect, measure, save, to_bytes
from psc_lightning.report.numbers import Report, TensorReport

KEYS = ["dense_bytes", "file_bytes", "compression_ratio", "entropy_bytes", "overhead_bytes", "sha256", "metrics"]
KEYS += ["batchnorm_batches", "stored_as", "notes", "tensors"]
ROW_KEYS = ["name", "layer_type", "shape", "core_shape", "method", "dense_bytes", "stored_bytes", "sparsity", "levels"]


def test_keys_of_report_json(tmp_path: Path) -> None:
    report = to_bytes(compressed(levels="binary"))[1]
    report.metrics["compressed"] = {"accuracy": 0.5}
    report.save(tmp_path / "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found == report.to_dict()
    assert list(found) == KEYS
    assert list(found["tensors"][0]) == ROW_KEYS
    assert Report.from_dict(found) == report
    del found["sha256"]  # as version 0.1.0 wrote it at first
    assert Report.from_dict(found).sha256 is None


def test_a_row_by_hand() -> None:
    report = to_bytes(compressed(mask=("magnitude", {"threshold": 0.25}), levels="binary"))[1]
    row = report.tensors[0]
    assert (row.name, row.layer_type, row.shape, row.core_shape) == ("0.weight", "Conv2d", (8, 4, 3, 3), (8, 4, 3, 3))
    assert (row.method, row.dense_bytes, row.sparsity, row.levels) == ("magnitude+binary", 4 * 288, 0.25, 3)
    # 288 bits of mask at H(1/4) = 0.811, 216 signs, 8 scales of 16 bits, and a few numbers.
    assert (288 * 0.811 + 216 + 128) / 8 < row.stored_bytes < (288 * 0.811 + 216 + 128) / 8 + 25
    assert [row.layer_type for row in report.tensors] == ["Conv2d"] * 2 + ["BatchNorm2d"] * 5 + ["Linear"] * 2
    assert report.tensors[1].method == "plain"
    assert report.tensors[1].levels is None
    assert report.dense_bytes == sum(t.nbytes for t in net().state_dict().values())
    assert report.compression_ratio == report.dense_bytes / report.file_bytes


def test_factors_have_a_shape_each() -> None:
    row = to_bytes(compressed(tying=("low_rank", {"rank": 2}), levels="uniform"))[1].tensors[0]
    assert len(row.core_shape) == 2
    assert row.levels is not None
    assert 2 < row.levels <= 255
    assert row.method == "low_rank+uniform"


def test_entropy_by_hand() -> None:
    # Exponents 127 and 128 half and half, one bit each; signs and mantissas constant, nothing.
    report = to_bytes(bag({"a": torch.tensor([1.0, 2.0] * 500)}))[1]
    assert report.entropy_bytes == 1000 / 8
    assert 125 <= report.tensors[0].stored_bytes < 125 + 12


def test_entropy_is_below_the_file_without_contexts() -> None:
    report = to_bytes(compressed(levels="uniform"))[1]
    assert report.entropy_bytes < report.file_bytes - report.overhead_bytes


def test_sparsity_counts_all_zeros() -> None:
    weight = torch.randn(10, 20, generator=torch.Generator().manual_seed(0))
    weight[:, :5] = 0.0
    assert to_bytes(bag({"a": weight, "e": torch.zeros(0)}))[1].tensors[0].sparsity == 0.25


def test_inspect_agrees_with_save(tmp_path: Path) -> None:
    model = compressed(mask="magnitude", levels="codebook")
    report = save(model, tmp_path / "model.psc")
    found = inspect(tmp_path / "model.psc")
    assert found.sha256 == hashlib.sha256((tmp_path / "model.psc").read_bytes()).hexdigest()
    for key in ("dense_bytes", "file_bytes", "compression_ratio", "entropy_bytes", "overhead_bytes", "sha256"):
        assert getattr(found, key) == getattr(report, key), key
    for row, expected in zip(found.tensors, report.tensors, strict=True):
        for key in ("name", "shape", "dense_bytes", "stored_bytes", "sparsity", "levels"):
            assert getattr(row, key) == getattr(expected, key), key


def test_stored_bytes_are_where_the_bits_are(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (5000,), generator=generator).to(torch.uint8)
    report = to_bytes(bag({"zeros": torch.zeros(5000), "noise": noise, "tail": torch.zeros(5000)}))[1]
    stored = [row.stored_bytes for row in report.tensors]
    assert stored[0] < 20
    assert 5000 <= stored[1] < 5010
    assert stored[2] < 20
    assert 14 <= report.overhead_bytes < 60


def test_fractions_of_a_byte_are_not_lost() -> None:
    """Constants of a bit or two each: the parts' sum is the whole's, not the sum of what each rounds to."""
    report = to_bytes(bag({f"{i}.n{i}": torch.tensor([True]) for i in range(200)}))[1]
    assert max(row.stored_bytes for row in report.tensors) <= 1
    assert sum(row.stored_bytes for row in report.tensors) == 8


def test_the_table_says_it_all() -> None:
    report = to_bytes(compressed(mask=("magnitude", {"threshold": 0.25}), levels="binary"))[1]
    report.metrics = {"dense": {"accuracy": 0.975}, "compressed": {"accuracy": 0.97, "loss": 0.1234567}}
    lines = str(report).splitlines()
    assert lines[0].split("  ")[0] == "#"
    assert "8x4x3x3" in lines[1]
    assert "magnitude+binary" in lines[1]
    assert "25.0" in lines[1]
    assert "1,152" in lines[1]
    row = report.tensors[0]
    assert lines[1].split() == [
        "0",
        row.name,
        "Conv2d",
        "8x4x3x3",
        row.method,
        "25.0",
        "3",
        "1,152",
        f"{row.stored_bytes:,}",
    ]
    assert lines[-5].split() == ["names,", "header,", "checksum", f"{report.overhead_bytes:,}"]
    assert f"{report.file_bytes:,}" in lines[-4]
    assert f"{report.dense_bytes:,}" in lines[-4]
    assert lines[-3:] == [
        "dense: accuracy 0.975",
        "compressed: accuracy 0.97, loss 0.1235",
        "BatchNorm's statistics: running averages of training",
    ]
    assert max(map(len, lines)) <= 160


def test_many_plain_tensors_share_a_row() -> None:
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(5)))
    report = to_bytes(model)[1]
    (line,) = (line for line in str(report).splitlines() if "25 others" in line)
    assert line.split() == [
        "25",
        "others",
        "plain",
        f"{report.dense_bytes:,}",
        f"{sum(r.stored_bytes for r in report.tensors):,}",
    ]
    assert "0.running_mean" not in str(report)
    assert "0.running_mean" in report.table(all_tensors=True)


def test_names_are_not_markup() -> None:
    row = TensorReport("[red]x:smile:", "", (), (), "plain", 4, 4, 0.0, None)
    report = Report(4, 20, 0.2, 4, 16, {}, [row])
    assert "[red]x:smile:" in str(report)
    assert "0.20x smaller" in str(report)


def test_levels_of_each_method() -> None:
    expected = {"binary": 2, "ternary": 3, "ttq": 3, "codebook": 16, "uniform": 255, "log": None}
    for method, most in expected.items():
        row = to_bytes(compressed(levels=method))[1].tensors[0]
        assert row.levels is not None
        if most is not None:
            assert row.levels <= most
    assert to_bytes(compressed(levels="binary"))[1].tensors[0].levels == 2


def test_reports_of_nothing() -> None:
    report = to_bytes(nn.ReLU())[1]
    assert (report.dense_bytes, report.tensors) == (0, [])
    assert report.overhead_bytes == report.file_bytes
    assert measure(nn.ReLU()) == report
    assert np.isfinite(report.compression_ratio)
    assert str(report)


@pytest.mark.parametrize("seed", range(3))
def test_parts_add_up(seed: int) -> None:
    report = to_bytes(net(seed))[1]
    assert sum(row.stored_bytes for row in report.tensors) + report.overhead_bytes == report.file_bytes
    assert sum(row.dense_bytes for row in report.tensors) == report.dense_bytes
