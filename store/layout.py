"""Which row goes where: pure arithmetic over integers.

A *block* is `context_length` positions of text; its real rows are its first `length` positions. A
*shard* is a fixed range of blocks. Its rows, counted block by block and position by position
("block-major"), are stored in a shuffled order in the first `n_rows` of the shard's slots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class ShardSpec:
    """One shard: the unit of work, of retry, of verification and of sharing."""

    index: int
    first_block: int
    n_blocks: int
    n_rows: int  # real rows, the sum of its blocks' lengths


class StoreLayout(NamedTuple):
    """How blocks, rows, chunks and shards of a store lie."""

    rows_per_chunk: int  # slots of one inner chunk, a multiple of the context length
    rows_per_shard: int  # slots of one shard, a multiple of rows_per_chunk
    blocks_per_shard: int
    shards: tuple[ShardSpec, ...]
    n_slots: int  # length of every array: n_blocks * context_length
    n_rows: int  # real rows, n_slots less the padding of short blocks

    @property
    def n_blocks(self) -> int:
        return self.shards[-1].first_block + self.shards[-1].n_blocks

    @property
    def chunks_per_shard(self) -> int:
        return self.rows_per_shard // self.rows_per_chunk


def plan_shards(
    lengths: np.ndarray,
    *,
    context_length: int,
    bytes_per_row: int,
    shard_bytes: int,
    min_shards: int = 8,
    chunk_bytes: int = 2**20,
) -> StoreLayout:
    """Cut blocks with `lengths` real rows each into shards of equal numbers of blocks.

    A shard has as many blocks as fit `shard_bytes` at `bytes_per_row` (of one array, the
    activations), fewer where that would give less than `min_shards` shards. A chunk has between
    half of and all the blocks that fit `chunk_bytes`, the number that leaves the largest shard. One
    block is the least of either. Raises ValueError for no blocks or lengths outside
    1..context_length.
    """
    n_blocks = len(lengths)
    if n_blocks == 0 or lengths.min() < 1 or lengths.max() > context_length:
        raise ValueError(f"blocks: expected at least one, with lengths in 1..{context_length}")
    block_bytes = context_length * bytes_per_row
    most = max(1, min(shard_bytes // block_bytes, n_blocks // min_shards))
    largest = max(1, min(chunk_bytes // block_bytes, most))
    blocks_per_chunk = max(range((largest + 1) // 2, largest + 1), key=lambda n: (most // n * n, n))
    blocks_per_shard = most // blocks_per_chunk * blocks_per_chunk
    shards = tuple(
        ShardSpec(
            index=index,
            first_block=first,
            n_blocks=min(blocks_per_shard, n_blocks - first),
            n_rows=int(lengths[first : first + blocks_per_shard].sum()),
        )
        for index, first in enumerate(range(0, n_blocks, blocks_per_shard))
    )
    return StoreLayout(
        rows_per_chunk=blocks_per_chunk * context_length,
        rows_per_shard=blocks_per_shard * context_length,
        blocks_per_shard=blocks_per_shard,
        shards=shards,
        n_slots=n_blocks * context_length,
        n_rows=sum(shard.n_rows for shard in shards),
    )


def check_layout(layout: StoreLayout, context_length: int) -> None:
    """Raise ValueError unless the layout's numbers agree, as those of plan_shards do."""
    rows_per_chunk, rows_per_shard, blocks_per_shard, shards, n_slots, n_rows = layout
    if not shards or min(rows_per_chunk, rows_per_shard, context_length) < 1:
        raise ValueError("layout: expected at least one shard of at least one row")
    if rows_per_chunk % context_length or rows_per_shard % rows_per_chunk:
        raise ValueError(
            f"layout: expected rows_per_shard {rows_per_shard} to be a multiple of rows_per_chunk "
            f"{rows_per_chunk}, "
            f"and that of context_length {context_length}"
        )
    for index, shard in enumerate(shards):
        last = index == len(shards) - 1
        if (
            shard.index != index
            or shard.first_block != index * blocks_per_shard
            or not (1 <= shard.n_blocks <= blocks_per_shard)
            or not (last or shard.n_blocks == blocks_per_shard)
            or not (shard.n_blocks <= shard.n_rows <= shard.n_blocks * context_length)
        ):
            raise ValueError(
                f"layout: shard {index} of {blocks_per_shard} blocks per shard is impossible: "
                f"{shard}"
            )
    expected = (
        blocks_per_shard * context_length,
        layout.n_blocks * context_length,
        sum(shard.n_rows for shard in shards),
    )
    if expected != (rows_per_shard, n_slots, n_rows):
        raise ValueError(
            f"layout: expected rows_per_shard, n_slots, n_rows {expected}, got "
            f"{(rows_per_shard, n_slots, n_rows)}"
        )


def permute_rows(seed: int, shard_index: int, n_rows: int) -> np.ndarray:
    """The order of a shard's rows: slot j holds block-major row perm[j]. int64 [n_rows].

    perm = stable argsort of draw_keys((seed, shard_index), n_rows), ascending as unsigned integers.
    docs/format.md states the rule for other languages.
    """
    return np.argsort(draw_keys((seed, shard_index), n_rows), kind="stable")


def draw_keys(words: Sequence[int], n: int) -> np.ndarray:
    """n pseudo-random uint64, a pure function of the words.

    state = 0;  for each word: state = mix(state XOR word);  key_j = mix(state + j * gamma)

    modulo 2**64, where mix and gamma are splitmix64's (Steele, Lea & Flood 2014, section 4).
    """
    state = np.zeros(1, np.uint64)
    for word in words:
        state = _mix(state ^ np.uint64(word % 2**64))
    return _mix(state + np.arange(n, dtype=np.uint64) * _GAMMA)


def _mix(state: np.ndarray) -> np.ndarray:
    """One step of splitmix64. For arrays, whose arithmetic wraps without warnings."""
    state = state + _GAMMA
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
