"""Round trips, and what is counted or refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from store.errors import NumberRangeError
from store.numbers import (
    FORMATS,
    MAX_UNDERFLOWED_FRACTION,
    RowNames,
    Stored,
    check_numbers,
    decode_numbers,
    encode_numbers,
)
from tests.store.small_store import as_stored

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Largest relative error of a number in the format's normal range, and where that range begins.
PRECISION = {"float32": (0.0, 0.0), "float16": (2**-11, 2**-14), "bfloat16": (2**-8, 2**-126)}


def names(n_rows: int, array: str = "h/acts") -> RowNames:
    return RowNames(4, array, torch.arange(n_rows) // 10 + 100, torch.arange(n_rows) % 10)


@pytest.mark.parametrize("name", PRECISION)
@settings(deadline=None)
@given(values=st.lists(FINITE, min_size=1, max_size=50))
def test_round_trip_error_is_bounded(name, values):
    precision, smallest = PRECISION[name]
    given_values = torch.tensor(values)
    limit = torch.finfo(FORMATS[name].memory).max
    stored = as_stored(given_values, name).double()
    expected = given_values.double().clamp(-limit, limit)
    error = (stored - expected).abs()
    assert (error <= expected.abs() * precision + smallest * precision).all()


@pytest.mark.parametrize("name", PRECISION)
@settings(deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=50))
def test_stored_values_are_read_and_written_without_change(name, values):
    once = as_stored(torch.tensor(values), name)
    assert once.dtype == torch.float32
    assert torch.equal(as_stored(once, name), once)
    bits = encode_numbers(once, FORMATS[name]).numbers
    assert bits.dtype == FORMATS[name].disk
    assert bits.tobytes() == encode_numbers(as_stored(once, name), FORMATS[name]).numbers.tobytes()


def test_integers_are_exact():
    values = torch.tensor([0, -1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    assert torch.equal(
        decode_numbers(encode_numbers(values, FORMATS["int32"]), FORMATS["int32"]), values
    )


@pytest.mark.parametrize("name", FORMATS)
def test_fill_is_no_value(name):
    fill = np.full(1, FORMATS[name].fill, FORMATS[name].disk)
    value = decode_numbers(Stored(fill), FORMATS[name]).item()
    assert np.isnan(value) if FORMATS[name].memory.is_floating_point else value == -1


def test_statistics_match_a_slow_reference():
    values = torch.randn(9000, 3, generator=torch.Generator().manual_seed(0)) + 0.5
    stored = as_stored(values, "float16").double()
    found = check_numbers(values, FORMATS["float16"], names(9000))
    assert found.mean == pytest.approx(stored.mean().item(), rel=1e-12)
    assert found.rms == pytest.approx(stored.square().mean().sqrt().item(), rel=1e-12)
    assert found.max_abs == stored.abs().max().item()
    assert found.mean_row_norm == pytest.approx(stored.norm(dim=1).mean().item(), rel=1e-12)
    assert (found.saturated, found.underflowed) == (0, 0)


def test_statistics_do_not_depend_on_threads():
    values = torch.randn(5000, 64, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(check_numbers(values, FORMATS["bfloat16"], names(5000)))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("row", [0, 17, 4999])
def test_not_finite_is_refused_with_its_place(name, value, row):
    values = torch.zeros(5000, 2)
    values[row, 1] = value
    place = rf"h/acts at shard 4, block {row // 10 + 100}, position {row % 10}: .* got {value}"
    with pytest.raises(NumberRangeError, match=place):
        check_numbers(values, FORMATS[name], names(5000))


@pytest.mark.parametrize(
    ("value", "saturates"),
    [
        (65504.0, False),  # the largest
        (65519.0, False),  # rounds down to it
        (65520.0, True),  # would round to infinity
        (-1e30, True),
    ],
)
def test_float16_overflow(value, saturates):
    values = torch.ones(1000, 2)
    values[123, 0] = value
    if not saturates:
        assert check_numbers(values, FORMATS["float16"], names(1000)).saturated == 0
        return
    with pytest.raises(NumberRangeError, match=r"block 112, position 3 .*float16, got 1 of 2000"):
        check_numbers(values, FORMATS["float16"], names(1000))
    assert check_numbers(values, FORMATS["bfloat16"], names(1000)).saturated == 0


def test_one_saturated_value_in_a_million_is_counted_and_clamped():
    values = torch.ones(1000, 1000)
    values[5, 7] = -1e9
    assert check_numbers(values, FORMATS["float16"], names(1000)).saturated == 1
    assert as_stored(values, "float16")[5, 7] == -65504


def test_underflow_is_counted_against_the_nonzero_values():
    values = torch.zeros(1000, 10)
    values[:, :2] = 1.0
    allowed = int(2000 * MAX_UNDERFLOWED_FRACTION)
    values[100 : 100 + allowed, 0] = 1e-9  # still 2,000 nonzero values
    assert check_numbers(values, FORMATS["float16"], names(1000)).underflowed == allowed
    values[100 + allowed, 0] = 1e-9
    message = r"h/grads at shard 4, block 110, position 0 .*cache\.grads_dtype"
    with pytest.raises(NumberRangeError, match=message):
        check_numbers(values, FORMATS["float16"], names(1000, "h/grads"))
    assert check_numbers(values, FORMATS["bfloat16"], names(1000)).underflowed == 0
