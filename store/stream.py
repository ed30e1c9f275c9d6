"""Shards to shuffled batches of torch tensors, prefetched on one background thread."""

import itertools
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from store.errors import StoreError
from store.reader import ActivationStore, Rows
from store.shuffle import Slice, even_window, plan_epoch

MIN_SLICE_ROWS = 32  # finer interleaving than this costs more calls than it mixes
PREFETCHED_BATCHES = 2

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
    *,
    hook: str | None = None,
    batch_size: int,
    epochs: int,
    seed: int,
    window: int,
    exclude_positions: Sequence[int] = (),
    tokens: int | None = None,
) -> Iterator[Batch]:
    """Shuffled batches of exactly `batch_size` rows, `window` shards interleaved.

    They go on for `epochs` epochs, or until `tokens` rows. Rows at `exclude_positions` are left
    out. Batches run on from one epoch into the next; a last
    partial one is dropped. The order is a pure function of the store, seed and settings. Holds one
    decoded chunk per interleaved shard in memory. Raises StoreError at once for an unknown hook, or
    if the epochs have fewer rows than `tokens` or than one batch; while streaming, ShardCorrupt or
    ShardMissing.
    """
    assert batch_size > 0
    hook = store.pick_hook(hook)
    n_rows = count_rows(store, exclude_positions) * epochs
    wanted = n_rows if tokens is None else tokens
    if not batch_size <= wanted <= n_rows:
        raise StoreError(
            f"rows at {store.where}: expected {max(wanted, batch_size)} or more in {epochs} "
            f"epochs, got {n_rows}. Ask for fewer tokens or a smaller batch, or raise train.epochs."
        )
    sizes = [shard.n_rows for shard in store.shards]
    slice_rows = max(MIN_SLICE_ROWS, batch_size // even_window(len(sizes), window))
    slices = itertools.chain.from_iterable(
        plan_epoch(sizes, slice_rows=slice_rows, window=window, seed=seed, epoch=epoch)
        for epoch in range(epochs)
    )
    pieces = _read_slices(store, hook, slices, window)
    batches = _cut_batches(_exclude(pieces, exclude_positions), batch_size)
    return _prefetch(itertools.islice(batches, wanted // batch_size))


def count_rows(store: ActivationStore, exclude_positions: Sequence[int] = ()) -> int:
    """Rows of one epoch: arithmetic, or a read of all stored positions where blocks are padded."""
    context_length = store.manifest.context_length
    excluded = sorted(set(exclude_positions))
    if excluded and (excluded[0] < 0 or excluded[-1] >= context_length):
        raise StoreError(
            f"exclude_positions at {store.where}: expected 0..{context_length - 1}, got "
            f"{excluded}. Change train.exclude_positions."
        )
    if store.n_rows == store.manifest.n_slots:
        return store.n_rows - store.manifest.n_blocks * len(excluded)
    if not excluded:
        return store.n_rows
    positions = (store.read_column(shard.index, "position") for shard in store.shards)
    return sum(int(_find_kept(position, excluded).sum()) for position in positions)


def _find_kept(position: Int[Tensor, " rows"], excluded: Sequence[int]) -> Tensor:
    return ~torch.isin(position, torch.tensor(excluded, dtype=position.dtype))


def _read_slices(
    store: ActivationStore, hook: str, slices: Iterator[Slice], window: int
) -> Iterator[Rows]:
    """The slices' rows. Keeps the last chunk of each interleaved shard, to decode it once."""
    rows_per_chunk = store.manifest.rows_per_chunk
    # By shard: a chunk's number and rows; least recently used first.
    held: OrderedDict[int, tuple[int, Rows]] = OrderedDict()
    for shard, start, stop in slices:
        for chunk in range(start // rows_per_chunk, -(-stop // rows_per_chunk)):
            first = chunk * rows_per_chunk
            held_chunk, rows = held.pop(shard, (None, None))
            if rows is None or held_chunk != chunk:
                last = min(first + rows_per_chunk, store.shards[shard].n_rows)
                rows = store.read_slots(shard, first, last, hook)
            held[shard] = (chunk, rows)
            if len(held) > window:
                held.popitem(last=False)
            yield Rows(*(column[max(start - first, 0) : stop - first] for column in rows))


def _exclude(pieces: Iterator[Rows], excluded: Sequence[int]) -> Iterator[Rows]:
    for rows in pieces:
        if not excluded:
            yield rows
            continue
        kept = _find_kept(rows.position, excluded)
        yield Rows(*(column[kept] for column in rows))


def _cut_batches(pieces: Iterator[Rows], batch_size: int) -> Iterator[Batch]:
    held: list[Rows] = []
    n_held = 0
    for piece in pieces:
        rows = piece
        while n_held + len(rows.block) >= batch_size:
            cut = batch_size - n_held
            held.append(Rows(*(column[:cut] for column in rows)))
            yield Batch(*(torch.cat(columns) for columns in zip(*held, strict=True)))
            held, n_held = [], 0
            rows = Rows(*(column[cut:] for column in rows))
        held.append(rows)
        n_held += len(rows.block)


def _prefetch(items: Iterator[T]) -> Iterator[T]:
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
            for item in items:
                offer(item)
                if stopped.is_set():
                    return
            offer(None)
        except BaseException as error:
            offer(None, error)

    thread = threading.Thread(target=work, name="store-prefetch", daemon=True)
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
