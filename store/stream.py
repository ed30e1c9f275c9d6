"""A plan's batches as torch tensors, read ahead on background threads."""

import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from typing import NamedTuple, TypeVar

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
    The memory of a batch is used again once nobody holds one of its tensors or a view of it.
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
        read_array(store, plan, f"{plan.hook}/{name}", plan_pieces(), n_rows, announcer.follow())
        for name in ("acts", "grads")
    )
    return _join(store, read_ahead(columns), read_ahead(acts), read_ahead(grads))


def _join(
    store: ActivationStore,
    columns: Generator[list[np.ndarray], None, None],
    acts: Generator[Tensor, None, None],
    grads: Generator[Tensor, None, None],
) -> Generator[Batch, None, None]:
    with ExitStack() as at_end:
        at_end.callback(store.files.cancel_prefetch)
        for part in (columns, acts, grads):
            at_end.enter_context(closing(part))
        for row_columns, batch_acts, batch_grads in zip(columns, acts, grads, strict=True):
            yield Batch(batch_acts, batch_grads, *map(torch.from_numpy, row_columns))


class _Announcer:
    """Asks a remote for shards' files ahead of need, once for all readers of a stream.

    Lanes change their shards at about the same time, so a window's shards are asked for ahead.
    """

    def __init__(self, store: ActivationStore, plan: StreamPlan, batches: Batches) -> None:
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
    items: Generator[T, None, None], n_ahead: int = PREFETCHED_BATCHES
) -> Generator[T, None, None]:
    """The same items, computed ahead on a thread that ends when the generator does.

    Unless a read of a remote hangs: then the thread ends when that does, or with the program.
    """
    ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(n_ahead)
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
            # Or torch would set this thread's number at its first use. More would spin on the cores
            # that training needs, and take longer: 54 us against 8 for float16 [87, 768].
            torch.get_num_threads()
            with threadpool_limits(1, user_api="openmp"), closing(items):
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
        thread.join(_CLOSE_TIMEOUT_S)
