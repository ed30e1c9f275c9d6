"""Round trips, and what is counted or refused."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from store.errors import NumberRangeError
from store.numbers import (
    FORMATS,
    MAX_UNDERFLOWED_FRACTION,
    VALUE_FORMATS,
    RowNames,
    Stored,
    check_numbers,
    decode_numbers,
    encode_numbers,
)
from tests.store.small_store import as_stored

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ERROR_BOUNDS = {  # relative and absolute; int8's beside half a step of its scales
    "float32": (0.0, 0.0),
    "float16": (2**-11, 2**-25),
    "bfloat16": (2**-8, 2**-134),
    "int8": (2**-22, 2**-149),
}
UNSCALED = [name for name in ERROR_BOUNDS if name != "int8"]


def names(n_rows: int, array: str = "h/acts") -> RowNames:
    return RowNames(4, array, torch.arange(n_rows) // 10 + 100, torch.arange(n_rows) % 10)


@pytest.mark.parametrize("name", UNSCALED)
@settings(deadline=None)
@given(values=st.lists(FINITE, min_size=1, max_size=50))
def test_round_trip_error_is_bounded(name, values):
    relative, absolute = ERROR_BOUNDS[name]
    given_values = torch.tensor(values)
    limit = torch.finfo(FORMATS[name].memory).max
    stored = as_stored(given_values, name).double()
    expected = given_values.double().clamp(-limit, limit)
    error = (stored - expected).abs()
    assert (error <= expected.abs() * relative + absolute).all()


@pytest.mark.parametrize("name", UNSCALED)
@settings(deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=50))
def test_stored_values_are_read_and_written_without_change(name, values):
    once = as_stored(torch.tensor(values), name)
    assert once.dtype == torch.float32
    assert torch.equal(as_stored(once, name), once)
    bits = encode_numbers(once, FORMATS[name]).numbers
    assert bits.dtype == FORMATS[name].disk
    assert bits.tobytes() == encode_numbers(as_stored(once, name), FORMATS[name]).numbers.tobytes()


class Int8(NamedTuple):
    numbers: np.ndarray
    row_scale: np.ndarray
    channel_scale: np.ndarray
    values: np.ndarray  # as a reader returns them


def encode_int8(values: torch.Tensor) -> Int8:
    stored = encode_numbers(values, FORMATS["int8"])
    assert stored.row_scale is not None
    assert stored.channel_scale is not None
    decoded = decode_numbers(stored, FORMATS["int8"])
    return Int8(stored.numbers, stored.row_scale, stored.channel_scale, decoded.numpy())


def assert_int8_error_is_bounded(values: torch.Tensor) -> Int8:
    """Half a step of the row's and channel's scale; the rest is float32's two roundings."""
    stored = encode_int8(values)
    assert np.abs(stored.numbers.astype(int)).max() <= 127
    relative, absolute = ERROR_BOUNDS["int8"]
    wanted = values.double().clamp(-(2.0**96), 2.0**96).numpy()
    found = stored.values.astype(float)
    half_step = np.outer(stored.row_scale.astype(float), stored.channel_scale.astype(float)) / 2
    assert np.isfinite(found).all()
    assert (np.abs(found - wanted) <= half_step + np.abs(found) * relative + absolute).all()
    return stored


@settings(deadline=None)
@given(data=st.data(), width=st.integers(1, 6))
def test_int8_error_is_bounded(data, width):
    """Of any finite numbers: tiny, huge, zeros."""
    rows = st.lists(FINITE, min_size=width, max_size=width)
    assert_int8_error_is_bounded(torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=12))))


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.dictionaries(st.integers(0, 39), st.integers(-60, 60), max_size=5),
    channels=st.dictionaries(st.integers(0, 15), st.integers(-60, 30), max_size=5),
)
def test_int8_error_is_bounded_beside_outliers(seed, rows, channels):
    """Rows and channels that are larger or smaller than the others by powers of two."""
    values = torch.randn(40, 16, generator=torch.Generator().manual_seed(seed))
    for row, power in rows.items():
        values[row] *= 2.0**power
    for channel, power in channels.items():
        values[:, channel] *= 2.0**power
    stored = assert_int8_error_is_bounded(values)
    assert (np.abs(stored.numbers).max(axis=1) == 127).all()  # every row uses its range


def test_int8_scales_match_a_slow_reference():
    values = torch.randn(5000, 7, generator=torch.Generator().manual_seed(5)).double() + 0.3
    values[:, 2] *= 100
    values[17] = 0
    values[4999] *= 3000
    values = values.float()
    stored = encode_int8(values)
    exact = values.double()
    kept = exact[exact.norm(dim=1) > 0]
    channel = ((kept / kept.norm(dim=1, keepdim=True)) ** 2).mean(dim=0).mul(7).sqrt()
    row = (exact / channel).abs().amax(dim=1) / 127
    assert stored.channel_scale == pytest.approx(channel.numpy(), rel=2e-7)
    assert stored.row_scale == pytest.approx(row.numpy(), rel=4e-7)


def test_a_huge_row_does_not_set_the_scale_of_the_others():
    values = torch.randn(300, 8, generator=torch.Generator().manual_seed(6))
    before = encode_int8(values)
    values[0] *= 2**12  # such as position 0
    after = encode_int8(values)
    assert after.channel_scale.tobytes() == before.channel_scale.tobytes()
    assert after.numbers.tobytes() == before.numbers.tobytes()
    assert after.row_scale[0] == before.row_scale[0] * 2**12
    assert after.row_scale[1:].tobytes() == before.row_scale[1:].tobytes()


def test_int8_of_zeros():
    values = torch.zeros(3, 4)
    values[1, 2] = -5
    stored = encode_int8(values)
    assert stored.row_scale[[0, 2]].tolist() == [0, 0]
    assert stored.channel_scale[[0, 1, 3]].tolist() == [1, 1, 1]
    assert stored.values == pytest.approx(values.numpy())
    assert stored.numbers[1].tolist() == [0, 0, -127, 0]


def test_int8_rounds_small_values_to_zero_and_counts_them():
    """More of them than other formats may lose: that is what it does."""
    values = torch.ones(100, 4)
    values[:, 0] *= torch.tensor([1e-4, 1.0]).repeat(50)
    found = check_numbers(values, FORMATS["int8"], names(100)).statistics
    assert 400 * MAX_UNDERFLOWED_FRACTION < 50
    assert (found.saturated, found.underflowed) == (0, 50)


def test_int8_beyond_its_range_is_clamped_and_counted():
    values = torch.ones(1000, 1000)
    values[5, 7] = -3e38
    encoded = check_numbers(values, FORMATS["int8"], names(1000))
    assert encoded.statistics.saturated == 1
    assert decode_numbers(encoded.stored, FORMATS["int8"])[5, 7].item() == pytest.approx(-(2.0**96))
    values[6:8, 7] = 3e38
    with pytest.raises(NumberRangeError, match=r"saturating in int8, got 3 of 1000000"):
        check_numbers(values, FORMATS["int8"], names(1000))


@pytest.mark.parametrize("name", FORMATS)
def test_decoding_into_given_rows(name):
    values = torch.arange(12).reshape(3, 4).to(FORMATS[name].memory)
    stored = encode_numbers(values, FORMATS[name])
    out = torch.full((5, 4), -7.0).to(torch.int32 if name == "int32" else torch.float32)
    found = decode_numbers(stored, FORMATS[name], out[1:4])
    assert torch.equal(out[1:4], decode_numbers(stored, FORMATS[name]))
    assert found.data_ptr() == out[1:4].data_ptr()
    assert (out[[0, 4]] == -7).all()
    assert decode_numbers(stored.take(np.array([2, 0])), FORMATS[name]).equal(found[[2, 0]])


def test_integers_are_exact():
    values = torch.tensor([0, -1, 2**31 - 1, -(2**31)], dtype=torch.int32)
    assert torch.equal(
        decode_numbers(encode_numbers(values, FORMATS["int32"]), FORMATS["int32"]), values
    )


@pytest.mark.parametrize("name", FORMATS)
def test_fill_is_no_value(name):
    fill = np.full((1, 1), FORMATS[name].fill, FORMATS[name].disk)
    stored = Stored(fill)
    if FORMATS[name].scaled:
        assert fill.item() < -127
        stored = Stored(fill, np.full(1, np.nan, np.float32), np.ones(1, np.float32))
    value = decode_numbers(stored, FORMATS[name]).item()
    assert np.isnan(value) if FORMATS[name].memory.is_floating_point else value == -1


def test_statistics_match_a_slow_reference():
    values = torch.randn(9000, 3, generator=torch.Generator().manual_seed(0)) + 0.5
    stored = as_stored(values, "float16").double()
    found = check_numbers(values, FORMATS["float16"], names(9000)).statistics
    assert found.mean == pytest.approx(stored.mean().item(), rel=1e-12)
    assert found.rms == pytest.approx(stored.square().mean().sqrt().item(), rel=1e-12)
    assert found.max_abs == stored.abs().max().item()
    assert found.mean_row_norm == pytest.approx(stored.norm(dim=1).mean().item(), rel=1e-12)
    assert (found.saturated, found.underflowed) == (0, 0)


@pytest.mark.parametrize("name", ["bfloat16", "int8"])
def test_bytes_and_statistics_do_not_depend_on_threads(name):
    values = torch.randn(5000, 64, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(check_numbers(values, FORMATS[name], names(5000)))
    finally:
        torch.set_num_threads(before)
    assert found[0].statistics == found[1].statistics
    for one, two in zip(found[0].stored, found[1].stored, strict=True):
        assert np.array_equal(one, two)  # also of None and None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", VALUE_FORMATS)
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
        assert check_numbers(values, FORMATS["float16"], names(1000)).statistics.saturated == 0
        return
    with pytest.raises(NumberRangeError, match=r"block 112, position 3 .*float16, got 1 of 2000"):
        check_numbers(values, FORMATS["float16"], names(1000))
    assert check_numbers(values, FORMATS["bfloat16"], names(1000)).statistics.saturated == 0


def test_one_saturated_value_in_a_million_is_counted_and_clamped():
    values = torch.ones(1000, 1000)
    values[5, 7] = -1e9
    assert check_numbers(values, FORMATS["float16"], names(1000)).statistics.saturated == 1
    assert as_stored(values, "float16")[5, 7] == -65504


def test_underflow_is_counted_against_the_nonzero_values():
    values = torch.zeros(1000, 10)
    values[:, :2] = 1.0
    allowed = int(2000 * MAX_UNDERFLOWED_FRACTION)
    values[100 : 100 + allowed, 0] = 1e-9  # still 2,000 nonzero values
    assert check_numbers(values, FORMATS["float16"], names(1000)).statistics.underflowed == allowed
    values[100 + allowed, 0] = 1e-9
    message = r"h/grads at shard 4, block 110, position 0 .*cache\.grads_dtype"
    with pytest.raises(NumberRangeError, match=message):
        check_numbers(values, FORMATS["float16"], names(1000, "h/grads"))
    assert check_numbers(values, FORMATS["bfloat16"], names(1000)).statistics.underflowed == 0
