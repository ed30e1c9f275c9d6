"""The order in which training sees the rows: a pure function of sizes, seed and batch.

Rows are already shuffled inside each shard. An epoch deals the shards, in a drawn order, to
`window` *lanes* of about equally many rows. A lane reads its shards one after another, each slice
by slice from a drawn start (and wrapping around once): without that start, the same rows would meet
in the same batch in every epoch. Slices are read in the order of time, over which each lane spreads
its own evenly, so that all lanes end together and no epoch runs out on a few shards, whatever their
number.

    time of slice i of lane j's n_j  =  start_j + (i + 1/2) / n_j * (1 - start_j)

In epoch 0 lanes 0 and 1 start at time 0 and the others one by one, so that training can begin when
two shards have arrived; in later epochs every lane starts at 0.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from store.layout import draw_keys

MIN_SLICE_ROWS = 32  # finer interleaving than this costs more calls than it mixes
GROWTH_FRACTION = 1 / 8  # of a shard's rows are read for each lane that is added
LAST_START = 1 / 2  # a lane that starts later than this would be read in a rush
_ORDER, _START = 0, 1  # what a drawn number is for


class Slice(NamedTuple):
    """Rows start..stop of a shard, read next."""

    lane: int
    shard: int  # counted over the shards that were planned
    start: int
    stop: int


def size_slices(batch_size: int, window: int) -> int:
    """Rows of a slice: about one slice of every lane makes a batch."""
    return max(MIN_SLICE_ROWS, batch_size // window)


def slice_rank(batch_size: int, rank: int, world_size: int) -> range:
    """One rank's rows of a batch."""
    return range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


def plan_batches(
    rows_per_shard: Sequence[int],
    *,
    batch_size: int,
    window: int,
    seed: int,
    first_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[list[Slice]]:
    """What each batch is made of, from `first_batch` on, without end: epoch follows epoch.

    Rank r of w gets rows r * batch_size // w to (r + 1) * batch_size // w of every batch, so the
    ranks' parts one after another are the batch that one reader would get. Skipping to
    `first_batch` costs some two microseconds per slice of the epoch that it lies in.
    """
    assert batch_size > 0 and window > 0 and sum(rows_per_shard) > 0  # noqa: PT018
    slice_rows = size_slices(batch_size, window)
    first_epoch, skipped = divmod(first_batch * batch_size, sum(rows_per_shard))
    slices = itertools.chain.from_iterable(
        plan_epoch(
            rows_per_shard,
            slice_rows=slice_rows,
            window=window,
            seed=seed,
            epoch=epoch,
            growth_rows=_size_growth(rows_per_shard, batch_size, slice_rows),
        )
        for epoch in itertools.count(first_epoch)
    )
    own = slice_rank(batch_size, rank, world_size)
    batch: list[Slice] = []
    filled = 0
    for lane, shard, first, stop in slices:
        start = min(first + skipped, stop)
        skipped -= start - first
        while start < stop:
            taken = min(batch_size - filled, stop - start)
            from_own, to_own = max(own.start - filled, 0), min(own.stop - filled, taken)
            if from_own < to_own:
                batch.append(Slice(lane, shard, start + from_own, start + to_own))
            start += taken
            filled += taken
            if filled == batch_size:
                yield batch
                batch, filled = [], 0


def plan_epoch(
    rows_per_shard: Sequence[int],
    *,
    slice_rows: int,
    window: int,
    seed: int,
    epoch: int,
    growth_rows: int,
) -> Iterator[Slice]:
    """Every row of every shard exactly once, as slices of at most `slice_rows`.

    At most `window` shards are interleaved. In epoch 0 two are at first, and one more each time
    that about `growth_rows` rows have been read.
    """
    n_rows, n_shards = sum(rows_per_shard), len(rows_per_shard)
    width = min(window, n_shards)
    order = draw_keys((seed, epoch, _ORDER), n_shards).argsort(kind="stable").tolist()
    firsts = draw_keys((seed, epoch, _START), n_shards).tolist()
    starts = [0.0] * width
    if epoch == 0 and n_rows:
        starts = start_lanes(width, growth_rows / n_rows)
        # A small shard (the store's last may be tiny) would not last for the first batch.
        order.sort(key=lambda shard: 2 * rows_per_shard[shard] * n_shards < n_rows)
    lanes = deal_shards(order, rows_per_shard, width)

    def walk(lane: int) -> Iterator[tuple[float, Slice]]:
        n_slices = sum(-(-rows_per_shard[shard] // slice_rows) for shard in lanes[lane])
        start = starts[lane]
        slices = itertools.chain.from_iterable(
            _walk_shard(lane, shard, rows_per_shard[shard], slice_rows, firsts[shard])
            for shard in lanes[lane]
        )
        for i, piece in enumerate(slices):
            yield start + (i + 0.5) / n_slices * (1 - start), piece

    for _, piece in heapq.merge(*(walk(lane) for lane in range(width))):  # ties go by lane
        yield piece


def deal_shards(order: Sequence[int], rows_per_shard: Sequence[int], width: int) -> list[list[int]]:
    """Each lane's shards: one after another to the lane that has the fewest rows so far.

    So a store's last shard, which may be tiny, does not take a lane's whole turn.
    """
    lanes: list[list[int]] = [[] for _ in range(width)]
    loads = [(0, lane) for lane in range(width)]  # a heap, and from the start in its order
    for shard in order:
        rows, lane = loads[0]
        heapq.heapreplace(loads, (rows + rows_per_shard[shard], lane))
        lanes[lane].append(shard)
    return lanes


def start_lanes(width: int, growth: float) -> list[float]:
    """When each lane starts in epoch 0; `growth` is the fraction of the epoch per added lane.

    i lanes read i / width of the epoch in a unit of time, so that lane i follows lane i - 1 after
    growth * width / i. All come closer where the last would start later than LAST_START.
    """
    starts = [0.0] * min(width, 2)
    for i in range(2, width):
        starts.append(starts[-1] + growth * width / i)
    late = max(starts[-1] / LAST_START, 1) if starts else 1
    return [start / late for start in starts]


def _size_growth(rows_per_shard: Sequence[int], batch_size: int, slice_rows: int) -> int:
    """Rows per added lane: at least the first batch's, and a slice more of either lane."""
    rows = sum(rows_per_shard) // len(rows_per_shard)
    return max(int(rows * GROWTH_FRACTION), batch_size + 2 * slice_rows)


def _walk_shard(lane: int, shard: int, n_rows: int, slice_rows: int, drawn: int) -> Iterator[Slice]:
    """All slices of one shard from a drawn one on, wrapping around."""
    n_slices = -(-n_rows // slice_rows)
    for step in range(n_slices):
        first = (drawn + step) % n_slices * slice_rows
        yield Slice(lane, shard, first, min(first + slice_rows, n_rows))
