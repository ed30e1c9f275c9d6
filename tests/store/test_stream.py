"""Batches: the planned order, exactly sized, filtered, and resumed where a checkpoint stopped."""

import pytest
import torch

import store
from store.shuffle import plan_batches
from tests.store.small_store import (
    CONTEXT,
    HOOK,
    PACKED,
    PADDED,
    all_rows,
    assert_rows_equal,
    make_spec,
    write_store,
)
from tests.store.streams import join, names, plan, stream, stream_slowly


@pytest.fixture(scope="module", params=[PACKED, PADDED], ids=["packed", "padded"])
def opened(request, tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "out", make_spec(request.param))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "out", make_spec())


@pytest.mark.parametrize("shortest_run", [1, 16])
@pytest.mark.parametrize("exclude", [(), (0,), (0, 3, 7)])
@pytest.mark.parametrize("batch_size", [1, 16, 33])
@pytest.mark.parametrize("window", [1, 3])
def test_batches_are_the_planned_rows(
    opened, exclude, batch_size, window, shortest_run, monkeypatch
):
    monkeypatch.setattr("store.lanes.MIN_RUN_ROWS", shortest_run)
    planned = plan(
        opened,
        batch_size=batch_size,
        epochs=2,
        seed=5,
        window=window,
        exclude_positions=exclude,
    )
    found = list(store.stream_batches(opened, planned))
    expected = list(stream_slowly(opened, planned))
    assert len(found) == len(expected) == 2 * store.count_rows(opened, exclude) // batch_size
    for left, right in zip(found, expected, strict=True):
        assert_rows_equal(left, right)


@pytest.mark.parametrize(
    ("acts", "grads", "compression"),
    [("int8", "int8", "none"), ("int8", "float32", "blosc"), ("bfloat16", "int8", "zstd")],
)
@pytest.mark.parametrize("exclude", [(), (0,), (1, 3, 5, 6)])
def test_scales_of_several_shards_meet_in_a_batch(tmp_path, acts, grads, compression, exclude):
    spec = make_spec(PADDED, acts_dtype=acts, grads_dtype=grads, compression=compression)
    opened = write_store(tmp_path / "out", spec)
    planned = plan(opened, batch_size=33, epochs=3, window=5, exclude_positions=exclude)
    ranks = [store.stream_batches(opened, planned, rank=r, world_size=3) for r in range(3)]
    found = list(zip(store.stream_batches(opened, planned), *ranks, strict=True))
    assert max(len(set(batch.block.tolist())) for batch, *_ in found) > 8  # of three shards or more
    for (batch, *parts), expected in zip(found, stream_slowly(opened, planned), strict=True):
        assert_rows_equal(batch, expected)
        assert_rows_equal(join(parts), expected)


@pytest.mark.parametrize(
    ("acts", "grads"), [("float16", "bfloat16"), ("float32", "int8"), ("bfloat16", "float16")]
)
def test_rows_as_stored_have_the_same_values(tmp_path, acts, grads):
    opened = write_store(tmp_path / "out", make_spec(acts_dtype=acts, grads_dtype=grads))
    planned = plan(opened, batch_size=7, epochs=2, exclude_positions=(1,))
    as_stored = store.stream_batches(opened, planned, as_stored=True)
    for found, expected in zip(as_stored, store.stream_batches(opened, planned), strict=True):
        wanted = [
            torch.float32 if name == "int8" else getattr(torch, name) for name in (acts, grads)
        ]
        assert [found.acts.dtype, found.grads.dtype] == wanted
        assert_rows_equal(
            found._replace(acts=found.acts.float(), grads=found.grads.float()), expected
        )


def test_an_epoch_has_every_row_once_and_is_exact(opened):
    found = names(stream(opened, batch_size=1))
    expected = all_rows(opened.spec)
    order = {name: row for row, name in enumerate(names([expected]))}
    assert sorted(found) == sorted(order)
    rows = torch.tensor([order[name] for name in found])
    assert_rows_equal(
        join(stream(opened, batch_size=1)), store.Batch(*(column[rows] for column in expected))
    )


def test_order_is_a_function_of_the_settings(opened):
    first = names(stream(opened, epochs=2))
    assert first == names(stream(opened, epochs=2))
    assert first != names(stream(opened, epochs=2, seed=1))
    assert first[: len(first) // 2] != first[len(first) // 2 :]


@pytest.mark.parametrize("first", [0, 1, 7, 19, 20])
def test_a_stream_goes_on_where_a_checkpoint_stopped(opened, first):
    """In the middle of a shard, of a slice and of an epoch."""
    options = {"epochs": 3, "exclude_positions": (0,), "batch_size": 8, "tokens": 160}
    planned = plan(opened, **options)
    state = store.StreamState(planned.order, first)
    resumed = store.stream_batches(
        opened, planned, first_batch=store.resume_batch(plan(opened, **options), state)
    )
    whole = list(store.stream_batches(opened, planned))
    assert len(whole) == 20
    found = list(resumed)
    assert len(found) == 20 - first
    for left, right in zip(found, whole[first:], strict=True):
        assert_rows_equal(left, right)


def test_resuming_reads_nothing_that_was_skipped(packed, monkeypatch):
    read = []
    read_stored = store.ActivationStore.read_stored

    def spy(self, shard, path, slots):
        read.append((shard, path))
        return read_stored(self, shard, path, slots)

    planned = plan(packed, batch_size=8, epochs=3)
    monkeypatch.setattr(store.ActivationStore, "read_stored", spy)
    last = store.stream_batches(packed, planned, first_batch=planned.n_batches - 1)
    assert len(list(last)) == 1
    pieces = next(
        plan_batches(
            planned.rows_per_shard,
            batch_size=8,
            window=3,
            seed=0,
            first_batch=planned.n_batches - 1,
        )
    )
    assert {shard for shard, _ in read} == {piece.shard for piece in pieces}


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"batch_size": 15},
        {"window": 2},
        {"exclude_positions": (0,)},
    ],
)
def test_a_checkpoint_of_another_order_is_refused(packed, change):
    state = store.StreamState(plan(packed, **change).order, 2)
    with pytest.raises(store.StoreError, match="order of the batches at batch 2: expected"):
        store.resume_batch(plan(packed), state)


def test_more_epochs_go_on_in_the_same_order(packed):
    assert plan(packed, epochs=2).order == plan(packed, epochs=3, tokens=400).order
    assert names(stream(packed, epochs=3))[:320] == names(stream(packed, epochs=2))[:320]


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_together_see_what_one_reader_sees(opened, world_size):
    """Bit for bit; also where there are more ranks than shards."""
    planned = plan(opened, epochs=2, exclude_positions=(0,))
    whole = store.stream_batches(opened, planned)
    ranks = [
        store.stream_batches(opened, planned, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert_rows_equal(join(parts), batch)


def test_world_size_may_change_between_runs(packed):
    planned = plan(packed, epochs=2)
    parts, batch = [], 0
    for world_size, n_batches in [(1, 3), (3, 4), (2, 14)]:
        ranks = [
            store.stream_batches(
                packed, planned, first_batch=batch, rank=rank, world_size=world_size
            )
            for rank in range(world_size)
        ]
        for _ in range(n_batches):
            parts += [next(rank) for rank in ranks]
        for rank in ranks:
            rank.close()
        batch += n_batches
    assert_rows_equal(join(parts), join(stream(packed, epochs=2)))


def test_present_shards_alone_are_streamed(tmp_path):
    whole = write_store(tmp_path / "out", make_spec())
    (tmp_path / f"out/{HOOK}/acts/c/2/0").unlink()
    opened = store.open_store(tmp_path / "out", allow_partial=True)
    missing = whole.shards[2]
    gone = range(missing.first_block, missing.first_block + missing.n_blocks)
    found = {block for block, _ in names(stream(opened, batch_size=1))}
    assert found == set(range(21)) - set(gone)
    assert store.count_rows(opened) == 168 - missing.n_rows
    assert plan(opened).order != plan(whole).order


def test_no_window_is_the_one_that_mixes_enough(packed):
    planned = plan(packed, window=None)
    found = store.find_mixedness(packed, planned)
    assert found.window == planned.window
    assert found.steady >= 0.9 or planned.window == 6
    narrower = plan(packed, window=planned.window - 1)
    assert store.find_mixedness(packed, narrower).steady < 0.9
    assert plan(packed, window=99).window == 6


@pytest.mark.parametrize("exclude", [(), (0,), (7, 1), (2, 2)])
def test_count_rows(opened, exclude):
    expected = sum(p not in exclude for p in all_rows(opened.spec).position.tolist())
    assert store.count_rows(opened, exclude) == expected


def test_tokens_stop_the_stream(packed):
    assert packed.n_rows == 168
    assert len(stream(packed, tokens=100)) == 6  # 100 // 16
    assert names(stream(packed, tokens=100)) == names(stream(packed))[:96]
    assert len(stream(packed, tokens=168 * 3, epochs=3)) == 31


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 169}, "expected 169 or more in 1 epochs, got 168"),
        ({"tokens": 337, "epochs": 2}, "expected 337 or more in 2 epochs, got 336"),
        ({"tokens": 148, "exclude_positions": (0,)}, "expected 148 .* got 147"),
        ({"batch_size": 169}, "at least a batch of 169, got 168"),
        ({"tokens": 15}, "at least a batch of 16, got 15"),
        ({"hook": "other"}, f"hook at .*{HOOK}"),
        ({"exclude_positions": (CONTEXT,)}, r"expected 0\.\.7, got \[8\]"),
        ({"exclude_positions": (-1,)}, r"got \[-1\]"),
    ],
)
def test_impossible_streams_are_refused_at_once(packed, options, message):
    with pytest.raises(store.StoreError, match=message):
        plan(packed, **options)


@pytest.mark.parametrize("first", [-1, 11])
def test_a_first_batch_beyond_the_plan_is_refused_at_once(packed, first):
    with pytest.raises(store.StoreError, match=rf"expected a first batch in 0\.\.10, got {first}"):
        store.stream_batches(packed, plan(packed), first_batch=first)
