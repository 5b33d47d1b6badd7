"""Repetitions, the front, the direction of metrics: numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from made import run

from psc_lightning.pages.front import Point, Scale, falls, front_of, points_of, smallest
from psc_lightning.pages.jobs import Job, find_jobs, read_job


def at(*places: tuple[float, float]) -> list[Point]:
    return [Point((index,), size, value) for index, (size, value) in enumerate(places)]


def test_the_front_is_what_no_other_setting_beats() -> None:
    points = at((100, 0.90), (200, 0.95), (300, 0.94), (150, 0.89), (400, 0.99), (400, 0.98), (90, 0.5))
    assert front_of(points, falling=False) == [6, 0, 1, 4]


def test_of_a_metric_that_falls_less_is_better() -> None:
    points = at((100, 0.9), (200, 0.5), (300, 0.6), (400, 0.1))
    assert front_of(points, falling=True) == [0, 1, 3]
    assert front_of(points, falling=False) == [0]


def test_equal_points_are_both_on_the_front_and_of_equal_metric_the_smaller() -> None:
    assert front_of(at((100, 0.9), (100, 0.9), (200, 0.9)), falling=False) == [0, 1]
    assert front_of([], falling=False) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(("accuracy", False), ("loss", True), ("test/MAE", True), ("auroc", False), ("rmse", True), ("iou", False)),
        *(
            ("mean_squared_error", True),
            ("perplexity", True),
            ("bleu", False),
            ("smallest_merit", False),
            ("val_nll", True),
        ),
        (None, False),
    ],
)
def test_which_metrics_fall(name: str | None, expected: bool) -> None:
    assert falls(name) == expected


def test_seeds_are_repetitions(tmp_path: Path) -> None:
    run(tmp_path / "0", "a=1", "seed=0", size=1000, accuracy=0.90, dense=0.95)
    run(tmp_path / "1", "seed=1", "a=1", size=1200, accuracy=0.94, dense=0.97)
    run(tmp_path / "2", "a=2", "seed=0", size=900, accuracy=0.8, dense=0.95)
    points = points_of(find_jobs([tmp_path]), "accuracy")
    assert [point.jobs for point in points] == [(0, 1), (2,)]
    first, second = points
    assert (first.size, first.value, first.dense) == (1100, pytest.approx(0.92), pytest.approx(0.96))
    assert first.size_deviation == pytest.approx(200 / 2**0.5)  # of two numbers their difference over the root of two
    assert first.value_deviation == pytest.approx(0.04 / 2**0.5)
    assert (second.size_deviation, second.value_deviation) == (0, 0)


def test_the_same_seed_twice_is_no_repetition_and_the_later_run_counts(tmp_path: Path) -> None:
    run(tmp_path / "a/0", "a=1", "seed=0", size=1000)
    run(tmp_path / "b/0", "a=1", "seed=0", size=800)
    (point,) = points_of(find_jobs([tmp_path / "a", tmp_path / "b"]), "accuracy")
    assert (point.jobs, point.size) == ((1,), 800)


def test_other_networks_are_other_settings(tmp_path: Path) -> None:
    first, second = (
        Job(tmp_path, "completed", ("a=1",), report={"dense_bytes": 1}),
        Job(tmp_path, "completed", ("a=1",)),
    )
    assert first.setting != second.setting


def test_a_job_without_a_number_is_no_point(tmp_path: Path) -> None:
    run(tmp_path / "0", "a=1", accuracy=None)
    run(tmp_path / "1", "a=2", accuracy=float("nan"))
    run(tmp_path / "2", "a=3", size=None, status="failed")
    run(tmp_path / "3", "a=4")
    assert [point.jobs for point in points_of(find_jobs([tmp_path]), "accuracy")] == [(3,)]
    assert points_of(find_jobs([tmp_path]), "mae") == []


def test_the_smallest_within_half_a_point_one_and_two() -> None:
    points = [
        Point((i,), size, value, dense=0.99) for i, (size, value) in enumerate([(10, 0.971), (20, 0.981), (30, 0.9849)])
    ]
    scale = Scale.of("accuracy", [0.99], falling=False)
    assert smallest(points, scale) == [(0.5, None), (1.0, 1), (2.0, 0)]
    assert smallest([*points, Point((3,), 99, 0.985, dense=0.99)], scale)[0] == (0.5, 3)  # exactly at the limit
    percent = Scale.of("accuracy", [97.1], falling=False)
    assert percent.change(Point((0,), 10, 97.1, dense=99.0)) == pytest.approx(-1.9)


def test_a_loss_is_compared_in_percent_of_dense() -> None:
    points = [
        Point((i,), size, value, dense=0.2) for i, (size, value) in enumerate([(10, 0.23), (20, 0.21), (30, 0.19)])
    ]
    scale = Scale.of("loss", [0.2], falling=True)
    assert [scale.change(point) for point in points] == pytest.approx([-15, -5, 5])
    assert smallest(points, scale) == [(1.0, 2), (5.0, 1), (10.0, 1)]
    assert scale.change(Point((0,), 1, 0.5, dense=0.0)) is None


def test_the_command_that_repeats_a_run(tmp_path: Path) -> None:
    job = read_job(run(tmp_path / "0", "a=1", "name='x y'", "resume=auto"))
    assert job.command() == """python train.py a=1 'name='"'"'x y'"'"''"""
    installed = read_job(run(tmp_path / "1", "a=1", command="/opt/bin/psc-train a=1"))
    assert installed.command() == "psc-train a=1"
    own = read_job(run(tmp_path / "2", "a=1", command="train.py --config-name mine a=1"))
    assert own.command() == f"python train.py --config-path {tmp_path / '2'} --config-name config"


def test_jobs_come_in_the_order_of_their_numbers_and_once(tmp_path: Path) -> None:
    for name in ("10", "2", "x"):
        run(tmp_path / "sweep" / name)
    (tmp_path / "sweep/1").mkdir()
    (tmp_path / "sweep/1/run.json").write_text("{")
    jobs = find_jobs([tmp_path, tmp_path / "sweep", tmp_path / "sweep/2"])
    assert [job.folder.name for job in jobs] == ["1", "2", "10", "x"]
    assert jobs[0].status == "unreadable"
    assert "property name" in (jobs[0].error or "")


def test_the_part_of_the_axis_that_is_near_dense() -> None:
    share, loss = Scale("accuracy", 0.01, False), Scale("loss", None, True)
    assert share.near(0.9, [0.5, 0.88, 0.93]) == (0.87, 0.935)
    assert share.near(0.9, [0.88, 0.93]) is None  # all are near
    assert share.near(0.9, [0.5, 0.93]) is None  # one is
    assert loss.near(0.5, [0.55, 0.52, 3.0]) == pytest.approx((0.5 - 0.1 / 6, 0.6))
    assert loss.near(0.0, [0.1, 0.2]) is None
