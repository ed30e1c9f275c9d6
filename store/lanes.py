"""The shards that a stream's lanes read: columns whole, activations and gradients by the chunk."""

import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from store.manifest import locate_scales
from store.numbers import NumberFormat, Stored, decode_numbers, view_numbers
from store.reader import COLUMNS, ActivationStore
from store.shardfile import CHECKSUM_BYTES
from store.stream_plan import StreamPlan

# Torch wakes its other threads for more, which takes longer than the work (54 us against 8 for
# float16 [87, 768]) and leaves them spinning on the cores that training needs.
ONE_THREAD_NUMBERS = 2**15 - 1
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

    def __init__(self, store: ActivationStore, path: str) -> None:
        self._store = store
        self._path = path
        self._lanes: dict[int, _OpenArray] = {}
        shard_format = store.spec.shard_format(store.arrays[path])
        self._memory = ReusedMemory((shard_format.chunk_bytes + CHECKSUM_BYTES,), np.uint8)

    def list_parts(self, runs: Sequence[Run]) -> list[Stored]:
        """The runs' numbers as they are on disk, one run after the other, in the lanes' memory."""
        return [self._hold(lane, shard, chunk).take(rows) for lane, shard, chunk, rows, _ in runs]

    def close(self) -> None:
        for lane in list(self._lanes):
            self._close(lane)

    def _hold(self, lane: int, shard: int, chunk: int) -> Stored:
        opened = self._lanes.get(lane)
        if opened is None or opened.shard != shard:
            self._close(lane)  # before the next takes its room
            opened = self._lanes[lane] = _OpenArray(self._store, self._path, shard, self._memory)
        return opened.hold(chunk)

    def _close(self, lane: int) -> None:
        if lane in self._lanes:
            self._lanes.pop(lane).close()


class _OpenArray:
    """Acts or grads of one shard, as they are on disk."""

    def __init__(
        self, store: ActivationStore, path: str, shard: int, memory: "ReusedMemory"
    ) -> None:
        self.shard = shard
        self._memory = memory
        self._rows_per_chunk = store.manifest.rows_per_chunk
        self._row_scale = self._channel_scale = None
        if store.arrays[path].numbers.scaled:
            rows, channels = locate_scales(path)
            slots = range(store.shards[shard].n_rows)
            self._row_scale = store.read_stored(shard, rows, slots).numbers
            self._channel_scale = store.read_stored(shard, channels, range(1)).numbers[0]
        self._file = ExitStack()
        self._read = self._file.enter_context(store.open_array(shard, path))
        self._chunk = -1
        self._held: Stored | None = None

    def hold(self, chunk: int) -> Stored:
        if self._held is None or chunk != self._chunk:
            self._held = None  # before the next takes its room
            with ExitStack() as on_error:  # the file's place is told of damage, and closes it
                on_error.push(self._file)
                numbers = self._read(chunk, self._memory.take())
                on_error.pop_all()
            first = chunk * self._rows_per_chunk
            here = slice(first, first + self._rows_per_chunk)
            scale = None if self._row_scale is None else self._row_scale[here]
            self._held, self._chunk = Stored(numbers, scale, self._channel_scale), chunk
        return self._held

    def close(self) -> None:
        self._file.close()


class ArrayDecoder:
    """Puts the parts of a batch's acts or grads together, as float32."""

    def __init__(self, numbers: NumberFormat, width: int, batch_rows: int) -> None:
        self._numbers = numbers
        self._memory = ReusedMemory((batch_rows, width), np.float32)
        self._split = max(1, ONE_THREAD_NUMBERS // width)

    def decode(self, parts: Sequence[Stored]) -> Tensor:
        """Float32 [rows, width], the parts one after the other. Its memory is used again once
        nobody holds it or a view of it.
        """
        out = torch.from_numpy(self._memory.take())
        first = 0
        for part in parts:
            last = first + len(part.numbers)
            if self._numbers.scaled:
                decode_numbers(part, self._numbers, out[first:last])
            else:  # as decode_numbers would, in pieces
                values = view_numbers(part.numbers, self._numbers).split(self._split)
                for piece, value in zip(out[first:last].split(self._split), values, strict=True):
                    piece.copy_(value)
            first = last
        return out


class ReusedMemory:
    """Arrays of one shape, each used again once nobody holds it, a view, or a tensor of either.

    Fresh memory instead would cost a page fault for every 4 KiB of every chunk and batch. A view
    holds its array, and a tensor made by torch.from_numpy does for as long as its storage lives.
    """

    def __init__(self, shape: tuple[int, ...], dtype: type) -> None:
        self._shape, self._dtype = shape, dtype
        self._arrays: list[np.ndarray] = []

    def take(self) -> np.ndarray:
        """An array that nobody else holds, with whatever was in it."""
        for i in range(len(self._arrays)):
            if _count_holders(self._arrays, i) == _NOBODY:
                return self._arrays[i]
        self._arrays.append(np.empty(self._shape, self._dtype))
        return self._arrays[-1]


def _count_holders(arrays: list[np.ndarray], i: int) -> int:
    return sys.getrefcount(arrays[i])


_NOBODY = _count_holders([np.empty(0)], 0)  # what the list and the call itself count, here
