"""Shard files against zarr-python's own codec, in both directions, and every byte's check."""

import os

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec

from store.compression import COMPRESSIONS, compress, list_codecs
from store.errors import ShardCorrupt
from store.shardfile import ShardFormat, check_shard, encode_shard, read_chunk

FORMAT = ShardFormat(np.dtype("<f2"), (3,), float("nan"), rows_per_chunk=4, chunks_per_shard=5)


def rows_of(n_rows: int) -> np.ndarray:
    return np.random.default_rng(n_rows).standard_normal((n_rows, 3)).astype("<f2")


def write_file(path, shard_format, rows):
    encoded = encode_shard(rows, shard_format)
    path.write_bytes(b"".join(encoded.pieces))
    return encoded


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("n_rows", [1, 4, 5, 19, 20])
def test_zarr_writes_the_same_bytes(tmp_path, n_rows, compression):
    shard_format = FORMAT._replace(compression=compression)
    array = zarr.create_array(
        tmp_path / "zarr", shape=(20, 3), shards=(20, 3), chunks=(4, 3), dtype="float16",
        fill_value=float("nan"), filters=None, serializer=BytesCodec(endian="little"),
        compressors=[*list_codecs(compression, 2), {"name": "crc32c"}],
    )  # fmt: skip
    rows = rows_of(n_rows)
    array[:n_rows] = rows
    encoded = encode_shard(rows, shard_format)
    ours = b"".join(encoded.pieces)
    assert bool(encoded.chunk_bytes) == (compression != "none")
    # zarr-python may order the chunks in the file differently, so compare what it reads from ours.
    theirs = tmp_path / "zarr/c/0/0"
    n_bytes = shard_format.file_bytes(n_rows, encoded.chunk_bytes)
    assert theirs.stat().st_size == len(ours) == n_bytes
    theirs.write_bytes(ours)
    read = np.asarray(array[:])
    assert np.array_equal(read[:n_rows], rows)
    assert np.isnan(read[n_rows:]).all()


@settings(max_examples=30, deadline=None)
@given(
    n_rows=st.integers(1, 24),
    dtype=st.sampled_from(["<f4", "<f2", "<u2", "<i4", "i1"]),
    row_shape=st.sampled_from([(), (1,), (5,)]),
    rows_per_chunk=st.sampled_from([1, 2, 6, 24]),
    compression=st.sampled_from(COMPRESSIONS),
)
def test_round_trip(tmp_path_factory, n_rows, dtype, row_shape, rows_per_chunk, compression):
    shard_format = ShardFormat(
        np.dtype(dtype), row_shape, 7, rows_per_chunk, 24 // rows_per_chunk, compression
    )
    shape = (n_rows, *row_shape)
    rows = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    path = tmp_path_factory.mktemp("shard") / "0"
    encoded = write_file(path, shard_format, rows)
    assert path.stat().st_size == shard_format.file_bytes(n_rows, encoded.chunk_bytes)
    chunks = read_all(path, encoded, n_rows, shard_format)
    read = np.concatenate(chunks)
    assert np.array_equal(read[:n_rows], rows)
    assert (read[n_rows:] == 7).all()


def read_all(path, encoded, n_rows, shard_format=FORMAT):
    file = os.open(path, os.O_RDONLY)
    lengths, checksums = encoded.chunk_bytes, encoded.crc32c
    try:
        check_shard(file, shard_format, n_rows, "tokens/c/0", lengths)
        return [
            read_chunk(file, chunk, shard_format, checksums, "x", lengths)
            for chunk in range(len(checksums))
        ]
    finally:
        os.close(file)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_no_byte_can_change_unnoticed(tmp_path, compression):
    path, shard_format = tmp_path / "0", FORMAT._replace(compression=compression)
    encoded = write_file(path, shard_format, rows_of(10))
    content = path.read_bytes()
    assert len(read_all(path, encoded, 10, shard_format)) == 3
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ShardCorrupt):
            read_all(path, encoded, 10, shard_format)


def test_whole_but_foreign_file_is_refused(tmp_path):
    """A file that is right in itself, checksums and all, but not the one in the manifest."""
    path = tmp_path / "0"
    encoded = write_file(path, FORMAT, rows_of(10))
    write_file(path, FORMAT, rows_of(11)[1:])
    with pytest.raises(ShardCorrupt, match="as in the manifest"):
        read_all(path, encoded, 10)


@pytest.mark.parametrize("size", [0, 1, 30, -1])
def test_cut_file_is_refused(tmp_path, size):
    path = tmp_path / "0"
    encoded = write_file(path, FORMAT, rows_of(10))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ShardCorrupt, match=r"tokens/c/0: expected \d+ bytes, got"):
        read_all(path, encoded, 10)


def test_file_cut_after_its_size_was_checked(tmp_path):
    path = tmp_path / "0"
    encoded = write_file(path, FORMAT, rows_of(10))
    for size in (0, 10, FORMAT.chunk_bytes + 2):
        path.write_bytes(path.read_bytes()[:size])
        file = os.open(path, os.O_RDONLY)
        with pytest.raises(ShardCorrupt):
            read_chunk(file, 0, FORMAT, encoded.crc32c, "x")
        os.close(file)


@pytest.mark.parametrize("compression", [name for name in COMPRESSIONS if name != "none"])
@pytest.mark.parametrize("n_rows", [3, 5])
def test_a_chunk_of_another_size_is_refused(tmp_path, compression, n_rows):
    """With the checksums that it has: only its size is wrong."""
    shard_format = FORMAT._replace(compression=compression, chunks_per_shard=1)
    content = compress(rows_of(n_rows), compression)
    checksum = google_crc32c.value(content)
    (tmp_path / "0").write_bytes(content + checksum.to_bytes(4, "little"))
    file = os.open(tmp_path / "0", os.O_RDONLY)
    with pytest.raises(ShardCorrupt, match=rf"chunk 0 at x: expected a {compression} chunk of 24"):
        read_chunk(file, 0, shard_format, [checksum], "x", [len(content)])
    os.close(file)
