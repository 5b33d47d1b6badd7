from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psc_lightning.numerics.precision import PRECISIONS, Rounding, power_of_two, read_numbers, write_numbers

HALF, LOG8, SINGLE = PRECISIONS["float16"], PRECISIONS["log8"], PRECISIONS["float32"]


@given(st.floats(-(2.0**126), 2.0**126, width=32))
def test_power_of_two_is_just_above(value):
    unit = power_of_two(torch.tensor([value, 0.0]))
    assert math.frexp(unit)[0] == 0.5
    if 2.0**-100 <= abs(value) < 2.0**100:
        assert unit / 2 <= abs(value) < unit
    assert 2.0**-100 <= unit <= 2.0**100


@given(st.floats(2.0**-90, 2.0**90, width=32), st.floats(0, 1, width=32))
def test_round_to_half_is_a_half_times_the_unit_and_never_zero(top, share):
    values = torch.tensor([top, share * top])
    unit = power_of_two(values)
    rounded = HALF.round(values, unit)
    halves = (rounded.double() / unit).numpy()
    assert (halves.astype(np.float16) == halves).all()
    assert (rounded > 0).all()
    assert abs(rounded[0] - top) <= top * 2.0**-11
    signed = HALF.round(-values, unit, positive=False)
    assert abs(signed[0] + top) <= top * 2.0**-11


def test_round_to_half_clamps_and_leaves_no_negative_zero(same_bits):
    assert HALF.round(torch.tensor([1e30, 0.0, -3.0]), 1.0).tolist() == [65504.0, 2.0**-24, 2.0**-24]
    assert same_bits(
        HALF.round(torch.tensor([1e30, -1e30, -1e-30, 0.5]), 1.0, positive=False),
        torch.tensor([65504.0, -65504.0, 0.0, 0.5]),
    )


def test_the_grid_by_hand():
    """Eight steps an octave up to the unit; half of the smallest step and below is zero, or the smallest."""
    step = 2 ** (1 / 8)
    values = torch.tensor([4.0, 4 / step, -4 / step**1.4, 0.0, 4 * 2**-15.75 * 0.49, 4 * 2**-15.75 * 0.51])
    expected = torch.tensor([4.0, 4 / step, -4 / step, 0.0, 0.0, 4 * 2**-15.75])
    torch.testing.assert_close(LOG8.round(values, 4.0, positive=False), expected, rtol=1e-6, atol=0)
    assert LOG8.round(torch.tensor([0.0, -1.0]), 4.0).tolist() == [torch.tensor(4 * 2**-15.75).item()] * 2


@given(st.integers(0, 10**6), st.integers(-40, 40), st.sampled_from(sorted(PRECISIONS)), st.booleans())
@settings(max_examples=100, deadline=None)
def test_rounded_once_is_rounded_for_good(seed: int, exponent: int, name: str, positive: bool):
    values = torch.randn(30, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    values = values.abs() if positive else values
    unit, how = power_of_two(values), PRECISIONS[name]
    once = how.round(values, unit, positive)
    assert torch.equal(how.round(once, unit, positive), once)
    near = {"float32": 0.0, "float16": 2.0**-11, "log8": 0.0453}[name]
    large = values.abs() > unit * 2.0**-12
    assert bool(((once - values).abs() <= near * values.abs())[large].all())
    assert not positive or bool((once > 0).all())


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("size", [1e-28, 1e-3, 1.0, 1e30])
def test_they_come_back(size: float, positive: bool, name: str, tape, same_bits):
    values = torch.tensor([0.3, -0.7, 0.0, 1e-4]) * size
    unit = power_of_two(values)
    rounded = PRECISIONS[name].round(values, unit, positive)
    written = tape()
    write_numbers(written, name, rounded, unit)
    assert same_bits(read_numbers(written, 4), rounded)
    assert written.finished


def test_float16_and_its_exponent_are_what_files_had_before(tape):
    written = tape()
    write_numbers(written, "float16", torch.tensor([1.5, 0.25]), 2.0)
    assert written.items[0] == 1
    assert written.items[1][1] == 65536


def test_a_stored_scale_that_is_not_finite_is_refused(tape):
    written = tape()
    written.integer(0)
    written.symbols(torch.tensor([0x7C00], dtype=torch.int32), 65536)
    with pytest.raises(ValueError, match="not a finite number"):
        read_numbers(written, 1)


@pytest.mark.parametrize("number", [101, 512, 1024 - 101, 2048 + 100 - 1024 * 3])
def test_an_exponent_that_no_writer_writes_is_refused(number: int, tape):
    written = tape()
    written.integer(number)
    written.symbols(torch.zeros(1, dtype=torch.int32), 65536)
    with pytest.raises(ValueError, match=r"exponent|integer|-100"):
        read_numbers(written, 1)


@pytest.mark.parametrize("name", PRECISIONS)
def test_rounding_many_at_once_is_rounding_each(name: str, same_bits):
    torch.manual_seed(0)
    almost = torch.tensor([1 - 2.0**-12, 0.25])  # which float16 rounds up to the next power
    rows = [torch.randn(5) * 2.0**e for e in (-20, 0, 3)] + [almost, 0.98 * almost, torch.zeros(2), torch.rand(2, 2)]
    for positive in (True, False):
        how = PRECISIONS[name]
        one, other = (
            [
                Rounding(row.abs() if positive else row, how, torch.empty_like(row), torch.empty(()), positive)
                for row in rows
            ]
            for _ in range(2)
        )
        for task in one:
            task.do()
        Rounding.do_all(other)
        for each, same in zip(one, other, strict=True):
            assert same_bits(each.into, same.into)
            assert same_bits(each.unit, same.unit)
            again = Rounding(each.into, how, torch.empty_like(each.into), torch.empty(()), positive)
            again.do()  # who starts from rounded numbers finds the same
            assert same_bits(again.unit, each.unit) or not each.values.any()
            assert same_bits(again.into, each.into) or not each.values.any()
