"""The shards that a stream's lanes read: columns whole, activations and gradients by the chunk."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
from torch import Tensor

from store.manifest import locate_scales
from store.numbers import Stored, decode_numbers, view_numbers
from store.reader import COLUMNS, ActivationStore
from store.shardfile import CHECKSUM_BYTES
from store.stream_plan import StreamPlan

MIN_RUN_ROWS = 16  # rows decoded one after another, on average; with fewer they are copied first


class Run(NamedTuple):
    """Rows of one chunk that a batch takes one after another."""

    lane: int
    shard: int
    chunk: int
    rows: slice | np.ndarray  # of the chunk
    n_rows: int


class OpenShard:
    """A shard that a lane reads: its columns whole, without excluded positions."""

    def __init__(self, store: ActivationStore, plan: StreamPlan, shard: int) -> None:
        self.shard = shard
        self.columns = [store.read_column(shard, name).numpy() for name in COLUMNS]
        position = self.columns[COLUMNS.index("position")]
        kept = np.isin(position, plan.exclude_positions, invert=True)
        self._slots = np.flatnonzero(kept).astype(np.int32)  # of the kept rows
        if plan.exclude_positions:
            self.columns = [column[kept] for column in self.columns]
        self._rows_per_chunk = store.manifest.rows_per_chunk
        chunk = self._slots // self._rows_per_chunk
        steps = np.diff(self._slots, prepend=-2)
        cuts = np.flatnonzero((steps > 1) | (np.diff(chunk, prepend=-1) > 0))
        if len(cuts) * MIN_RUN_ROWS > len(self._slots):  # too many holes: pick rows chunk by chunk
            cuts = np.flatnonzero(np.diff(chunk, prepend=-1) > 0)
        self._cuts = cuts  # kept rows at which a run begins

    def list_runs(self, lane: int, start: int, stop: int) -> Iterator[Run]:
        """Where kept rows start..stop are: runs without a hole, if those are not too short."""
        first, last = self._cuts.searchsorted((start + 1, stop))
        for begin, end in itertools.pairwise((start, *self._cuts[first:last].tolist(), stop)):
            chunk, row = divmod(int(self._slots[begin]), self._rows_per_chunk)
            n_rows = end - begin
            last = int(self._slots[end - 1]) - chunk * self._rows_per_chunk
            rows = slice(row, row + n_rows)
            if last - row >= n_rows:
                rows = self._slots[begin:end] - chunk * self._rows_per_chunk
            yield Run(lane, self.shard, chunk, rows, n_rows)


class ArrayReader:
    """Reads acts or grads: of each lane's shard the file is open and one chunk in hand."""

    def __init__(self, store: ActivationStore, path: str, window: int) -> None:
        self._store = store
        self._path = path
        self._lanes: dict[int, _OpenArray] = {}
        chunk_bytes = store.spec.shard_format(store.arrays[path]).chunk_bytes + CHECKSUM_BYTES
        # Each lane's chunk, aligned; in one piece, for which numpy asks for huge pages.
        self._memory = np.empty((window, -(-chunk_bytes // 64) * 64), np.uint8)

    def fill(self, out: Tensor, runs: Sequence[Run]) -> Tensor:
        """Decode the runs' rows into `out`, one run after the other."""
        first = 0
        for lane, shard, chunk, rows, n_rows in runs:
            opened = self._lanes.get(lane)
            if opened is None or opened.shard != shard:
                self._close(lane)  # before the next takes its room
                opened = _OpenArray(self._store, self._path, shard, self._memory[lane])
                self._lanes[lane] = opened
            opened.decode(chunk, rows, out.narrow(0, first, n_rows))
            first += n_rows
        return out

    def close(self) -> None:
        for lane in list(self._lanes):
            self._close(lane)

    def _close(self, lane: int) -> None:
        if lane in self._lanes:
            self._lanes.pop(lane).close()


class _OpenArray:
    """Acts or grads of one shard, as they are on disk."""

    def __init__(self, store: ActivationStore, path: str, shard: int, memory: np.ndarray) -> None:
        self.shard = shard
        self._rows_per_chunk = store.manifest.rows_per_chunk
        self._row_scale = self._channel_scale = None
        if store.arrays[path].numbers.scaled:
            rows, channels = locate_scales(path)
            slots = range(store.shards[shard].n_rows)
            self._row_scale = store.read_stored(shard, rows, slots).numbers
            self._channel_scale = store.read_stored(shard, channels, range(1)).numbers[0]
        self._file = ExitStack()
        self._read = self._file.enter_context(store.open_array(shard, path, memory))
        self._numbers = store.arrays[path].numbers
        self._chunk = -1

    def decode(self, chunk: int, rows: slice | np.ndarray, out: Tensor) -> None:
        if chunk != self._chunk:
            self._hold_chunk(chunk)
        if self._numbers.scaled or not isinstance(rows, slice):
            decode_numbers(self._held.take(rows), self._numbers, out)
        else:  # as decode_numbers would, in fewer calls
            out.copy_(self._values[rows])

    def _hold_chunk(self, chunk: int) -> None:
        self._chunk = -1  # the memory is about to change
        with ExitStack() as on_error:  # the file's place is told of damage, and closes it
            on_error.push(self._file)
            numbers = self._read(chunk)
            on_error.pop_all()
        first = chunk * self._rows_per_chunk
        here = slice(first, first + self._rows_per_chunk)
        scale = None if self._row_scale is None else self._row_scale[here]
        self._held = Stored(numbers, scale, self._channel_scale)
        self._values = view_numbers(numbers, self._numbers)
        self._chunk = chunk

    def close(self) -> None:
        self._file.close()
