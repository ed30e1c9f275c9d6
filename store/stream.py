"""A plan's batches as torch tensors, read ahead on background threads."""

import atexit
import itertools
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits
from torch import Tensor

from store.errors import StoreError
from store.lanes import Batches, read_array, read_columns
from store.reader import ActivationStore, list_files
from store.shuffle import plan_batches, slice_rank
from store.stream_plan import PREFETCHED_BATCHES, StreamPlan

SHARDS_AHEAD = 2  # that a remote is asked for at first, before they are opened; later a window's
_THREAD = "store-prefetch"
_CLOSE_TIMEOUT_S = 1.0


class Batch(NamedTuple):
    """Rows for one training step, from many blocks."""

    acts: Float[Tensor, "batch d_model"]  # exactly the stored values
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
    as_stored: bool = False,
) -> Iterator[Batch]:
    """The plan's batches from `first_batch` on, or one rank's rows of each of them.

    Acts and grads are float32; `as_stored` leaves those that are float16 or bfloat16 on disk as
    they are, which is half the memory, and half of what goes to a GPU, to be converted there.
    Rank r of w gets rows r * batch_size // w to (r + 1) * batch_size // w, and reads those only;
    the ranks' parts one after another are what one reader would get. The memory of a batch's acts
    or grads is used again once nobody holds the tensor or a view of it.
    Raises StoreError at once if the plan has no `first_batch`; while streaming, ShardCorrupt or
    ShardMissing.
    """
    assert 0 <= rank < world_size <= plan.batch_size
    if not 0 <= first_batch <= plan.n_batches:
        raise StoreError(
            f"stream of {store.where}: expected a first batch in 0..{plan.n_batches}, "
            f"got {first_batch}. Ask for more tokens, or start anew."
        )

    def plan_pieces() -> Batches:
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

    announcer = _Announcer(store, plan, plan_pieces())
    n_rows = len(slice_rank(plan.batch_size, rank, world_size))
    columns = read_columns(store, plan, plan_pieces(), announcer.follow())
    acts, grads = (
        read_array(
            *(store, plan, f"{plan.hook}/{name}", plan_pieces(), n_rows, announcer.follow()),
            as_stored=as_stored,
        )
        for name in ("acts", "grads")
    )
    return _join(columns, acts, grads, announcer)


def _join(
    columns: Generator[list[np.ndarray], None, None],
    acts: Generator[Tensor, None, None],
    grads: Generator[Tensor, None, None],
    announcer: "_Announcer",
) -> Generator[Batch, None, None]:
    try:
        with closing(read_ahead(columns, acts, grads)) as parts:
            for row_columns, batch_acts, batch_grads in parts:
                yield Batch(batch_acts, batch_grads, *map(torch.from_numpy, row_columns))
    finally:
        announcer.stop()


class _Announcer:
    """Asks a remote for shards' files ahead of need, once for all readers of a stream.

    Lanes change their shards at about the same time, so a window's shards are asked for ahead.
    """

    def __init__(self, store: ActivationStore, plan: StreamPlan, batches: Batches) -> None:
        self._files = store.files
        self._coming = _announce_shards(store, plan, batches)
        self._window = plan.window
        self._n_announced = 0
        self._lock = threading.Lock()

    def follow(self) -> Callable[[], None]:
        """What one reader is to call before it opens its next shard."""
        count = itertools.count()

        def on_open() -> None:
            n_opened = next(count)
            wanted = n_opened + max(SHARDS_AHEAD, min(n_opened, self._window))
            with self._lock:
                more = itertools.islice(self._coming, max(wanted - self._n_announced, 0))
                self._n_announced += sum(1 for _ in more)

        return on_open

    def stop(self) -> None:
        """Ask for no more, also where a reader that hangs goes on later."""
        with self._lock:
            self._coming = iter(())
        self._files.cancel_prefetch()


def _announce_shards(store: ActivationStore, plan: StreamPlan, batches: Batches) -> Iterator[None]:
    """Ask for the files of one more shard at each step, in the order in which lanes open them."""
    if store.files.room_bytes is None:
        return  # all files are here
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


def read_ahead(
    *sources: Generator[Any, None, None], n_ahead: int = PREFETCHED_BATCHES
) -> Generator[list[Any], None, None]:
    """One item of every source at a time, each source read ahead on a thread of its own.

    The sources have equally many items, none of them None. Their threads end when the generator
    does, or the program. Unless a read of a remote hangs: then its thread ends when that does.
    """
    stopped = threading.Event()
    # One more is under way. A thread sleeps until it is asked: on cores that training needs, one
    # that looks whether there is room again interrupts it every time.
    asked = [threading.Semaphore(n_ahead + 1) for _ in sources]
    ready = [queue.SimpleQueue() for _ in sources]
    threads = [
        threading.Thread(target=_fill, args=(*each, stopped), name=_THREAD, daemon=True)
        for each in zip(sources, asked, ready, strict=True)
    ]

    def ask() -> None:
        for each in asked:
            each.release()

    def stop() -> None:
        stopped.set()
        ask()
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        for thread in threads:
            if thread.is_alive():
                thread.join(max(deadline - time.monotonic(), 0))

    atexit.register(stop)  # a thread that runs on would abort the interpreter's exit
    try:
        for thread in threads:
            thread.start()
        while True:
            items = [_take(each) for each in ready]
            if items[0] is None:
                assert not any(item is not None for item in items)
                return
            ask()
            yield items
    finally:
        atexit.unregister(stop)
        stop()


def _fill(
    source: Generator[Any, None, None],
    asked: threading.Semaphore,
    ready: queue.SimpleQueue,
    stopped: threading.Event,
) -> None:
    """Put (item, None) for each item asked for, then (None, None), or the (None, error) instead."""
    try:
        # Or torch would set this thread's number at its first use. More would spin on the cores
        # that training needs, and take longer: 54 us against 8 for float16 [87, 768].
        torch.get_num_threads()
        with threadpool_limits(1, user_api="openmp"), closing(source):
            while asked.acquire() and not stopped.is_set():
                item = next(source, None)
                ready.put((item, None))
                if item is None:
                    return
                del item  # or its memory could not be used again
    except BaseException as error:
        ready.put((None, error))


def _take(ready: queue.SimpleQueue) -> Any:
    item, error = ready.get()
    if error is not None:
        raise error
    return item
