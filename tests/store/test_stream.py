"""Batches: the planned order, exactly sized, filtered, prefetched, and no thread left behind."""

import itertools
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import store
from store.lanes import decode_parts
from store.shuffle import plan_batches
from store.stream import SHARDS_AHEAD
from store.stream_plan import BATCHES_ALIVE, PREFETCHED_BATCHES
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


def plan(opened, **options):
    defaults = {"hook": HOOK, "batch_size": 16, "epochs": 1, "seed": 0, "window": 3}
    return store.plan_stream(opened, **(defaults | options))


def stream(opened, **options):
    return list(store.stream_batches(opened, plan(opened, **options)))


def names(batches):
    return [
        pair
        for batch in batches
        for pair in zip(batch.block.tolist(), batch.position.tolist(), strict=True)
    ]


def join(batches):
    return store.Batch(*(torch.cat(columns) for columns in zip(*batches, strict=True)))


def stream_slowly(opened, planned):
    """Every shard filtered, then the planned slices one after the other."""
    shards = []
    for shard in opened.present:
        rows = opened.read_slots(shard, 0, opened.shards[shard].n_rows)
        kept = torch.tensor([p not in planned.exclude_positions for p in rows.position.tolist()])
        shards.append(store.Rows(*(column[kept] for column in rows)))
    batches = plan_batches(
        planned.rows_per_shard,
        batch_size=planned.batch_size,
        window=planned.window,
        seed=planned.seed,
    )
    for _, pieces in zip(range(planned.n_batches), batches, strict=False):
        parts = [
            store.Rows(*(column[piece.start : piece.stop] for column in shards[piece.shard]))
            for piece in pieces
        ]
        yield join(parts)


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


def test_each_chunk_is_read_once(packed, monkeypatch):
    """Four slices of four rows to a chunk: no chunk twice, but where a shard wraps around."""
    reads = []
    read_chunk = store.arrays.read_chunk

    def spy(file, chunk, shard_format, checksums, where, *others):
        if "/acts/" in where:
            reads.append((where, chunk))
        return read_chunk(file, chunk, shard_format, checksums, where, *others)

    monkeypatch.setattr(store.arrays, "read_chunk", spy)
    monkeypatch.setattr("store.shuffle.MIN_SLICE_ROWS", 4)
    stream(packed, batch_size=12, window=3)
    n_chunks = sum(-(-shard.n_rows // 16) for shard in packed.shards)
    assert n_chunks <= len(reads) <= n_chunks + len(packed.shards)
    assert len(set(reads)) == n_chunks


def test_batches_that_are_held_share_no_memory(packed):
    """Nor do views of them, and what a batch holds does not change."""
    batches = stream(packed, epochs=3)
    pointers = {tensor.data_ptr() for batch in batches for tensor in batch}
    assert len(pointers) == len(batches) * len(batches[0])
    rows, copies = [], []
    for batch in store.stream_batches(packed, plan(packed, epochs=3)):
        rows.append(batch.acts[3].numpy())  # numpy's view of a view
        copies.append(batch.acts[3].clone())
    assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(rows, copies, strict=True))


def test_memory_of_a_batch_that_nobody_holds_is_used_again(packed):
    pointers = set()
    for batch in store.stream_batches(packed, plan(packed, epochs=9)):
        pointers.add(batch.acts.data_ptr())
        del batch
    assert len(pointers) <= BATCHES_ALIVE


def prefetching():
    return [thread for thread in threading.enumerate() if thread.name.startswith("store-prefetch")]


def test_no_thread_is_left_behind(packed):
    planned = plan(packed, batch_size=4, epochs=9)
    batches = store.stream_batches(packed, planned)
    assert not prefetching()  # nothing runs before the first batch is wanted
    next(batches)
    assert prefetching()
    batches.close()
    assert not prefetching()
    for _ in store.stream_batches(packed, planned):
        break
    assert not prefetching()
    stream(packed)
    assert not prefetching()


def test_prefetch_is_bounded(packed, monkeypatch):
    made = []

    def spy(parts, *others):
        made.append(len(parts))
        decode_parts(parts, *others)

    monkeypatch.setattr("store.lanes.decode_parts", spy)
    batches = store.stream_batches(packed, plan(packed, batch_size=4, epochs=9))
    next(batches)
    time.sleep(0.3)
    assert len(made) == 2 * (1 + PREFETCHED_BATCHES + 1)
    batches.close()


PROGRAM = """
import atexit, sys, threading
import store

def tell():
    print([thread.name for thread in threading.enumerate() if thread.name == "store-prefetch"])

atexit.register(tell)
opened = store.open_store(sys.argv[1])
plan = store.plan_stream(
    opened, hook=None, batch_size=16, epochs=999, seed=0, window=3, exclude_positions=(0,)
)
batches = store.stream_batches(opened, plan)
for _ in range(9):
    next(batches)
"""


def test_a_program_may_end_inside_a_stream(packed):
    """Torch aborts the interpreter if one of its threads meets the end of it."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, packed.where],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


@pytest.mark.parametrize("name", ["tokens/c/3", f"{HOOK}/acts/c/3/0", f"{HOOK}/grads/c/3/0"])
def test_errors_of_each_thread_come_after_the_batches_before_them(packed, tmp_path, name):
    opened = write_store(tmp_path / "out", make_spec())
    (Path(opened.where) / name).unlink()
    good = []
    with pytest.raises(store.ShardMissing, match=name):
        good.extend(store.stream_batches(opened, plan(opened)))
    assert not prefetching()
    whole = stream(packed)
    assert 0 < len(good) < len(whole)
    for left, right in zip(good, whole, strict=False):
        assert_rows_equal(left, right)
    shard = packed.shards[3]
    needed = range(shard.first_block, shard.first_block + shard.n_blocks)
    assert set(whole[len(good)].block.tolist()) & set(needed)


def test_a_stream_that_failed_has_ended(tmp_path):
    opened = write_store(tmp_path / "out", make_spec())
    (Path(opened.where) / "loss/c/0").write_bytes(b"")
    batches = store.stream_batches(opened, plan(opened))
    with pytest.raises(store.ShardCorrupt):
        list(batches)
    assert list(batches) == []


class Announced(store.files.LocalFiles):
    """A folder that notes which files it is asked for ahead of need, and which are opened."""

    room_bytes = 2**40  # as a remote's cache has it

    def __init__(self, folder):
        super().__init__(folder)
        self.asked, self.opened, self.lead = [], [], []

    def prefetch(self, files):
        self.asked.append([path for path, _ in files])

    def open(self, path, file):
        if path not in self.opened:
            assert any(path in files for files in self.asked), path
            self.opened.append(path)
            opened = Counter(name.partition("/c/")[0] for name in self.opened)
            self.lead.append(len(self.asked) - max(opened.values()))
        return super().open(path, file)


@pytest.mark.parametrize(("window", "lead"), [(2, 1), (5, 4)])
@pytest.mark.parametrize("first_batch", [0, 5])
def test_files_are_asked_for_a_window_of_shards_ahead(tmp_path, first_batch, window, lead):
    spec = make_spec(np.full(84, CONTEXT, np.int32), min_shards=21)
    files = Announced(write_store(tmp_path / "out", spec).where)
    opened = store.open_store(files)
    planned = plan(opened, window=window)
    assert len(list(store.stream_batches(opened, planned, first_batch=first_batch))) > 0
    assert files.lead[0] == SHARDS_AHEAD - 1  # the first batch waits for no more than it needs
    assert max(files.lead) in (lead, lead + 1)  # a reader may have asked and not opened yet
    shards = [paths[0].split("/")[2] for paths in files.asked]
    assert all(len(paths) == 6 for paths in files.asked)
    assert len(shards) == len(set(shards))
    tokens = [path.split("/")[2] for path in files.opened if path.startswith("tokens")]
    assert tokens == shards


def test_views_that_a_consumer_keeps_never_change(packed):
    kept = [
        (batch.acts.numpy()[::2], batch.grads.t(), batch.acts.clone(), batch.grads.clone())
        for batch in store.stream_batches(packed, plan(packed, epochs=9))
    ]
    assert len(kept) > 3 * BATCHES_ALIVE
    for every_second, transposed, acts, grads in kept:
        assert np.array_equal(every_second, acts.numpy()[::2])
        assert torch.equal(transposed.t(), grads)


class Slow(Announced):
    """A remote, as it were, that keeps some files back for as long as a test likes."""

    def __init__(self, folder, held_back):
        super().__init__(folder)
        self.held_back, self.waiting = held_back, threading.Semaphore(0)
        self.come = threading.Event()

    @contextmanager
    def open(self, path, file):
        if self.held_back(path):
            self.waiting.release()
            assert self.come.wait(30)
        with super().open(path, file) as descriptor:
            yield descriptor


@pytest.mark.parametrize("slow", ["tokens", f"{HOOK}/acts", f"{HOOK}/grads"])
def test_a_slow_file_holds_up_its_own_thread_alone(packed, slow):
    files = Slow(packed.where, lambda path: path.startswith(slow))
    opened = store.open_store(files)
    first = []
    batches = store.stream_batches(opened, plan(opened))
    consumer = threading.Thread(target=lambda: first.append(next(batches)))
    consumer.start()
    assert files.waiting.acquire(timeout=30)
    others = {"tokens", f"{HOOK}/acts", f"{HOOK}/grads"} - {slow}
    for _ in range(300):
        if others <= {path.partition("/c/")[0] for path in files.opened}:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"nothing of {others} was read, only {files.opened}")
    assert not first
    files.come.set()
    consumer.join()
    assert_rows_equal(first[0], stream(packed)[0])
    batches.close()


def test_a_stream_whose_remote_hangs_can_be_closed(tmp_path):
    """At once, not after one timeout for each thread; and the threads ask for no more."""
    spec = make_spec(np.full(84, CONTEXT, np.int32), min_shards=21)

    def shard_of(path):
        return path.partition("/c/")[2].partition("/")[0]

    def is_third(path):
        return len({shard_of(path), *map(shard_of, files.opened)}) > 2

    files = Slow(write_store(tmp_path / "out", spec).where, is_third)
    opened = store.open_store(files)
    batches = store.stream_batches(opened, plan(opened, epochs=9))
    next(batches)
    next(batches)
    for _ in range(3):
        assert files.waiting.acquire(timeout=30)
    threads = prefetching()
    started = time.monotonic()
    batches.close()
    assert time.monotonic() - started < 2
    asked = list(files.asked)
    files.come.set()
    for thread in threads:
        thread.join()
    assert files.asked == asked


def test_a_stream_that_never_began_leaves_nothing(packed):
    files = Announced(packed.where)
    opened = store.open_store(files)
    store.stream_batches(opened, plan(opened)).close()
    batches = store.stream_batches(opened, plan(opened))
    del batches
    assert not prefetching()
    assert not files.asked
    assert not files.opened


def test_two_streams_of_one_store_do_not_meet(packed):
    plans = [plan(packed, epochs=3, seed=seed, exclude_positions=(0,)) for seed in (0, 1)]
    streams = [store.stream_batches(packed, planned) for planned in plans]
    slow = [stream_slowly(packed, planned) for planned in plans]
    for left, right, *expected in itertools.islice(zip(*streams, *slow, strict=True), 20):
        assert_rows_equal(left, expected[0])
        assert_rows_equal(right, expected[1])
    for batches in streams:
        batches.close()
    assert not prefetching()
