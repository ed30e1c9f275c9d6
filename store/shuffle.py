"""The order in which training sees the rows: a pure function of sizes, seed and epoch.

Rows are already shuffled inside each shard; an epoch interleaves `window` shards, slice by slice,
each read from front to back from a drawn start (and wrapping around once). Without that start, the
same rows would meet in the same batch in every epoch.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from store.layout import draw_keys

_ORDER, _START = 0, 1  # what a drawn number is for


class Slice(NamedTuple):
    """Slots start..stop of a shard, read next."""

    shard: int
    start: int
    stop: int


def plan_epoch(
    rows_per_shard: Sequence[int], *, slice_rows: int, window: int, seed: int, epoch: int
) -> Iterator[Slice]:
    """Every row of every shard exactly once, as slices of at most `slice_rows`.

    The shards come in a drawn order, at most `window` of them interleaved in turn; a finished one
    is replaced by the next. The window is evened out: 9 shards at window 8 go as 5 and 4, not as 8
    and a lone one.
    """
    assert slice_rows > 0
    assert window > 0
    n_shards = len(rows_per_shard)
    keys = draw_keys((seed, epoch, _ORDER), n_shards)
    starts = draw_keys((seed, epoch, _START), n_shards)
    waiting = deque(
        _walk_shard(shard, rows_per_shard[shard], slice_rows, int(starts[shard]))
        for shard in keys.argsort(kind="stable").tolist()
    )
    width = even_window(n_shards, window)
    turning = deque(waiting.popleft() for _ in range(width))
    while turning:
        walk = turning.popleft()
        piece = next(walk, None)
        if piece is not None:
            turning.append(walk)
            yield piece
        elif waiting:
            turning.appendleft(waiting.popleft())


def even_window(n_shards: int, window: int) -> int:
    """The widest window up to `window` that splits the shards into groups of equal size, to one."""
    n_groups = -(-n_shards // window)
    return -(-n_shards // n_groups) if n_groups else 0


def _walk_shard(shard: int, n_rows: int, slice_rows: int, start: int) -> Iterator[Slice]:
    """All slices of one shard from a drawn one on, wrapping around."""
    n_slices = -(-n_rows // slice_rows)
    for step in range(n_slices):
        first = (start + step) % n_slices * slice_rows
        yield Slice(shard, first, min(first + slice_rows, n_rows))
