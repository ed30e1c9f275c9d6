"""The order of rows, as a pure function."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.shuffle import (
    LAST_START,
    deal_shards,
    plan_batches,
    plan_epoch,
    size_slices,
    start_lanes,
)

SIZES = st.lists(st.integers(0, 200), max_size=12)
SETTINGS = st.fixed_dictionaries(
    {
        "slice_rows": st.integers(1, 80),
        "window": st.integers(1, 15),
        "seed": st.integers(0, 2**64),
        "epoch": st.integers(0, 3),
        "growth_rows": st.integers(1, 300),
    }
)
STREAMS = st.fixed_dictionaries(
    {
        "rows_per_shard": SIZES.filter(sum),
        "batch_size": st.integers(1, 150),
        "window": st.integers(1, 15),
        "seed": st.integers(0, 99),
    }
)
STEADY = {"slice_rows": 50, "window": 4, "seed": 0, "epoch": 1, "growth_rows": 100}


def list_rows(slices):
    return [(piece.shard, row) for piece in slices for row in range(piece.start, piece.stop)]


def take(n, options, **more):
    return list(itertools.islice(plan_batches(**options, **more), n))


@given(SIZES, SETTINGS)
def test_every_row_exactly_once(sizes, options):
    slices = list(plan_epoch(sizes, **options))
    expected = [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    assert sorted(list_rows(slices)) == expected
    assert all(0 < s.stop - s.start <= options["slice_rows"] for s in slices)
    assert slices == list(plan_epoch(sizes, **options))


@given(SIZES, SETTINGS)
def test_a_lane_reads_one_shard_at_a_time_and_the_window_bounds_the_lanes(sizes, options):
    lanes = {}
    for piece in plan_epoch(sizes, **options):
        lanes.setdefault(piece.lane, []).append(piece)
    assert len(lanes) <= options["window"]
    opened = [
        shard
        for lane in lanes.values()
        for shard, _ in itertools.groupby(lane, key=lambda piece: piece.shard)
    ]
    assert len(opened) == len(set(opened)) == sum(size > 0 for size in sizes)


@given(SIZES, SETTINGS)
def test_each_shard_is_read_in_order_and_wraps_once(sizes, options):
    for shard in range(len(sizes)):
        starts = [s.start for s in plan_epoch(sizes, **options) if s.shard == shard]
        descents = [1 for left, right in itertools.pairwise(starts) if right < left]
        assert len(descents) <= 1
        assert not descents or starts[-1] < starts[0]


@given(st.integers(0, 2**32), st.integers(0, 100))
def test_another_seed_or_epoch_is_another_order(seed, epoch):
    def plan(seed, epoch):
        return list(plan_epoch([1000] * 8, **(STEADY | {"seed": seed, "epoch": epoch})))

    assert plan(seed, epoch) != plan(seed, epoch + 1)
    assert plan(seed, epoch) != plan(seed + 1, epoch)


def test_epochs_bring_other_rows_together():
    """Even where the window holds every shard."""

    def batches(epoch):
        slices = [
            (s.shard, s.start)
            for s in plan_epoch([640] * 4, **(STEADY | {"slice_rows": 32, "epoch": epoch}))
        ]
        return {frozenset(slices[i : i + 4]) for i in range(0, len(slices), 4)}

    assert not batches(1) & batches(2)


# shards of 1000 rows, window; shards open among the last 10 slices of an epoch
ENDS = [(8, 4, 4), (9, 4, 4), (11, 4, 4), (9, 8, 8), (81, 10, 10)]


@pytest.mark.parametrize(("n_shards", "window", "expected"), ENDS)
@pytest.mark.parametrize("epoch", [0, 1])
def test_the_window_does_not_shrink_at_the_end(n_shards, window, expected, epoch):
    """Where lanes have unequally many shards, the fuller ones are only read faster."""
    options = STEADY | {"slice_rows": 10, "window": window, "epoch": epoch}
    slices = list(plan_epoch([1000] * n_shards, **options))
    assert len({piece.shard for piece in slices[-2 * window :]}) == expected
    fullest, emptiest = -(-n_shards // window), n_shards // window
    counts = [sum(s.lane == lane for s in slices[-20 * window :]) for lane in range(window)]
    if epoch > 0:
        assert max(counts) <= min(counts) * fullest / emptiest + 2


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 99), st.booleans())
def test_the_first_batch_needs_two_shards(n_shards, window, seed, tiny):
    sizes = [400] * n_shards + [7] * tiny
    (batch,) = take(1, {"rows_per_shard": sizes, "batch_size": 100, "window": window, "seed": seed})
    assert len({piece.shard for piece in batch}) == min(window, 2)


def test_lanes_are_added_one_by_one():
    """About one for each eighth of a shard's rows, in the first epoch only."""
    sizes = [8000] * 20

    def count_lanes(epoch):
        options = {"slice_rows": 50, "window": 10, "seed": 0, "growth_rows": 1000}
        rows, first_at = 0, {}
        for piece in plan_epoch(sizes, **options, epoch=epoch):
            first_at.setdefault(piece.lane, rows)
            rows += piece.stop - piece.start
        return sorted(first_at.values())

    assert max(count_lanes(1)) < 10 * 50
    grown = count_lanes(0)
    assert grown[1] == 50
    steps = [right - left for left, right in itertools.pairwise(grown[1:])]
    assert all(900 <= step <= 1300 for step in steps), steps


@pytest.mark.parametrize(
    ("width", "growth", "expected"),
    [
        (1, 0.1, [0]),
        (2, 0.1, [0, 0]),
        (3, 0.1, [0, 0, 0.1 * 3 / 2]),
        (4, 0.1, [0, 0, 0.2, 0.2 + 0.4 / 3]),
        (3, 0.9, [0, 0, LAST_START]),  # too late: closer together
    ],
)
def test_start_lanes(width, growth, expected):
    assert start_lanes(width, growth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("order", "rows", "width", "expected"),
    [
        ([2, 0, 1, 3], [9, 9, 9, 9], 2, [[2, 1], [0, 3]]),
        ([0, 1, 2], [1, 9, 9], 2, [[0, 2], [1]]),
        ([0, 1, 2, 3], [1, 9, 9, 9], 3, [[0, 3], [1], [2]]),  # the tiny one takes nobody's turn
        ([1, 0], [9, 9], 3, [[1], [0], []]),
    ],
)
def test_deal_shards(order, rows, width, expected):
    assert deal_shards(order, rows, width) == expected


@pytest.mark.parametrize(
    ("batch_size", "window", "expected"), [(4096, 21, 195), (4096, 1, 4096), (64, 8, 32)]
)
def test_size_slices(batch_size, window, expected):
    assert size_slices(batch_size, window) == expected


@given(STREAMS, st.integers(1, 30))
def test_batches_are_full_and_epochs_follow_each_other(options, n_batches):
    batches = take(n_batches, options)
    size = options["batch_size"]
    assert all(len(list_rows(batch)) == size for batch in batches)
    rows = [row for batch in batches for row in list_rows(batch)]
    n_rows = sum(options["rows_per_shard"])
    everything = [(s, row) for s, n in enumerate(options["rows_per_shard"]) for row in range(n)]
    for first in range(0, len(rows) - n_rows + 1, n_rows):
        assert sorted(rows[first : first + n_rows]) == everything


@given(STREAMS, st.integers(0, 40))
def test_resuming_at_a_batch_is_the_rest(options, first):
    assert take(3, options, first_batch=first) == take(first + 3, options)[first:]


@given(STREAMS, st.lists(st.integers(1, 20), min_size=3, max_size=3))
def test_ranks_together_are_one_reader_whatever_their_number_at_each_batch(options, worlds):
    for number, world in enumerate(worlds):
        (whole,) = take(1, options, first_batch=number)
        parts = [
            take(1, options, first_batch=number, rank=rank, world_size=world)[0]
            for rank in range(world)
        ]
        sizes = [len(list_rows(part)) for part in parts]
        assert list_rows(itertools.chain.from_iterable(parts)) == list_rows(whole)
        assert max(sizes) - min(sizes) <= 1
