"""A plan's batches as torch tensors, read ahead on background threads."""

import itertools
import queue
import sys
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from store.errors import StoreError
from store.lanes import ArrayReader, OpenShard, Run
from store.reader import ActivationStore, list_files
from store.shuffle import Slice, plan_batches
from store.stream_plan import BATCHES_ALIVE, PREFETCHED_BATCHES, StreamPlan

SHARDS_AHEAD = 2  # that a remote is asked for before they are opened
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
    """Plan one batch here, while one thread reads the last one's acts and another its grads."""
    arrays = [ArrayReader(store, f"{plan.hook}/{name}", plan.window) for name in ("acts", "grads")]
    memories = [_BatchMemory(store.d_model) for _ in arrays]
    lanes: dict[int, OpenShard] = {}
    for _ in itertools.islice(coming, SHARDS_AHEAD):
        pass
    with ExitStack() as opened_here:
        for array in arrays:
            opened_here.callback(array.close)
        threads = [
            opened_here.enter_context(ThreadPoolExecutor(1, thread_name_prefix=_THREAD))
            for _ in arrays
        ]
        reading: list[Future[Tensor]] = []
        columns: list[np.ndarray] = []
        for pieces in batches:
            runs: list[Run] = []
            parts = []
            for lane, index, start, stop in pieces:
                opened = lanes.get(lane)
                if opened is None or opened.shard != plan.shards[index]:
                    lanes.pop(lane, None)  # before the next takes its room
                    next(coming, None)
                    opened = lanes[lane] = OpenShard(store, plan, plan.shards[index])
                runs += opened.list_runs(lane, start, stop)
                parts.append([column[start:stop] for column in opened.columns])
            if reading:
                yield _gather(reading, columns)
            columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
            reading = [
                thread.submit(array.fill, memory.take(len(columns[0])), runs)
                for thread, array, memory in zip(threads, arrays, memories, strict=True)
            ]
        if reading:
            yield _gather(reading, columns)


def _gather(reading: list[Future[Tensor]], columns: list[np.ndarray]) -> Batch:
    acts, grads = (future.result() for future in reading)
    reading.clear()  # so that the consumer alone holds the tensors
    return Batch(acts, grads, *map(torch.from_numpy, columns))


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
