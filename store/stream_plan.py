"""What a stream will read, decided by arithmetic before anything is read.

docs/stream.md explains the order, how mixed it is, and how much memory it takes.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from store.errors import StoreError
from store.mixing import Mixedness, measure_mixedness, plan_window
from store.reader import COLUMNS, ActivationStore, list_files
from store.shuffle import size_slices

PREFETCHED_BATCHES = 2
BATCHES_ALIVE = PREFETCHED_BATCHES + 3  # one just filled, one handed over, one with the consumer
# Per row of an open shard: acts and grads each have the slots of kept rows, and cuts between runs,
# which take 40 bytes for MIN_RUN_ROWS rows.
_COLUMN_BYTES = 4 * len(COLUMNS) + 2 * (4 + 3)
_OPENING_BYTES = 250  # per row of the shard that all three threads open, copies included
_LIBRARIES_BYTES = 2**23  # codecs, threads' stacks and heaps
_ORDER_VERSION = 1  # of the rule in store/shuffle.py


class StreamPlan(NamedTuple):
    """All that is decided before the first batch is read."""

    hook: str
    batch_size: int  # rows of a batch of all ranks together
    n_batches: int
    epochs: int
    seed: int
    window: int  # shards interleaved at once
    slice_rows: int  # rows read from one shard before it is the next one's turn
    rows_per_shard: tuple[int, ...]  # of each of `shards`, without excluded positions
    exclude_positions: tuple[int, ...]
    shards: tuple[int, ...]  # those that are present
    order: str  # names the order of the batches, however many; for checkpoints

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""
        return sum(self.rows_per_shard)


class StreamState(NamedTuple):
    """Where a stream is: all that a checkpoint has to keep of it."""

    order: str  # the plan's
    batch: int  # batches consumed, by all ranks together


def plan_stream(
    store: ActivationStore,
    *,
    hook: str | None,
    batch_size: int,
    epochs: int,
    seed: int,
    window: int | None,
    exclude_positions: Sequence[int] = (),
    tokens: int | None = None,
) -> StreamPlan:
    """Plan shuffled batches of exactly `batch_size` rows, `window` shards interleaved.

    They go on for `epochs` epochs of the present shards, or until `tokens` rows. Rows at
    `exclude_positions` are left out. Batches run on from one epoch into the next; a last partial
    one is dropped. Without a window, the smallest that mixes WANTED of an i.i.d. draw. The order is
    a pure function of the store, seed and settings. Raises StoreError for an unknown hook or
    position, or if the epochs have fewer rows than `tokens` or than one batch.
    """
    assert batch_size > 0
    assert window is None or window > 0
    hook = store.pick_hook(hook)
    excluded = tuple(sorted(set(exclude_positions)))
    rows_per_shard = _count_shards(store, excluded)
    n_rows = sum(rows_per_shard) * epochs
    wanted = n_rows if tokens is None else tokens
    if wanted < batch_size:
        raise StoreError(
            f"rows to read at {store.where}: expected at least a batch of {batch_size}, got "
            f"{wanted}. Ask for more tokens or a smaller batch."
        )
    if wanted > n_rows:
        raise StoreError(
            f"rows at {store.where}: expected {wanted} or more in {epochs} epochs, got {n_rows}. "
            "Ask for fewer tokens, or raise train.epochs."
        )
    if window is None:
        window = plan_window(rows_per_shard, _count_blocks(store), batch_size=batch_size, seed=seed)
    window = min(window, len(store.present))
    _check_room(store, hook, window)
    decisive = (
        *(_ORDER_VERSION, store.manifest.checksum, hook, batch_size, seed, window),
        *(store.present, rows_per_shard, excluded),
    )
    return StreamPlan(
        hook=hook,
        batch_size=batch_size,
        n_batches=wanted // batch_size,
        epochs=epochs,
        seed=seed,
        window=window,
        slice_rows=size_slices(batch_size, window),
        rows_per_shard=rows_per_shard,
        exclude_positions=excluded,
        shards=store.present,
        order=hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:16],
    )


def _check_room(store: ActivationStore, hook: str, window: int) -> None:
    """Raise StoreError if a remote's cache cannot hold the shards that are read at once."""
    room = store.files.room_bytes
    if room is None:
        return
    shards = [0] * len(store.shards)
    for file in list_files(store, hook):
        shards[file.shard] += file.record.bytes
    needed = window * max(shards)
    if needed > room:
        raise StoreError(
            f"shard cache for {store.where}: expected room for {window} shards at once, {needed:,} "
            f"bytes, got {room:,}. Raise run.shard_cache_gb or lower train.window_shards."
        )


def resume_batch(plan: StreamPlan, state: StreamState) -> int:
    """The `first_batch` that goes on where a checkpoint stopped.

    Raises StoreError unless the checkpoint's order is the plan's, to which it must mean the same.
    """
    if state.order != plan.order:
        raise StoreError(
            f"order of the batches at batch {state.batch}: expected {state.order} as in the "
            f"checkpoint, got {plan.order}. Resume with the store, hook, shards, batch size, seed, "
            "window and excluded positions that it was made with, or start anew."
        )
    return state.batch


def find_mixedness(store: ActivationStore, plan: StreamPlan) -> Mixedness:
    """How mixed the plan's batches are."""
    return measure_mixedness(
        plan.rows_per_shard,
        _count_blocks(store),
        batch_size=plan.batch_size,
        window=plan.window,
        seed=plan.seed,
    )


def stream_memory_bytes(store: ActivationStore, plan: StreamPlan) -> int:
    """At most so many bytes does a stream hold, the batch in the consumer's hands included.

    It grows with the window, the rows of a shard and the batch, and not with the store.
    """
    layout = store.spec.layout
    formats = [store.spec.arrays()[f"{plan.hook}/{name}"] for name in ("acts", "grads")]
    chunk_bytes = sum(store.spec.shard_format(array).chunk_bytes for array in formats)
    scale_bytes = 4 * sum(array.numbers.scaled for array in formats)  # per row of an open shard
    # A lane may hold a chunk while the last is in the batch that is being put together.
    # One more is as it was before it is decompressed.
    n_chunks = 2 * plan.window + -(-plan.batch_size // layout.rows_per_chunk) + 2
    batch_bytes = plan.batch_size * (2 * 4 * store.d_model + 4 * len(COLUMNS))
    return (
        n_chunks * chunk_bytes
        + plan.window * layout.rows_per_shard * (_COLUMN_BYTES + scale_bytes)
        + layout.rows_per_shard * _OPENING_BYTES
        + BATCHES_ALIVE * batch_bytes
        + _LIBRARIES_BYTES
    )


def count_rows(store: ActivationStore, exclude_positions: Sequence[int] = ()) -> int:
    """Rows of one epoch of the present shards. Raises StoreError for positions no block has."""
    return sum(_count_shards(store, tuple(sorted(set(exclude_positions)))))


def _count_shards(store: ActivationStore, excluded: tuple[int, ...]) -> tuple[int, ...]:
    """Rows to keep of each present shard.

    Arithmetic where every block is whole, and where position 0 alone is excluded, which every block
    has; else the shard's positions are read.
    """
    context_length = store.manifest.context_length
    if excluded and (excluded[0] < 0 or excluded[-1] >= context_length):
        raise StoreError(
            f"exclude_positions at {store.where}: expected 0..{context_length - 1}, got "
            f"{list(excluded)}. Change train.exclude_positions."
        )
    counts = []
    for shard in (store.shards[index] for index in store.present):
        if excluded in ((), (0,)) or shard.n_rows == shard.n_blocks * context_length:
            counts.append(shard.n_rows - shard.n_blocks * len(excluded))
        else:
            position = store.read_column(shard.index, "position").numpy()
            counts.append(int(np.isin(position, excluded, invert=True).sum()))
    return tuple(counts)


def _count_blocks(store: ActivationStore) -> list[int]:
    return [store.shards[shard].n_blocks for shard in store.present]
