from __future__ import annotations

import ast
import math
import pickle
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import psc_lightning.schedule
from psc_lightning.schedule import KINDS, Schedule

shares = st.floats(0.0, 1.0)
positions = shares | st.integers(0, 2000)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    begin, end = draw(positions), draw(positions)
    if isinstance(begin, float) == isinstance(end, float):
        begin, end = sorted((begin, end))
    return Schedule(draw(st.sampled_from(sorted(KINDS))), begin, end)


# Worked by hand: a quarter, a half and three quarters of the way from step 20 to step 60 of 100.
@pytest.mark.parametrize(
    ("kind", "quarter", "half", "three_quarters"),
    [
        ("constant", 1.0, 1.0, 1.0),
        ("linear", 0.25, 0.5, 0.75),
        ("cubic", 37 / 64, 7 / 8, 63 / 64),
        ("cosine", 0.14644660940672627, 0.5, 0.8535533905932737),
    ],
)
@pytest.mark.parametrize(("begin", "end"), [(0.2, 0.6), (20, 60), (0.2, 60), (20, 0.6)])
def test_hand_computed(kind, quarter, half, three_quarters, begin, end):
    schedule = Schedule(kind, begin, end)
    strengths = [schedule.strength(step, 100) for step in (19, 30, 40, 50, 60, 100)]
    assert strengths == pytest.approx([0.0, quarter, half, three_quarters, 1.0, 1.0], abs=1e-15)


def test_default_is_a_linear_ramp_over_the_first_seven_tenths():
    assert Schedule() == Schedule("linear", 0.0, 0.7)
    assert [Schedule().strength(step, 10) for step in (0, 7)] == [0.0, 1.0]
    assert Schedule().strength(1, 10) == pytest.approx(1 / 7)


@given(schedules(), st.integers(0, 3000), st.integers(1, 500), st.integers(0, 2000))
def test_zero_before_begin_one_from_end_and_monotone(schedule, step, later, total):
    begin = schedule.begins(total)
    here, there = schedule.strength(step, total), schedule.strength(step + later, total)
    assert isinstance(begin, int)
    assert 0.0 <= here <= there <= 1.0
    assert step >= begin or here == 0.0
    assert schedule.strength(begin + 2000, total) == 1.0  # no end lies farther than that


@given(st.sampled_from(["linear", "cubic"]), positions, positions, st.integers(0, 2000))
def test_exactly_one_at_end_and_less_just_before(kind, one, other, total):
    def step(position: float) -> int:
        return Schedule("constant", begin=position).begins(total)

    first, last = sorted((one, other), key=lambda position: (step(position), position))
    schedule, begin, end = Schedule(kind, first, last), step(first), step(last)
    assume(begin < end)
    assert schedule.strength(end, total) == 1.0
    assert schedule.strength(end - 1, total) < 1.0


@given(shares, st.integers(0, 10**6))
def test_a_share_is_the_nearest_step(share, total):
    assert abs(Schedule("constant", begin=share).begins(total) - share * total) <= 0.5 + 1e-9


def test_floats_do_not_shift_a_step():
    # 0.1 · 30 is 3.0000000000000004 in floating point, 0.29 · 100 is 28.999999999999996
    assert Schedule(begin=0.1).begins(30) == 3
    assert Schedule(begin=0.29).begins(100) == 29


def test_one_is_a_step_and_one_point_zero_is_the_end():
    assert Schedule(begin=1, end=1).begins(100) == 1
    assert Schedule(begin=1.0, end=1.0).begins(100) == 100


def test_end_at_or_before_begin_means_at_once():
    assert [Schedule("linear", 10, 10).strength(step, 100) for step in (9, 10)] == [0.0, 1.0]
    assert [Schedule("linear", 50, 0.2).strength(step, 100) for step in (49, 50)] == [0.0, 1.0]
    assert Schedule("linear", 0.0, 0.0).strength(0, 100) == 1.0


@pytest.mark.parametrize("schedule", [Schedule(end=0.7), Schedule("constant", begin=0.1), Schedule(begin=0.5, end=0.5)])
@pytest.mark.parametrize("total", [math.inf, math.nan, -1])
def test_shares_of_an_endless_run_are_refused(schedule, total):
    with pytest.raises(ValueError, match="give begin/end in steps"):
        schedule.strength(0, total)


def test_a_late_start_does_not_hide_that_the_end_is_unknown():
    with pytest.raises(ValueError, match=r"0\.7 is a share"):
        Schedule(begin=1000).strength(0, math.inf)


def test_endless_runs_in_steps():
    assert Schedule("linear", 0.0, 10).strength(5, math.inf) == 0.5
    assert Schedule("linear", 10, 20).begins(math.inf) == 10
    assert Schedule("constant").strength(0, math.inf) == 1.0  # the default end is not used, so it need not be known
    assert Schedule("linear", 0.0, 0.0).strength(0, math.inf) == 1.0


@pytest.mark.parametrize("value", [True, -1, -0.1, 1.1, math.nan, math.inf, "0.5", None])
@pytest.mark.parametrize("name", ["begin", "end"])
def test_wrong_positions_name_the_argument(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be a float 0\.0 … 1\.0 .* or an int ≥ 0"):
        Schedule(**{name: value})


@pytest.mark.parametrize(("begin", "end"), [(0.8, 0.7), (11, 10)])
def test_begin_behind_end_is_refused(begin, end):
    with pytest.raises(ValueError, match=f"begin must not be greater than end, but {begin} > {end}"):
        Schedule("linear", begin, end)
    assert Schedule("constant", begin, end).begin == begin  # a constant has no use for its end


@pytest.mark.parametrize("kind", ["quadratic", None, "", ["linear"]])
def test_unknown_kind_lists_the_known(kind):
    with pytest.raises(ValueError, match="kind must be one of constant, linear, cubic, cosine, not"):
        Schedule(kind)


DEFAULT = Schedule("cubic", 0.1, 0.5)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, DEFAULT),
        (Schedule("cosine"), Schedule("cosine", 0.0, 0.7)),
        ("constant", Schedule("constant", 0.1, 0.5)),
        ({}, DEFAULT),
        ({"end": 200}, Schedule("cubic", 0.1, 200)),
        ({"kind": "linear", "begin": 5, "end": 10}, Schedule("linear", 5, 10)),
    ],
)
def test_of(value, expected):
    assert Schedule.of(value, DEFAULT) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("quadratic", "kind must be one of"),
        ({"start": 0.1}, "a mapping of kind, begin, end, not {'start': 0.1}"),
        ({"begin": "half"}, "begin must be"),
        (0.7, "schedule must be a Schedule, one of constant, linear, cubic, cosine"),
        (["linear"], "schedule must be"),
    ],
)
def test_of_refuses(value, message):
    with pytest.raises(ValueError, match=message):
        Schedule.of(value, DEFAULT)


def test_is_a_plain_value():
    assert pickle.loads(pickle.dumps(DEFAULT)) == DEFAULT
    assert len({DEFAULT, Schedule("cubic", 0.1, 0.5)}) == 1
    with pytest.raises(FrozenInstanceError):
        DEFAULT.begin = 0.0  # type: ignore[misc]


def test_imports_only_the_standard_library():
    tree = ast.parse(Path(psc_lightning.schedule.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names
