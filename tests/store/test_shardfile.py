"""Shard files against zarr-python's own codec, in both directions, and every byte's check."""

import os

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec

from store.errors import ShardCorrupt
from store.shardfile import ShardFormat, check_shard, encode_shard, read_chunk

FORMAT = ShardFormat(np.dtype("<f2"), (3,), float("nan"), rows_per_chunk=4, chunks_per_shard=5)


def rows_of(n_rows: int) -> np.ndarray:
    return np.random.default_rng(n_rows).standard_normal((n_rows, 3)).astype("<f2")


def write_file(path, shard_format, rows):
    encoded = encode_shard(rows, shard_format)
    path.write_bytes(b"".join(encoded.pieces))
    return encoded.crc32c


@pytest.mark.parametrize("n_rows", [1, 4, 5, 19, 20])
def test_zarr_writes_the_same_bytes(tmp_path, n_rows):
    array = zarr.create_array(
        tmp_path / "zarr", shape=(20, 3), shards=(20, 3), chunks=(4, 3), dtype="float16",
        fill_value=float("nan"), filters=None, serializer=BytesCodec(endian="little"),
        compressors=[Crc32cCodec()],
    )  # fmt: skip
    rows = rows_of(n_rows)
    array[:n_rows] = rows
    ours = b"".join(encode_shard(rows, FORMAT).pieces)
    # zarr-python may order the chunks in the file differently, so compare what it reads from ours.
    theirs = tmp_path / "zarr/c/0/0"
    assert theirs.stat().st_size == len(ours) == FORMAT.file_bytes(n_rows)
    theirs.write_bytes(ours)
    read = np.asarray(array[:])
    assert np.array_equal(read[:n_rows], rows)
    assert np.isnan(read[n_rows:]).all()


@settings(max_examples=30, deadline=None)
@given(
    n_rows=st.integers(1, 24),
    dtype=st.sampled_from(["<f4", "<f2", "<u2", "<i4"]),
    row_shape=st.sampled_from([(), (1,), (5,)]),
    rows_per_chunk=st.sampled_from([1, 2, 6, 24]),
)
def test_round_trip(tmp_path_factory, n_rows, dtype, row_shape, rows_per_chunk):
    shard_format = ShardFormat(np.dtype(dtype), row_shape, 7, rows_per_chunk, 24 // rows_per_chunk)
    shape = (n_rows, *row_shape)
    rows = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    path = tmp_path_factory.mktemp("shard") / "0"
    checksums = write_file(path, shard_format, rows)
    assert path.stat().st_size == shard_format.file_bytes(n_rows)
    file = os.open(path, os.O_RDONLY)
    check_shard(file, shard_format, n_rows, "here")
    chunks = [
        read_chunk(file, chunk, shard_format, checksums, "here") for chunk in range(len(checksums))
    ]
    os.close(file)
    read = np.concatenate(chunks)
    assert np.array_equal(read[:n_rows], rows)
    assert (read[n_rows:] == 7).all()


def read_all(path, checksums, n_rows):
    file = os.open(path, os.O_RDONLY)
    try:
        check_shard(file, FORMAT, n_rows, "tokens/c/0")
        return [read_chunk(file, chunk, FORMAT, checksums, "x") for chunk in range(len(checksums))]
    finally:
        os.close(file)


def test_no_byte_can_change_unnoticed(tmp_path):
    path = tmp_path / "0"
    checksums = write_file(path, FORMAT, rows_of(10))
    content = path.read_bytes()
    assert len(read_all(path, checksums, 10)) == 3
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ShardCorrupt):
            read_all(path, checksums, 10)


def test_whole_but_foreign_file_is_refused(tmp_path):
    """A file that is right in itself, checksums and all, but not the one in the manifest."""
    path = tmp_path / "0"
    checksums = write_file(path, FORMAT, rows_of(10))
    write_file(path, FORMAT, rows_of(11)[1:])
    with pytest.raises(ShardCorrupt, match="as in the manifest"):
        read_all(path, checksums, 10)


@pytest.mark.parametrize("size", [0, 1, 30, -1])
def test_cut_file_is_refused(tmp_path, size):
    path = tmp_path / "0"
    checksums = write_file(path, FORMAT, rows_of(10))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ShardCorrupt, match=r"tokens/c/0: expected \d+ bytes, got"):
        read_all(path, checksums, 10)


def test_file_cut_after_its_size_was_checked(tmp_path):
    path = tmp_path / "0"
    checksums = write_file(path, FORMAT, rows_of(10))
    for size in (0, 10, FORMAT.chunk_bytes + 2):
        path.write_bytes(path.read_bytes()[:size])
        file = os.open(path, os.O_RDONLY)
        with pytest.raises(ShardCorrupt):
            read_chunk(file, 0, FORMAT, checksums, "x")
        os.close(file)
