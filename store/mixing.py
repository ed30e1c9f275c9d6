"""How mixed a stream's batches are: distinct blocks in a batch, against an i.i.d. draw of it.

Rows of one block resemble each other, so a batch from few blocks is a small sample. A batch's rows
of one shard are drawn without replacement from all of the shard's, because rows are shuffled inside
shards; so the plan alone tells how many blocks to expect. It takes the blocks of a shard to be
equally long: where documents are padded, both sides of the ratio are a little high.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from store.shuffle import plan_batches

WANTED = 0.9  # steady mixedness that the default window has
_SAMPLED_BATCHES = 32


class Mixedness(NamedTuple):
    """Expected distinct blocks in a batch, divided by those of an i.i.d. draw from the store."""

    start: float  # of the first batch, from two shards
    steady: float  # from the second epoch on, and in the first once every lane has started
    unshuffled: float  # of a reader that takes the rows in position order, block by block
    window: int  # interleaved shards


def measure_mixedness(
    rows_per_shard: Sequence[int],
    blocks_per_shard: Sequence[int],
    *,
    batch_size: int,
    window: int,
    seed: int,
) -> Mixedness:
    """Mixedness of the planned batches; of the steady ones, the mean over the first of an epoch."""
    sizes = list(zip(rows_per_shard, blocks_per_shard, strict=True))
    n_rows, n_blocks = sum(rows_per_shard), sum(blocks_per_shard)
    ideal = sum(
        blocks * (1 - (1 - rows / max(blocks, 1) / n_rows) ** batch_size) for rows, blocks in sizes
    )

    def measure(first_batch: int, n_batches: int) -> float:
        batches = plan_batches(
            rows_per_shard, batch_size=batch_size, window=window, seed=seed, first_batch=first_batch
        )
        found = 0.0
        for batch in itertools.islice(batches, n_batches):
            drawn: dict[int, int] = {}
            for piece in batch:
                drawn[piece.shard] = drawn.get(piece.shard, 0) + piece.stop - piece.start
            found += expect_blocks(drawn, sizes)
        return found / n_batches / ideal

    second_epoch = -(-n_rows // batch_size)
    in_order = min(1 + (batch_size - 1) * n_blocks / n_rows, n_blocks)
    return Mixedness(
        start=measure(0, 1),
        steady=measure(second_epoch, _SAMPLED_BATCHES),
        unshuffled=in_order / ideal,
        window=min(window, len(rows_per_shard)),
    )


def plan_window(
    rows_per_shard: Sequence[int],
    blocks_per_shard: Sequence[int],
    *,
    batch_size: int,
    seed: int,
) -> int:
    """The smallest window whose steady mixedness is WANTED; all shards where none is."""
    for window in range(min(2, len(rows_per_shard)), len(rows_per_shard)):
        found = measure_mixedness(
            rows_per_shard, blocks_per_shard, batch_size=batch_size, window=window, seed=seed
        )
        if found.steady >= WANTED:
            return window
    return len(rows_per_shard)


def expect_blocks(drawn: Mapping[int, int], sizes: Sequence[tuple[int, int]]) -> float:
    """Distinct blocks to expect among `drawn` rows of each shard; `sizes` are (rows, blocks).

    blocks * (1 - C(rows - L, drawn) / C(rows, drawn)),  L = rows / blocks

    the chance that a block of L rows is among a draw without replacement (hypergeometric).
    """
    expected = 0.0
    for shard, n_drawn in drawn.items():
        rows, blocks = sizes[shard]
        others = rows - rows / blocks
        missed = 0.0
        if n_drawn <= others:
            missed = math.exp(
                math.lgamma(others + 1)
                - math.lgamma(others - n_drawn + 1)
                - math.lgamma(rows + 1)
                + math.lgamma(rows - n_drawn + 1)
            )
        expected += blocks * (1 - missed)
    return expected
