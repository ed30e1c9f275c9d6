"""Batches: the planned order, exactly sized, filtered, prefetched, and no thread left behind."""

import threading
import time
from pathlib import Path

import pytest
import torch

import store
from store.shuffle import plan_epoch
from store.stream import count_rows, stream_batches
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


@pytest.fixture(scope="module", params=[PACKED, PADDED], ids=["packed", "padded"])
def opened(request, tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "out", make_spec(request.param))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "out", make_spec())


def stream(opened, **options):
    defaults = {"batch_size": 16, "epochs": 1, "seed": 0, "window": 3}
    return list(stream_batches(opened, **(defaults | options)))


def names(batches):
    return [
        pair
        for batch in batches
        for pair in zip(batch.block.tolist(), batch.position.tolist(), strict=True)
    ]


def stream_slowly(opened, *, batch_size, epochs, seed, window, exclude):
    """The planned slices one after the other, filtered, then cut."""
    slice_rows = max(32, batch_size // window)
    sizes = [shard.n_rows for shard in opened.shards]
    rows = [
        opened.read_slots(*piece)
        for epoch in range(epochs)
        for piece in plan_epoch(sizes, slice_rows=slice_rows, window=window, seed=seed, epoch=epoch)
    ]
    whole = store.Rows(*(torch.cat(columns) for columns in zip(*rows, strict=True)))
    kept = torch.tensor([p not in exclude for p in whole.position.tolist()])
    whole = store.Rows(*(column[kept] for column in whole))
    n_batches = len(whole.block) // batch_size
    return [
        store.Batch(*(column[i * batch_size : (i + 1) * batch_size] for column in whole))
        for i in range(n_batches)
    ]


@pytest.mark.parametrize("exclude", [(), (0,), (0, 3, 7)])
@pytest.mark.parametrize("batch_size", [1, 16, 33])
@pytest.mark.parametrize("window", [1, 3])
def test_batches_are_the_planned_rows(opened, exclude, batch_size, window):
    settings = {"batch_size": batch_size, "epochs": 2, "seed": 5, "window": window}
    found = stream(opened, exclude_positions=exclude, **settings)
    expected = stream_slowly(opened, exclude=exclude, **settings)
    assert len(found) == len(expected) == 2 * count_rows(opened, exclude) // batch_size
    for left, right in zip(found, expected, strict=True):
        assert_rows_equal(left, right)


def test_an_epoch_has_every_row_once_and_is_exact(opened):
    found = names(stream(opened, batch_size=1))
    expected = all_rows(opened.spec)
    order = {name: row for row, name in enumerate(names([expected]))}
    assert sorted(found) == sorted(order)
    rows = torch.tensor([order[name] for name in found])
    batches = stream(opened, batch_size=1)
    acts = torch.cat([batch.acts for batch in batches])
    assert torch.equal(acts, expected.acts[rows])


def test_order_is_a_function_of_the_settings(opened):
    first = names(stream(opened, epochs=2))
    assert first == names(stream(opened, epochs=2))
    assert first != names(stream(opened, epochs=2, seed=1))
    assert first[: len(first) // 2] != first[len(first) // 2 :]


@pytest.mark.parametrize("exclude", [(), (0,), (7, 1), (2, 2)])
def test_count_rows(opened, exclude):
    expected = sum(p not in exclude for p in all_rows(opened.spec).position.tolist())
    assert count_rows(opened, exclude) == expected


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
        ({"batch_size": 169}, "expected 169 or more"),
        ({"tokens": 15}, "expected 16 or more"),
        ({"hook": "other"}, f"hook at .*{HOOK}"),
        ({"exclude_positions": (CONTEXT,)}, r"expected 0\.\.7, got \[8\]"),
        ({"exclude_positions": (-1,)}, r"got \[-1\]"),
    ],
)
def test_impossible_streams_are_refused_at_once(packed, options, message):
    before = threading.active_count()
    with pytest.raises(store.StoreError, match=message):
        stream_batches(
            packed, **({"batch_size": 16, "epochs": 1, "seed": 0, "window": 3} | options)
        )
    assert threading.active_count() == before


def test_each_chunk_is_decoded_once(packed, monkeypatch):
    """Four slices of four rows to a chunk: no chunk twice, but where a shard wraps around."""
    reads = []
    read_slots = store.ActivationStore.read_slots

    def spy(self, shard, start, stop, hook=None):
        reads.append((shard, start))
        return read_slots(self, shard, start, stop, hook)

    monkeypatch.setattr(store.ActivationStore, "read_slots", spy)
    monkeypatch.setattr("store.stream.MIN_SLICE_ROWS", 4)
    stream(packed, batch_size=12, window=3)
    n_chunks = sum(-(-shard.n_rows // 16) for shard in packed.shards)
    assert n_chunks <= len(reads) <= n_chunks + len(packed.shards)
    assert len(set(reads)) == n_chunks


def prefetching():
    return [thread for thread in threading.enumerate() if thread.name == "store-prefetch"]


def test_no_thread_is_left_behind(packed):
    batches = stream_batches(packed, batch_size=4, epochs=9, seed=0, window=2)
    assert not prefetching()  # nothing runs before the first batch is wanted
    next(batches)
    assert prefetching()
    batches.close()
    assert not prefetching()
    for _ in stream_batches(packed, batch_size=4, epochs=9, seed=0, window=2):
        break
    assert not prefetching()
    stream(packed)
    assert not prefetching()


def test_prefetch_is_bounded(packed, monkeypatch):
    cut = []
    original = store.stream._cut_batches

    def spy(pieces, batch_size):
        for batch in original(pieces, batch_size):
            cut.append(1)
            yield batch

    monkeypatch.setattr(store.stream, "_cut_batches", spy)
    batches = stream_batches(packed, batch_size=4, epochs=9, seed=0, window=2)
    next(batches)
    time.sleep(0.3)
    assert len(cut) <= 1 + store.stream.PREFETCHED_BATCHES + 1
    batches.close()


def test_errors_of_the_thread_reach_the_consumer(tmp_path):
    opened = write_store(tmp_path / "out", make_spec())
    (Path(opened.where) / "tokens/c/3").unlink()
    with pytest.raises(store.ShardMissing):
        stream(opened)
    assert not prefetching()
