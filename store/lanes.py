"""The shards that a stream's lanes read: columns whole, activations and gradients by the chunk."""

import itertools
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from store.manifest import locate_scales
from store.numbers import view_numbers
from store.reader import COLUMNS, ActivationStore
from store.shardfile import CHECKSUM_BYTES
from store.shuffle import Slice
from store.stream_plan import StreamPlan

MIN_RUN_ROWS = 16  # rows decoded one after another, on average; with fewer they are copied first

Batches = Iterator[Sequence[Slice]]  # what each batch is made of


def read_columns(
    store: ActivationStore, plan: StreamPlan, batches: Batches, on_open: Callable[[], None]
) -> Generator[list[np.ndarray], None, None]:
    """Tokens, loss, block and position of each batch's rows; `on_open` is called for each shard."""
    lanes: dict[int, tuple[int, list[np.ndarray]]] = {}
    for pieces in batches:
        parts = []
        for lane, index, start, stop in pieces:
            if lane not in lanes or lanes[lane][0] != index:
                lanes.pop(lane, None)  # before the next takes its room
                on_open()
                shard = plan.shards[index]
                kept = find_kept(store, plan, shard)
                columns = [store.read_column(shard, name).numpy()[kept] for name in COLUMNS]
                lanes[lane] = index, columns
            parts.append([column[start:stop] for column in lanes[lane][1]])
        yield [np.concatenate(column) for column in zip(*parts, strict=True)]


def read_array(
    store: ActivationStore,
    plan: StreamPlan,
    path: str,
    batches: Batches,
    n_rows: int,
    on_open: Callable[[], None],
    *,
    as_stored: bool,
) -> Generator[Float[Tensor, "n_rows d_model"], None, None]:
    """Acts or grads of each batch's `n_rows` rows; `on_open` is called for each shard.

    As float32, or with `as_stored` in the dtype of the format. The memory of a batch is used again
    once nobody holds it or a view of it.
    """
    dtype = store.arrays[path].numbers.memory if as_stored else torch.float32
    memory = ReusedMemory(n_rows * store.d_model * dtype.itemsize)
    shard_format = store.spec.shard_format(store.arrays[path])
    chunks = ReusedMemory(shard_format.chunk_bytes + CHECKSUM_BYTES)
    lanes: dict[int, _OpenShard] = {}
    with ExitStack() as at_end:
        at_end.callback(lambda: [opened.close() for opened in lanes.values()])
        for pieces in batches:
            parts: list[Part] = []
            for lane, index, start, stop in pieces:
                if lane not in lanes or lanes[lane].index != index:
                    if lane in lanes:
                        lanes.pop(lane).close()  # before the next takes its room
                    on_open()
                    lanes[lane] = _OpenShard(store, plan, path, index, chunks)
                parts += lanes[lane].list_parts(start, stop)
            out = torch.from_numpy(memory.take()).view(dtype).view(n_rows, store.d_model)
            decode_parts(parts, out)
            del parts
            yield out


def find_kept(store: ActivationStore, plan: StreamPlan, shard: int) -> np.ndarray:
    """Where a shard's rows without excluded positions are in it: int32 [rows]."""
    if not plan.exclude_positions:
        return np.arange(store.shards[shard].n_rows, dtype=np.int32)
    position = store.read_column(shard, "position").numpy()
    kept = np.isin(position, plan.exclude_positions, invert=True)
    return np.flatnonzero(kept).astype(np.int32)


class Part(NamedTuple):
    """Rows that a batch takes one after the other, as they are on disk."""

    values: Tensor  # [rows, d_model], unscaled
    row_scale: Tensor | None  # float32 [rows, 1]
    channel_scale: Tensor | None  # float32 [d_model]


class _OpenShard:
    """Acts or grads of one shard: the file is open and one chunk in hand."""

    def __init__(
        self,
        store: ActivationStore,
        plan: StreamPlan,
        path: str,
        index: int,
        memory: "ReusedMemory",
    ) -> None:
        self.index = index
        shard = plan.shards[index]
        self._rows_per_chunk = store.manifest.rows_per_chunk
        self._numbers = store.arrays[path].numbers
        self._slots = find_kept(store, plan, shard)
        self._cuts = find_cuts(self._slots, self._rows_per_chunk)
        self._row_scale = self._channel_scale = None
        if self._numbers.scaled:
            rows, channels = locate_scales(path)
            slots = range(store.shards[shard].n_rows)
            row_scale = store.read_stored(shard, rows, slots).numbers
            self._row_scale = torch.from_numpy(row_scale)[:, None]
            channel_scale = store.read_stored(shard, channels, range(1)).numbers[0]
            self._channel_scale = torch.from_numpy(channel_scale)
        self._memory = memory
        self._chunk = -1
        self._held: Part | None = None
        self._file = ExitStack()
        self._read = self._file.enter_context(store.open_array(shard, path))

    def list_parts(self, start: int, stop: int) -> Iterator[Part]:
        """Kept rows start..stop, run after run, in the chunks' memory."""
        cuts = self._cuts[bisect_right(self._cuts, start) : bisect_left(self._cuts, stop)]
        for begin, end in itertools.pairwise((start, *cuts, stop)):
            chunk, row = divmod(int(self._slots[begin]), self._rows_per_chunk)
            last = int(self._slots[end - 1]) - chunk * self._rows_per_chunk
            rows: slice | Tensor = slice(row, last + 1)
            if last - row >= end - begin:  # with holes
                rows = torch.from_numpy(self._slots[begin:end] - chunk * self._rows_per_chunk)
            values, row_scale, channel_scale = self._hold(chunk)
            yield Part(values[rows], None if row_scale is None else row_scale[rows], channel_scale)

    def close(self) -> None:
        self._file.close()

    def _hold(self, chunk: int) -> Part:
        if self._held is None or chunk != self._chunk:
            self._held = None  # before the next takes its room
            with ExitStack() as on_error:  # the file's place is told of damage, and closes it
                on_error.push(self._file)
                numbers = self._read(chunk, self._memory.take())
                on_error.pop_all()
            row_scale = self._row_scale
            if row_scale is not None:
                row_scale = row_scale[chunk * self._rows_per_chunk :][: self._rows_per_chunk]
            values = view_numbers(numbers, self._numbers)
            self._held, self._chunk = Part(values, row_scale, self._channel_scale), chunk
        return self._held


def find_cuts(slots: np.ndarray, rows_per_chunk: int) -> list[int]:
    """Kept rows at which a chunk begins or, if runs are not too short, a run without a hole."""
    new_chunk = np.diff(slots // rows_per_chunk, prepend=-1) > 0
    cuts = np.flatnonzero(new_chunk | (np.diff(slots, prepend=-2) > 1))
    if len(cuts) * MIN_RUN_ROWS > len(slots):  # too many holes: pick rows chunk by chunk
        cuts = np.flatnonzero(new_chunk)
    return cuts.tolist()


def decode_parts(parts: Sequence[Part], out: Float[Tensor, "rows d_model"]) -> None:
    """Write the parts' exact values one after the other, as decode_numbers does for each.

    All in one call: two threads that convert slice by slice take turns at the interpreter's lock,
    and together need 571 us for what they do in 286 us this way.
    """
    values, row_scales, channel_scales = map(list, zip(*parts, strict=True))
    outs = out.split([len(part) for part in values])
    torch._foreach_copy_(outs, values)  # pyright: ignore[reportPrivateImportUsage]
    if row_scales[0] is not None:
        for scales in (row_scales, channel_scales):
            torch._foreach_mul_(outs, scales)  # pyright: ignore[reportPrivateImportUsage]


class ReusedMemory:
    """Arrays of n_bytes, each used again once nobody holds it, a view, or a tensor of either.

    Fresh memory instead would cost a page fault for every 4 KiB of every batch. A view holds its
    array, and a tensor made by torch.from_numpy does for as long as its storage lives.
    """

    def __init__(self, n_bytes: int) -> None:
        self._n_bytes = n_bytes
        self._arrays: list[np.ndarray] = []

    def take(self) -> np.ndarray:
        """An array that nobody else holds, with whatever was in it."""
        for i in range(len(self._arrays)):
            if _count_holders(self._arrays, i) == _NOBODY:
                return self._arrays[i]
        self._arrays.append(np.empty(self._n_bytes, np.uint8))
        return self._arrays[-1]


def _count_holders(arrays: list[np.ndarray], i: int) -> int:
    return sys.getrefcount(arrays[i])


_NOBODY = _count_holders([np.empty(0)], 0)  # what the list and the call itself count, here
