"""Rows of one array of one shard, chunk by chunk, each vouched for by the manifest."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol, runtime_checkable

import numpy as np

from store.errors import ShardMissing, mend
from store.files import StoreFiles
from store.manifest import ArraySpec, FileRecord, ShardRecord, StoreSpec, locate_shard
from store.shardfile import ShardFormat, check_shard, read_chunk

Slots = np.ndarray | range  # of a shard; a range with step 1


@runtime_checkable
class ReadChunk(Protocol):
    """Reads a chunk of an open shard file."""

    def __call__(self, chunk: int, memory: np.ndarray | None = None) -> np.ndarray:
        """[rows_per_chunk, *row_shape] of the disk dtype, writable, checked, with padding.

        It may lie in `memory`, of uint8, where that is given and large enough. Raises ShardCorrupt.
        """
        ...


@contextmanager
def open_array(
    files: StoreFiles, spec: StoreSpec, array: ArraySpec, record: ShardRecord
) -> Iterator[ReadChunk]:
    """Keep a shard's file of one array open. Raises ShardMissing, and ShardCorrupt for its size or
    index.
    """
    shard_format, file_record = spec.shard_format(array), record.files[array.path]
    name = locate_shard(array.path, record.index)
    where, lengths = files.locate(name), file_record.chunk_bytes
    with _open_file(files, name, file_record) as file:
        check_shard(file, shard_format, array.count_rows(record.spec), where, lengths)

        def read(chunk: int, memory: np.ndarray | None = None) -> np.ndarray:
            checksums = file_record.crc32c
            return read_chunk(file, chunk, shard_format, checksums, where, lengths, memory)

        yield read


def take_rows(read: ReadChunk, slots: Slots, shard_format: ShardFormat) -> np.ndarray:
    """The file's rows at these slots: [slots, *row_shape] of the disk dtype, writable.

    A view of their chunk where it is one and they are a range.
    """
    if isinstance(slots, range):
        return _take_range(read, slots, shard_format)
    return _take_slots(read, slots, shard_format)


def _take_range(read: ReadChunk, slots: range, shard_format: ShardFormat) -> np.ndarray:
    """Contiguous slots; of each chunk that holds one."""
    assert slots.step == 1
    size = shard_format.rows_per_chunk
    parts = [
        read(chunk)[max(slots.start - chunk * size, 0) : slots.stop - chunk * size]
        for chunk in range(slots.start // size, -(-slots.stop // size) if slots else 0)
    ]
    if not parts:
        return np.empty((0, *shard_format.row_shape), shard_format.disk)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _take_slots(read: ReadChunk, slots: np.ndarray, shard_format: ShardFormat) -> np.ndarray:
    taken = np.empty((len(slots), *shard_format.row_shape), shard_format.disk)
    chunk_of, row_of = np.divmod(slots, shard_format.rows_per_chunk)
    by_chunk = np.argsort(chunk_of, kind="stable")
    chunks, starts = np.unique(chunk_of[by_chunk], return_index=True)
    for chunk, here in zip(chunks.tolist(), np.split(by_chunk, starts)[1:], strict=True):
        taken[here] = read(chunk)[row_of[here]]
    return taken


@contextmanager
def _open_file(files: StoreFiles, path: str, record: FileRecord) -> Iterator[int]:
    with ExitStack() as opened:
        try:
            descriptor = opened.enter_context(files.open(path, record))
        except (FileNotFoundError, NotADirectoryError):
            raise ShardMissing(
                f"shard file at {files.locate(path)}: expected a file, got none. "
                f"{mend(files.where)}"
            ) from None
        yield descriptor
