"""One shard of one array as one file: Zarr v3 `sharding_indexed`, with every check our own.

    chunk 0 | crc32c | chunk 1 | crc32c | ... | index | crc32c

Every chunk is `rows_per_chunk` rows of little-endian numbers, compressed or not (codecs bytes, the
compression's, crc32c); slots without a row hold the fill value, chunks without any row are left
out. The index holds (offset, length) as uint64 for each chunk of the shard, 2**64 - 1 twice for one
that is left out. All of it follows from the number of rows and, of compressed chunks, the lengths
in the manifest, so a reader needs no index: it knows each byte's place, and vouches for chunks by
the checksums in the manifest.
"""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

import crc32c
import numpy as np

from store.compression import compress, decompress
from store.errors import ShardCorrupt, mend

CHECKSUM_BYTES = 4
_ABSENT = 2**64 - 1


class ShardFormat(NamedTuple):
    """What the bytes of a shard file depend on, apart from the rows."""

    disk: np.dtype
    row_shape: tuple[int, ...]  # (d_model,) or ()
    fill: float | int
    rows_per_chunk: int
    chunks_per_shard: int
    compression: str = "none"

    @property
    def chunk_bytes(self) -> int:
        """Of a chunk's numbers, before compression."""
        return self.rows_per_chunk * math.prod(self.row_shape) * self.disk.itemsize

    @property
    def rows_per_shard(self) -> int:
        return self.rows_per_chunk * self.chunks_per_shard

    def count_chunks(self, n_rows: int) -> int:
        """Chunks that hold at least one row, which are those in the file."""
        return -(-n_rows // self.rows_per_chunk)

    def file_bytes(self, n_rows: int, chunk_bytes: Sequence[int] = ()) -> int:
        """Size of the file; without the lengths of its compressed chunks, as if uncompressed."""
        chunks = sum(chunk_bytes) if chunk_bytes else self.count_chunks(n_rows) * self.chunk_bytes
        n_checksums = self.count_chunks(n_rows) + 1
        return chunks + self.chunks_per_shard * 16 + n_checksums * CHECKSUM_BYTES


class EncodedShard(NamedTuple):
    pieces: tuple[bytes | memoryview, ...]  # the file's content, in order
    crc32c: tuple[int, ...]  # of each chunk as it is in the file, in file order
    chunk_bytes: tuple[int, ...]  # length of each compressed chunk; empty if not compressed


def encode_shard(rows: np.ndarray, shard_format: ShardFormat) -> EncodedShard:
    """The file that holds `rows` [n_rows, *row_shape], in the order given."""
    step = shard_format.rows_per_chunk
    pieces, checksums, lengths = [], [], []
    for first in range(0, len(rows), step):
        chunk = np.ascontiguousarray(rows[first : first + step], dtype=shard_format.disk)
        if len(chunk) < step:
            padded = np.full((step, *shard_format.row_shape), shard_format.fill, shard_format.disk)
            padded[: len(chunk)] = chunk
            chunk = padded
        content = chunk.data
        if shard_format.compression != "none":
            content = memoryview(compress(chunk, shard_format.compression))
            lengths.append(len(content))
        checksum = crc32c.crc32c(content)
        pieces += [content, checksum.to_bytes(CHECKSUM_BYTES, "little")]
        checksums.append(checksum)
    index = encode_index(len(rows), shard_format, lengths)
    return EncodedShard((*pieces, index), tuple(checksums), tuple(lengths))


def encode_index(n_rows: int, shard_format: ShardFormat, chunk_bytes: Sequence[int] = ()) -> bytes:
    """The end of the file: where each chunk lies, and the index's own crc32c."""
    index = np.full((shard_format.chunks_per_shard, 2), _ABSENT, "<u8")
    n_chunks = shard_format.count_chunks(n_rows)
    lengths = np.full(n_chunks, shard_format.chunk_bytes, np.uint64)
    if chunk_bytes:
        lengths[:] = chunk_bytes
    lengths += np.uint64(CHECKSUM_BYTES)
    index[:n_chunks, 0] = np.cumsum(lengths) - lengths
    index[:n_chunks, 1] = lengths
    content = index.tobytes()
    return content + crc32c.crc32c(content).to_bytes(CHECKSUM_BYTES, "little")


def check_shard(
    file: int,
    shard_format: ShardFormat,
    n_rows: int,
    where: str,
    chunk_bytes: Sequence[int] = (),
) -> None:
    """Raise ShardCorrupt unless the open file has the size and index that `n_rows` rows have.

    `chunk_bytes` are the manifest's lengths of compressed chunks, empty if not compressed.
    """
    expected = shard_format.file_bytes(n_rows, chunk_bytes)
    found = os.fstat(file).st_size
    if found != expected:
        raise ShardCorrupt(
            f"shard file at {where}: expected {expected} bytes, got {found}. {mend(where)}"
        )
    index = encode_index(n_rows, shard_format, chunk_bytes)
    if os.pread(file, len(index), expected - len(index)) != index:
        raise ShardCorrupt(
            f"shard file at {where}: expected the index of {n_rows} rows, got another. "
            f"{mend(where)}"
        )


def read_chunk(
    file: int,
    chunk: int,
    shard_format: ShardFormat,
    checksums: Sequence[int],
    where: str,
    chunk_bytes: Sequence[int] = (),
    memory: np.ndarray | None = None,
) -> np.ndarray:
    """Chunk number `chunk` of an open file: [rows_per_chunk, *row_shape], with padding.

    The result may lie in `memory`, of uint8, where that is given and large enough.
    Raises ShardCorrupt unless its content and its stored checksum both match `checksums[chunk]`,
    the manifest's, and hold as many numbers as a chunk has.
    """
    length = chunk_bytes[chunk] if chunk_bytes else shard_format.chunk_bytes
    start = (sum(chunk_bytes[:chunk]) if chunk_bytes else chunk * length) + chunk * CHECKSUM_BYTES
    needed = length + CHECKSUM_BYTES
    if memory is None or len(memory) < needed:
        memory = np.empty(needed, np.uint8)  # writable, so that torch takes it as it is
    buffer = memory[:needed]
    n_read = os.preadv(file, [buffer.data], start)
    content = buffer[: min(length, n_read)]
    expected = checksums[chunk]
    stored = int.from_bytes(buffer[length:n_read].tobytes(), "little")
    found = (crc32c.crc32c(content.data), stored)
    if n_read != len(buffer) or found != (expected, expected):
        raise ShardCorrupt(
            f"chunk {chunk} at {where}: expected crc32c {expected:08x} as in the manifest, got "
            f"{found[0]:08x} with "
            f"{found[1]:08x} stored beside it. {mend(where)}"
        )
    if shard_format.compression != "none":
        try:
            content = decompress(content, shard_format.compression, shard_format.chunk_bytes)
        except ValueError as error:
            raise ShardCorrupt(
                f"chunk {chunk} at {where}: expected {error}. {mend(where)}"
            ) from None
    return content.view(shard_format.disk).reshape(-1, *shard_format.row_shape)
