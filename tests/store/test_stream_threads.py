"""Behind a stream: chunks read once, prefetch bounded, memory used again, no thread left behind."""

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
from store.stream import SHARDS_AHEAD
from store.stream_plan import BATCHES_ALIVE, PREFETCHED_BATCHES
from tests.store.small_store import CONTEXT, HOOK, assert_rows_equal, make_spec, write_store
from tests.store.streams import plan, stream, stream_slowly


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("store") / "out", make_spec())


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
