"""The order of an epoch, as a pure function."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.shuffle import Slice, even_window, plan_epoch

SIZES = st.lists(st.integers(0, 200), max_size=12)
SETTINGS = st.fixed_dictionaries(
    {"slice_rows": st.integers(1, 80), "window": st.integers(1, 15), "seed": st.integers(0, 2**64)}
)


@settings(deadline=None)
@given(SIZES, SETTINGS, st.integers(0, 5))
def test_every_row_exactly_once(sizes, options, epoch):
    slices = list(plan_epoch(sizes, **options, epoch=epoch))
    rows = sorted((s.shard, row) for s in slices for row in range(s.start, s.stop))
    assert rows == [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
    assert all(0 < s.stop - s.start <= options["slice_rows"] for s in slices)
    assert slices == list(plan_epoch(sizes, **options, epoch=epoch))


@settings(deadline=None)
@given(SIZES, SETTINGS)
def test_window_bounds_the_open_shards(sizes, options):
    slices = list(plan_epoch(sizes, **options, epoch=0))
    first, last = {}, {}
    for turn, piece in enumerate(slices):
        first.setdefault(piece.shard, turn)
        last[piece.shard] = turn
    for turn in range(len(slices)):
        assert sum(first[s] <= turn <= last[s] for s in first) <= options["window"]


@settings(deadline=None)
@given(SIZES, SETTINGS)
def test_each_shard_is_read_in_order_and_wraps_once(sizes, options):
    for shard in range(len(sizes)):
        slices = plan_epoch(sizes, **options, epoch=1)
        starts = [s.start for s in slices if s.shard == shard]
        descents = [1 for left, right in itertools.pairwise(starts) if right < left]
        assert len(descents) <= 1
        assert not descents or starts[-1] < starts[0]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 100))
def test_another_seed_or_epoch_is_another_order(seed, epoch):
    def plan(seed, epoch):
        return list(plan_epoch([1000] * 8, slice_rows=50, window=4, seed=seed, epoch=epoch))

    assert plan(seed, epoch) != plan(seed, epoch + 1)
    assert plan(seed, epoch) != plan(seed + 1, epoch)


def test_epochs_bring_other_rows_together():
    """Even where the window holds every shard."""

    def batches(epoch):
        slices = list(plan_epoch([640] * 4, slice_rows=32, window=4, seed=0, epoch=epoch))
        return {frozenset(slices[i : i + 4]) for i in range(0, len(slices), 4)}

    assert not batches(0) & batches(1)


def test_shards_take_turns():
    slices = list(plan_epoch([100] * 4, slice_rows=50, window=2, seed=0, epoch=0))
    order = [s.shard for s in slices]
    assert order[0:2] == order[2:4]
    assert order[4:6] == order[6:8]
    assert sorted(order[0:2] + order[4:6]) == [0, 1, 2, 3]


def test_uneven_shard_makes_room_for_the_next():
    slices = list(plan_epoch([10, 100, 100], slice_rows=10, window=3, seed=0, epoch=0))
    assert len(slices) == 21
    assert slices.count(Slice(0, 0, 10)) == 1


@pytest.mark.parametrize(
    ("n_shards", "window", "expected"),
    [(9, 8, 5), (8, 8, 8), (7, 8, 7), (81, 21, 21), (85, 21, 17), (1, 1, 1), (0, 4, 0)],
)
def test_even_window(n_shards, window, expected):
    assert even_window(n_shards, window) == expected
