"""Whole blocks in position order, for end-to-end training and for browsing."""

import itertools
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from store.errors import StoreError
from store.layout import draw_keys, permute_rows
from store.numbers import decode_numbers
from store.reader import ActivationStore
from store.stream import read_ahead

_SHARDS, _BLOCKS = 2, 3  # what a drawn number is for; 0 and 1 are the shuffled rows'


class BlockBatch(NamedTuple):
    """Whole blocks; after a block's `length` positions, everything is zero."""

    acts: Float[Tensor, "blocks context d_model"]  # float32, exactly the stored values
    grads: Float[Tensor, "blocks context d_model"]  # of the summed loss, nats per activation
    tokens: Int[Tensor, "blocks context"]  # the token at the position
    loss: Float[Tensor, "blocks context"]  # nats, of predicting the next token
    block: Int[Tensor, " blocks"]  # counted over the corpus split
    lengths: Int[Tensor, " blocks"]  # positions that the block has


class BlockSlice(NamedTuple):
    """Some of a shard's blocks, read next."""

    shard: int  # counted over the shards that were planned
    blocks: tuple[int, ...]  # counted from the shard's first


def stream_blocks(
    store: ActivationStore,
    *,
    hook: str | None,
    batch_blocks: int,
    epochs: int,
    seed: int | None,
    first_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[BlockBatch]:
    """Every block of the present shards once in an epoch, in batches of `batch_blocks`.

    The order of the shards, and of the blocks inside each, is drawn from the seed; without one both
    are as in the corpus. Batches run on from one epoch into the next, and the very last may be
    smaller. First batch, rank and world size are as in stream_batches. Holds the activations and
    gradients of one shard, as they are on disk: a block's rows are all over its shard. Raises
    StoreError at once for an unknown hook or a first batch that there is not; while streaming,
    ShardCorrupt or ShardMissing.
    """
    assert 0 <= rank < world_size <= batch_blocks
    hook = store.pick_hook(hook)
    counts = [store.shards[shard].n_blocks for shard in store.present]
    n_batches = -(-sum(counts) * epochs // batch_blocks)
    if not 0 <= first_batch <= n_batches:
        raise StoreError(
            f"blocks of {store.where}: expected a first batch in 0..{n_batches}, got {first_batch}."
            " Ask for more epochs, or start anew."
        )
    batches = plan_block_batches(
        counts,
        batch_blocks=batch_blocks,
        epochs=epochs,
        seed=seed,
        first_batch=first_batch,
        rank=rank,
        world_size=world_size,
    )
    return (batch for (batch,) in read_ahead(_read_batches(store, hook, batches)))


def plan_block_batches(
    blocks_per_shard: Sequence[int],
    *,
    batch_blocks: int,
    epochs: int,
    seed: int | None,
    first_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[list[BlockSlice]]:
    """What each batch is made of, or one rank's part of it; pure arithmetic."""
    n_blocks = sum(blocks_per_shard)
    for start in range(first_batch * batch_blocks, n_blocks * epochs, batch_blocks):
        size = min(batch_blocks, n_blocks * epochs - start)
        own = range(start + rank * size // world_size, start + (rank + 1) * size // world_size)
        batch = []
        for epoch in range(own.start // n_blocks, -(-own.stop // n_blocks)):
            done = epoch * n_blocks
            for shard in draw_order(len(blocks_per_shard), seed, (epoch, _SHARDS)):
                count = blocks_per_shard[shard]
                inside = slice(max(own.start - done, 0), min(max(own.stop - done, 0), count))
                if inside.start < inside.stop:
                    order = draw_order(count, seed, (epoch, _BLOCKS, shard))
                    batch.append(BlockSlice(shard, tuple(order[inside])))
                done += count
        yield batch


def draw_order(n: int, seed: int | None, words: Sequence[int]) -> list[int]:
    """0 .. n - 1 in a drawn order, or as they are without a seed."""
    if seed is None:
        return list(range(n))
    return draw_keys((seed, *words), n).argsort(kind="stable").tolist()


def _read_batches(
    store: ActivationStore, hook: str, batches: Iterator[list[BlockSlice]]
) -> Generator[BlockBatch, None, None]:
    opened: _WholeShard | None = None
    for slices in batches:
        n_blocks = sum(len(piece.blocks) for piece in slices)
        batch = _allocate(n_blocks, store.manifest.context_length, store.d_model)
        rows = iter(range(n_blocks))
        for index, blocks in slices:
            shard = store.present[index]
            if opened is None or opened.shard != shard:
                opened = None  # before the next takes its room
                opened = _WholeShard(store, hook, shard)
            for block, row in zip(blocks, itertools.islice(rows, len(blocks)), strict=True):
                opened.fill_block(block, batch, row)
        yield batch


def _allocate(n_blocks: int, context_length: int, d_model: int) -> BlockBatch:
    shape = (n_blocks, context_length)
    return BlockBatch(
        acts=torch.zeros(*shape, d_model),
        grads=torch.zeros(*shape, d_model),
        tokens=torch.zeros(shape, dtype=torch.int32),
        loss=torch.zeros(shape),
        block=torch.zeros(n_blocks, dtype=torch.int32),
        lengths=torch.zeros(n_blocks, dtype=torch.int32),
    )


class _WholeShard:
    """A shard in memory: its columns, and activations and gradients as they are on disk."""

    def __init__(self, store: ActivationStore, hook: str, shard: int) -> None:
        spec = store.shards[shard]
        self.shard = shard
        self._first_block = spec.first_block
        order = permute_rows(store.spec.seed, shard, spec.n_rows)
        self._slots = np.argsort(order)  # of the rows block by block, position by position
        block = store.read_column(shard, "block").numpy() - spec.first_block
        self._lengths = np.bincount(block, minlength=spec.n_blocks)
        self._starts = np.cumsum(self._lengths) - self._lengths
        slots = range(spec.n_rows)
        paths = {"tokens": "tokens", "loss": "loss"}
        paths |= {name: f"{hook}/{name}" for name in ("acts", "grads")}
        self._arrays = {
            name: (store.read_stored(shard, path, slots), store.arrays[path].numbers)
            for name, path in paths.items()
        }

    def fill_block(self, block: int, batch: BlockBatch, row: int) -> None:
        """Write a block, counted from the shard's first, to one row of the batch."""
        start, length = int(self._starts[block]), int(self._lengths[block])
        slots = self._slots[start : start + length]
        for name, (stored, numbers) in self._arrays.items():
            decode_numbers(stored.take(slots), numbers, getattr(batch, name)[row, :length])
        batch.block[row] = self._first_block + block
        batch.lengths[row] = length
