"""One shard of one array as one file: Zarr v3 `sharding_indexed`, with every check our own.

    chunk 0 | crc32c | chunk 1 | crc32c | ... | index | crc32c

Every chunk is `rows_per_chunk` rows of little-endian numbers (codecs bytes + crc32c), slots without
a row hold the fill value, chunks without any row are left out. The index holds (offset, length) as
uint64 for each chunk of the shard, 2**64 - 1 twice for one that is left out. All of it follows from
the number of rows, so a reader needs no index: it knows each byte's place, and vouches for chunks
by the checksums in the manifest.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import google_crc32c
import numpy as np

from store.errors import ShardCorrupt

MEND = (
    "Remove the store's folder and run `pipeline cache`: "
    "it keeps the good shards and recomputes the rest."
)
_CRC_BYTES = 4
_ABSENT = 2**64 - 1


class ShardFormat(NamedTuple):
    """What the bytes of a shard file depend on, apart from the rows."""

    disk: np.dtype
    row_shape: tuple[int, ...]  # (d_model,) or ()
    fill: float | int
    rows_per_chunk: int
    chunks_per_shard: int

    @property
    def chunk_bytes(self) -> int:
        return (
            self.rows_per_chunk * int(np.prod(self.row_shape, dtype=np.int64)) * self.disk.itemsize
        )

    def count_chunks(self, n_rows: int) -> int:
        """Chunks that hold at least one row, which are those in the file."""
        return -(-n_rows // self.rows_per_chunk)

    def file_bytes(self, n_rows: int) -> int:
        chunks = self.count_chunks(n_rows) * (self.chunk_bytes + _CRC_BYTES)
        return chunks + self.chunks_per_shard * 16 + _CRC_BYTES


class EncodedShard(NamedTuple):
    pieces: tuple[bytes | memoryview, ...]  # the file's content, in order
    crc32c: tuple[int, ...]  # of each chunk's numbers, in file order


def encode_shard(rows: np.ndarray, shard_format: ShardFormat) -> EncodedShard:
    """The file that holds `rows` [n_rows, *row_shape], in the order given."""
    step = shard_format.rows_per_chunk
    pieces, checksums = [], []
    for first in range(0, len(rows), step):
        chunk = np.ascontiguousarray(rows[first : first + step], dtype=shard_format.disk)
        if len(chunk) < step:
            padded = np.full((step, *shard_format.row_shape), shard_format.fill, shard_format.disk)
            padded[: len(chunk)] = chunk
            chunk = padded
        checksum = google_crc32c.value(chunk)  # type: ignore[arg-type]  # takes any contiguous buffer
        pieces += [chunk.data, checksum.to_bytes(_CRC_BYTES, "little")]
        checksums.append(checksum)
    return EncodedShard((*pieces, encode_index(len(rows), shard_format)), tuple(checksums))


def encode_index(n_rows: int, shard_format: ShardFormat) -> bytes:
    """The end of the file: where each chunk lies, and the index's own crc32c."""
    index = np.full((shard_format.chunks_per_shard, 2), _ABSENT, "<u8")
    n_chunks, length = shard_format.count_chunks(n_rows), shard_format.chunk_bytes + _CRC_BYTES
    index[:n_chunks, 0] = np.arange(n_chunks, dtype=np.uint64) * np.uint64(length)
    index[:n_chunks, 1] = length
    content = index.tobytes()
    return content + google_crc32c.value(content).to_bytes(_CRC_BYTES, "little")


def check_shard(file: int, shard_format: ShardFormat, n_rows: int, where: str) -> None:
    """Raise ShardCorrupt unless the open file has the size and index that `n_rows` rows have."""
    expected, found = shard_format.file_bytes(n_rows), os.fstat(file).st_size
    if found != expected:
        raise ShardCorrupt(f"shard file at {where}: expected {expected} bytes, got {found}. {MEND}")
    index = encode_index(n_rows, shard_format)
    if os.pread(file, len(index), expected - len(index)) != index:
        raise ShardCorrupt(
            f"shard file at {where}: expected the index of {n_rows} rows, got another. {MEND}"
        )


def read_chunk(
    file: int, chunk: int, shard_format: ShardFormat, checksums: Sequence[int], where: str
) -> np.ndarray:
    """Chunk number `chunk` of an open file: [rows_per_chunk, *row_shape], read-only, with padding.

    Raises ShardCorrupt unless its numbers and its stored checksum both match `checksums[chunk]`,
    the manifest's.
    """
    length = shard_format.chunk_bytes
    content = os.pread(file, length + _CRC_BYTES, chunk * (length + _CRC_BYTES))
    numbers = np.frombuffer(content, np.uint8, count=min(length, len(content)))
    expected = checksums[chunk]
    found = (google_crc32c.value(numbers), int.from_bytes(content[length:], "little"))  # type: ignore[arg-type]
    if len(content) != length + _CRC_BYTES or found != (expected, expected):
        raise ShardCorrupt(
            f"chunk {chunk} at {where}: expected crc32c {expected:08x} as in the manifest, got "
            f"{found[0]:08x} with "
            f"{found[1]:08x} stored beside it. {MEND}"
        )
    return numbers.view(shard_format.disk).reshape(-1, *shard_format.row_shape)
