"""A plan's batches as torch tensors, read ahead on background threads."""

import itertools
import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from store.errors import StoreError
from store.lanes import ArrayDecoder, ArrayReader, OpenShard, Run
from store.numbers import Stored
from store.reader import ActivationStore, list_files
from store.shuffle import Slice, plan_batches, slice_rank
from store.stream_plan import PREFETCHED_BATCHES, PREFETCHED_PARTS, StreamPlan

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
    own = slice_rank(plan.batch_size, rank, world_size)
    parts = read_ahead(_read_parts(store, plan, plan_pieces(), coming), PREFETCHED_PARTS)
    return read_ahead(_join_parts(store, plan, len(own), parts))


def _announce_shards(
    store: ActivationStore, plan: StreamPlan, batches: Iterator[list[Slice]]
) -> Iterator[None]:
    """Ask for the files of one more shard at each step, in the order in which lanes open them.

    Lanes change their shards at about the same time, so a window's shards are asked for ahead.
    """
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


class _Parts(NamedTuple):
    """What one batch is put together from."""

    acts: list[Stored]
    grads: list[Stored]
    columns: list[np.ndarray]  # tokens, loss, block, position


def _read_parts(
    store: ActivationStore,
    plan: StreamPlan,
    batches: Iterator[list[Slice]],
    coming: Iterator[None],
) -> Generator[_Parts, None, None]:
    """Read and check what each batch needs, chunk by chunk."""
    acts, grads = (ArrayReader(store, f"{plan.hook}/{name}") for name in ("acts", "grads"))
    lanes: dict[int, OpenShard] = {}
    n_opened = n_announced = 0
    with ExitStack() as at_end:
        at_end.callback(acts.close)
        at_end.callback(grads.close)
        at_end.callback(store.files.cancel_prefetch)
        for pieces in batches:
            runs: list[Run] = []
            columns = []
            for lane, index, start, stop in pieces:
                opened = lanes.get(lane)
                if opened is None or opened.shard != plan.shards[index]:
                    lanes.pop(lane, None)  # before the next takes its room
                    wanted = n_opened + max(SHARDS_AHEAD, min(n_opened, plan.window))
                    n_announced += sum(1 for _ in itertools.islice(coming, wanted - n_announced))
                    n_opened += 1
                    opened = lanes[lane] = OpenShard(store, plan, plan.shards[index])
                runs += opened.list_runs(lane, start, stop)
                columns.append([column[start:stop] for column in opened.columns])
            joined = [np.concatenate(column) for column in zip(*columns, strict=True)]
            yield _Parts(acts.list_parts(runs), grads.list_parts(runs), joined)


def _join_parts(
    store: ActivationStore, plan: StreamPlan, n_rows: int, batches: Generator[_Parts, None, None]
) -> Generator[Batch, None, None]:
    acts, grads = (
        ArrayDecoder(store.arrays[f"{plan.hook}/{name}"].numbers, store.d_model, n_rows)
        for name in ("acts", "grads")
    )
    with closing(batches):
        for parts in batches:
            yield Batch(
                acts.decode(parts.acts),
                grads.decode(parts.grads),
                *map(torch.from_numpy, parts.columns),
            )


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
        thread.join(_CLOSE_TIMEOUT_S)
