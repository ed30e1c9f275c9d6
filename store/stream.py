"""A plan's batches as torch tensors, read ahead on background threads."""

import itertools
import queue
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from store.errors import StoreError
from store.manifest import locate_scales
from store.numbers import Stored, decode_numbers
from store.reader import COLUMNS, ActivationStore, list_files
from store.shuffle import Slice, plan_batches
from store.stream_plan import BATCHES_ALIVE, PREFETCHED_BATCHES, StreamPlan, count_rows, plan_stream

__all__ = ["Batch", "count_rows", "plan_stream", "read_ahead", "stream_batches"]

SHARDS_AHEAD = 2  # that a remote is asked for before they are opened
MIN_RUN_ROWS = 16  # rows decoded one after another, on average; with fewer they are copied first
_THREAD = "store-prefetch"

T = TypeVar("T")


class Batch(NamedTuple):
    """Rows for one training step, from many blocks."""

    acts: Float[Tensor, "batch d_model"]  # float32, exactly the stored values
    grads: Float[Tensor, "batch d_model"]  # of the summed loss, nats per unit of activation
    tokens: Int[Tensor, " batch"]  # the token at the row's position
    loss: Float[Tensor, " batch"]  # nats, of predicting the next token
    block: Int[Tensor, " batch"]  # counted over the corpus split
    position: Int[Tensor, " batch"]  # in the block


def stream_batches(
    store: ActivationStore,
    plan: StreamPlan,
    *,
    first_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """The plan's batches from `first_batch` on, or one rank's rows of each of them.

    Rank r of w gets rows r * batch_size // w to (r + 1) * batch_size // w, and reads activations
    and gradients of those only; the ranks' parts one after another are what one reader would get.
    No tensor is used twice. Raises StoreError at once if the plan has no `first_batch`; while
    streaming, ShardCorrupt or ShardMissing.
    """
    assert 0 <= rank < world_size <= plan.batch_size
    if not 0 <= first_batch <= plan.n_batches:
        raise StoreError(
            f"stream of {store.where}: expected a first batch in 0..{plan.n_batches}, "
            f"got {first_batch}. Ask for more tokens, or start anew."
        )

    def plan_pieces() -> Iterator[list[Slice]]:
        batches = plan_batches(
            plan.rows_per_shard,
            batch_size=plan.batch_size,
            window=plan.window,
            seed=plan.seed,
            first_batch=first_batch,
            rank=rank,
            world_size=world_size,
        )
        return itertools.islice(batches, plan.n_batches - first_batch)

    coming = _announce_shards(store, plan, plan_pieces())
    return read_ahead(_read_batches(store, plan, plan_pieces(), coming))


def _announce_shards(
    store: ActivationStore, plan: StreamPlan, batches: Iterator[list[Slice]]
) -> Iterator[None]:
    """Ask for the files of one more shard at each step, in the order in which lanes open them."""
    files: dict[int, list] = {shard: [] for shard in plan.shards}
    for file in list_files(store, plan.hook):
        if file.shard in files:
            files[file.shard].append((file.path, file.record))
    in_lane: dict[int, int] = {}
    for piece in itertools.chain.from_iterable(batches):
        if in_lane.get(piece.lane) != piece.shard:
            in_lane[piece.lane] = piece.shard
            store.files.prefetch(files[plan.shards[piece.shard]])
            yield


def _read_batches(
    store: ActivationStore,
    plan: StreamPlan,
    batches: Iterator[list[Slice]],
    coming: Iterator[None],
) -> Generator[Batch, None, None]:
    """Read activations here and gradients on a second thread, which takes as long."""
    arrays = [_ArrayReader(store, f"{plan.hook}/{name}") for name in ("acts", "grads")]
    lanes: dict[int, _OpenShard] = {}
    memories = [_BatchMemory(store.d_model) for _ in arrays]
    for _ in itertools.islice(coming, SHARDS_AHEAD):
        pass
    with ExitStack() as closing_all:
        for array in arrays:
            closing_all.callback(array.close)
        second = closing_all.enter_context(ThreadPoolExecutor(1, thread_name_prefix=_THREAD))
        for pieces in batches:
            runs: list[_Run] = []
            parts = []
            for lane, index, start, stop in pieces:
                opened = lanes.get(lane)
                if opened is None or opened.shard != plan.shards[index]:
                    lanes.pop(lane, None)  # before the next takes its room
                    next(coming, None)
                    opened = lanes[lane] = _OpenShard(store, plan, plan.shards[index])
                runs += opened.list_runs(lane, start, stop)
                parts.append([column[start:stop] for column in opened.columns])
            columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
            acts, grads = (memory.take(len(columns[0])) for memory in memories)
            reading = second.submit(arrays[1].fill, grads, runs)
            arrays[0].fill(acts, runs)
            reading.result()
            yield Batch(acts, grads, *map(torch.from_numpy, columns))


class _BatchMemory:
    """Tensors of batches, in memory that is used again once nobody holds a tensor or a view of it.

    A tensor made by torch.from_numpy holds a reference to its array for as long as its storage
    lives. Fresh memory instead would cost a page fault for every 4 KiB of every batch.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._arrays: list[np.ndarray] = []

    def take(self, n_rows: int) -> Tensor:
        """Uninitialised float32 [n_rows, width]."""
        for i in range(len(self._arrays)):
            array = self._arrays[i]
            # Held by the list, by `array`, and by the call: by nobody else.
            if len(array) == n_rows and sys.getrefcount(array) == 3:
                return torch.from_numpy(array)
        array = np.empty((n_rows, self._width), np.float32)
        if len(self._arrays) < BATCHES_ALIVE:
            self._arrays.append(array)
        return torch.from_numpy(array)


class _Run(NamedTuple):
    """Rows of one chunk that a batch takes one after another."""

    lane: int
    shard: int
    chunk: int
    rows: slice | np.ndarray  # of the chunk


class _OpenShard:
    """A shard that a lane reads: its columns whole, without excluded positions."""

    def __init__(self, store: ActivationStore, plan: StreamPlan, shard: int) -> None:
        self.shard = shard
        self.columns = [store.read_column(shard, name).numpy() for name in COLUMNS]
        position = self.columns[COLUMNS.index("position")]
        kept = np.isin(position, plan.exclude_positions, invert=True)
        self._slots = np.flatnonzero(kept).astype(np.int32)  # of the kept rows
        if plan.exclude_positions:
            self.columns = [column[kept] for column in self.columns]
        self._rows_per_chunk = store.manifest.rows_per_chunk
        chunk = self._slots // self._rows_per_chunk
        steps = np.diff(self._slots, prepend=-2)
        cuts = np.flatnonzero((steps > 1) | (np.diff(chunk, prepend=-1) > 0))
        if len(cuts) * MIN_RUN_ROWS > len(self._slots):  # too many holes: pick rows chunk by chunk
            cuts = np.flatnonzero(np.diff(chunk, prepend=-1) > 0)
        self._cuts = cuts  # kept rows at which a run begins

    def list_runs(self, lane: int, start: int, stop: int) -> Iterator[_Run]:
        """Where kept rows start..stop are: runs without a hole, if those are not too short."""
        first, last = self._cuts.searchsorted((start + 1, stop))
        for begin, end in itertools.pairwise((start, *self._cuts[first:last].tolist(), stop)):
            chunk, row = divmod(int(self._slots[begin]), self._rows_per_chunk)
            rows = self._slots[begin:end] - chunk * self._rows_per_chunk
            whole = int(rows[-1]) - row == end - 1 - begin
            yield _Run(lane, self.shard, chunk, slice(row, row + end - begin) if whole else rows)


class _ArrayReader:
    """Reads acts or grads: of each lane's shard the file is open and one chunk in hand."""

    def __init__(self, store: ActivationStore, path: str) -> None:
        self._store = store
        self._path = path
        self._numbers = store.arrays[path].numbers
        self._chunk_bytes = (
            store.spec.shard_format(store.arrays[path]).chunk_bytes + 4
        )  # and a checksum
        self._lanes: dict[int, _OpenArray] = {}
        self._memory: dict[int, np.ndarray] = {}  # of each lane's chunk; fresh pages cost more

    def fill(self, out: Tensor, runs: Sequence[_Run]) -> None:
        """Decode the runs' rows into `out`, one run after the other."""
        first = 0
        for lane, shard, chunk, rows in runs:
            opened = self._lanes.get(lane)
            if opened is None or opened.shard != shard:
                self._close(lane)  # before the next takes its room
                opened = _OpenArray(self._store, self._path, shard, self._take_memory(lane))
                self._lanes[lane] = opened
            taken = opened.hold_chunk(chunk).take(rows)
            last = first + len(taken.numbers)
            decode_numbers(taken, self._numbers, out[first:last])
            first = last

    def _take_memory(self, lane: int) -> np.ndarray:
        if lane not in self._memory:
            self._memory[lane] = np.empty(self._chunk_bytes, np.uint8)
        return self._memory[lane]

    def close(self) -> None:
        for lane in list(self._lanes):
            self._close(lane)

    def _close(self, lane: int) -> None:
        if lane in self._lanes:
            self._lanes.pop(lane).close()


class _OpenArray:
    """Acts or grads of one shard, as they are on disk."""

    def __init__(self, store: ActivationStore, path: str, shard: int, memory: np.ndarray) -> None:
        self.shard = shard
        self._rows_per_chunk = store.manifest.rows_per_chunk
        self._row_scale = self._channel_scale = None
        if store.arrays[path].numbers.scaled:
            rows, channels = locate_scales(path)
            slots = range(store.shards[shard].n_rows)
            self._row_scale = store.read_stored(shard, rows, slots).numbers
            self._channel_scale = store.read_stored(shard, channels, range(1)).numbers[0]
        self._file = ExitStack()
        self._read = self._file.enter_context(store.open_array(shard, path, memory))
        self._chunk, self._held = -1, None

    def hold_chunk(self, chunk: int) -> Stored:
        if self._held is None or self._chunk != chunk:
            self._held = None  # before the next takes its room
            with ExitStack() as on_error:  # the file's place is told of damage, and closes it
                on_error.push(self._file)
                numbers = self._read(chunk)
                on_error.pop_all()
            first = chunk * self._rows_per_chunk
            here = slice(first, first + self._rows_per_chunk)
            scale = None if self._row_scale is None else self._row_scale[here]
            self._chunk, self._held = chunk, Stored(numbers, scale, self._channel_scale)
        return self._held

    def close(self) -> None:
        self._file.close()


def read_ahead(items: Generator[T, None, None]) -> Iterator[T]:
    """The same items, computed ahead on a thread that ends when the generator does."""
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(PREFETCHED_BATCHES)
    stopped = threading.Event()

    def offer(item: T | None, error: BaseException | None = None) -> None:
        while not stopped.is_set():
            try:
                ready.put((item, error), timeout=0.05)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            with closing(items):
                for item in items:
                    offer(item)
                    if stopped.is_set():
                        return
            offer(None)
        except BaseException as error:
            offer(None, error)

    thread = threading.Thread(target=work, name=_THREAD, daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
