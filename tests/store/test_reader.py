"""Reading: exactly what was written, by our reader, by zarr-python and by TensorStore."""

import os
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import store
from store.compression import COMPRESSIONS
from store.layout import permute_rows
from store.manifest import locate_scales
from store.numbers import FORMATS, Stored, decode_numbers
from tests.store.small_store import (
    HOOK,
    PACKED,
    PADDED,
    all_rows,
    assert_rows_equal,
    make_spec,
    select_rows,
    write_store,
)

FORMATS_OF = [  # acts, grads, every chunk's compression
    ("float32", "float16", "none"),
    ("float16", "bfloat16", "zstd"),
    ("bfloat16", "float32", "blosc"),
    ("int8", "float16", "zstd"),
    ("int8", "int8", "none"),
    ("float32", "int8", "blosc"),
]
CASES = [(lengths, *formats) for lengths in (PACKED, PADDED) for formats in FORMATS_OF]


@pytest.fixture(
    scope="module", params=CASES, ids=lambda c: "-".join(map(str, (c[0].sum(), *c[1:])))
)
def opened(request, tmp_path_factory):
    lengths, acts_dtype, grads_dtype, compression = request.param
    spec = make_spec(
        lengths, acts_dtype=acts_dtype, grads_dtype=grads_dtype, compression=compression
    )
    return write_store(tmp_path_factory.mktemp("store") / "out", spec)


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    spec = make_spec(PADDED, hooks=("a.x", "b.y"))
    return write_store(tmp_path_factory.mktemp("store") / "out", spec)


def test_facts(opened):
    assert opened.hooks == (HOOK,)
    assert opened.d_model == 5
    assert opened.n_rows == sum(opened.manifest.identity["lengths"])
    assert [shard.index for shard in opened.shards] == list(range(6))


def test_blocks(opened):
    expected = all_rows(opened.spec)
    for block, length in enumerate(opened.manifest.identity["lengths"]):
        found = opened.read_block(block)
        assert_rows_equal(found, select_rows(expected, expected.block == block))
        assert found.position.tolist() == list(range(length))


def test_shards(opened):
    parts = [opened.read_shard(shard.index) for shard in opened.shards]
    whole = store.Rows(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    assert_rows_equal(whole, all_rows(opened.spec))


def test_slots_are_the_permuted_rows(opened):
    for shard in opened.shards:
        order = permute_rows(3, shard.index, shard.n_rows)
        assert shard.n_rows < 4 or order.tolist() != list(range(shard.n_rows))
        whole = opened.read_shard(shard.index)
        for start, stop in [(0, shard.n_rows), (1, 3), (0, 0), (shard.n_rows - 1, shard.n_rows)]:
            stop = min(stop, shard.n_rows)
            found = opened.read_slots(shard.index, min(start, stop), stop)
            wanted = torch.from_numpy(order[min(start, stop) : stop])
            assert_rows_equal(found, store.Rows(*(column[wanted] for column in whole)))


def test_tokens(opened):
    expected = all_rows(opened.spec)
    for row in range(0, opened.n_rows, 7):
        token = opened.read_token(int(expected.block[row]), int(expected.position[row]))
        assert torch.equal(token.acts, expected.acts[row])
        assert torch.equal(token.grads, expected.grads[row])
        assert token.token == expected.tokens[row]
        assert token.loss == pytest.approx(expected.loss[row].item(), rel=0, abs=0)


def read_with_zarr(path, array):
    return np.asarray(zarr.open_group(path, mode="r")[array][:])


def read_with_tensorstore(path, array):
    kvstore = {"driver": "file", "path": f"{path / array}/"}
    opened = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
    return np.asarray(opened.read().result())


def assert_fill(values, array):
    fill = np.full((), array.numbers.fill, array.numbers.disk)
    assert np.array_equal(
        values, np.broadcast_to(fill, values.shape), equal_nan=values.dtype.kind == "f"
    )


@pytest.mark.parametrize("read", [read_with_zarr, read_with_tensorstore])
def test_other_readers_see_the_same(opened, read):
    """Un-permuted by the documented rule, they are what was written; padding is the fill value."""
    spec, layout = opened.spec, opened.spec.layout
    stored = {path: read(Path(opened.where), path) for path in spec.arrays()}
    for path, array in spec.arrays().items():
        n_slots = layout.n_slots if array.per == "slot" else len(layout.shards)
        assert stored[path].shape == (n_slots, *array.row_shape)
        assert stored[path].dtype == array.numbers.disk
    names = {"acts": f"{HOOK}/acts", "grads": f"{HOOK}/grads"}
    for field, expected in zip(store.Rows._fields, all_rows(spec), strict=True):
        path = names.get(field, field)
        column, (rows, channels) = spec.arrays()[path], locate_scales(path)
        unpermuted = []
        for shard in opened.shards:
            first = shard.index * layout.rows_per_shard
            slots, padding = (
                slice(first, first + shard.n_rows),
                slice(first + shard.n_rows, first + layout.rows_per_shard),
            )
            numbers = Stored(stored[path][slots])
            if column.numbers.scaled:
                numbers = Stored(
                    stored[path][slots], stored[rows][slots], stored[channels][shard.index]
                )
                assert_fill(stored[rows][padding], spec.arrays()[rows])
            assert_fill(stored[path][padding], column)
            values = decode_numbers(numbers, column.numbers)
            unpermuted.append(
                values[np.argsort(permute_rows(spec.seed, shard.index, shard.n_rows))]
            )
        assert torch.equal(torch.cat(unpermuted), expected)


def test_zarr_sees_dimensions_and_attributes(opened):
    root = zarr.open_group(opened.where, mode="r")
    assert root.attrs["fingerprint"] == opened.manifest.fingerprint
    assert root[f"{HOOK}/acts"].metadata.dimension_names == ("slot", "channel")
    assert root[f"{HOOK}/acts"].attrs["number_format"] == opened.manifest.acts_dtype
    assert root["loss"].metadata.dimension_names == ("slot",)
    if opened.manifest.acts_dtype == "int8":
        rows, channels = (root[path].metadata for path in locate_scales(f"{HOOK}/acts"))
        assert (rows.dimension_names, channels.dimension_names) == (("slot",), ("shard", "channel"))


def test_no_padding_comes_out(padded):
    for shard in padded.shards:
        rows = padded.read_shard(shard.index, "a.x")
        assert len(rows.block) == shard.n_rows
        assert rows.acts.isfinite().all()
        assert (rows.tokens >= 0).all()
        with pytest.raises(store.StoreError, match=rf"in 0\.\.{shard.n_rows}, got"):
            padded.read_slots(shard.index, 0, shard.n_rows + 1, "a.x")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.read_block(0), "expected one of .*a.x.*b.y.* got none"),
        (lambda s: s.read_block(0, "c"), "got c"),
        (lambda s: s.read_block(21, "a.x"), r"expected 0\.\.20, got 21"),
        (lambda s: s.read_block(-1, "a.x"), r"expected 0\.\.20, got -1"),
        (lambda s: s.read_token(1, 3, "a.x"), r"position in block 1 .* 0\.\.2, got 3"),
        (lambda s: s.read_token(1, -1, "a.x"), r"got -1"),
        (lambda s: s.read_shard(6, "a.x"), r"expected 0\.\.5, got 6"),
        (lambda s: s.read_slots(0, 3, 2, "a.x"), r"got 3\.\.2"),
        (lambda s: s.read_slots(0, -1, 2, "a.x"), r"got -1\.\.2"),
    ],
)
def test_impossible_requests(padded, call, message):
    with pytest.raises(store.StoreError, match=message):
        call(padded)


def test_hooks_are_kept_apart(padded):
    for hook in padded.hooks:
        expected = all_rows(padded.spec, hook)
        assert_rows_equal(padded.read_shard(0, hook), store.Rows(*(c[:20] for c in expected)))


def test_contiguous_slots_read_only_their_chunks(opened, monkeypatch):
    """Once each; of the channel scales, which have one row, all."""
    shard, rows_per_chunk = 0, opened.manifest.rows_per_chunk
    n_rows = opened.shards[shard].n_rows
    reads = []
    preadv = os.preadv

    def spy(file, buffers, offset):
        path = Path(os.readlink(f"/proc/self/fd/{file}")).relative_to(opened.where)
        reads.append((str(path), offset, sum(map(len, buffers))))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", spy)
    opened.read_slots(shard, rows_per_chunk + 1, min(rows_per_chunk + 3, n_rows))
    expected = []
    for path, array in opened.spec.arrays().items():
        uncompressed = opened.spec.shard_format(array).chunk_bytes
        lengths = opened.manifest.shards[shard].files[path].chunk_bytes or [uncompressed] * 2
        lengths = [length + 4 for length in lengths]  # with the checksum
        chunk = 1 if array.per == "slot" else 0
        expected.append(
            (store.manifest.locate_shard(path, shard), sum(lengths[:chunk]), lengths[chunk])
        )
    assert sorted(reads) == sorted(expected)


def test_any_slots_in_any_order(opened):
    shard = opened.shards[0]
    whole = opened.read_slots(0, 0, shard.n_rows)
    for slots in ([], [3], [5, 0, 5, shard.n_rows - 1], list(range(shard.n_rows))[::-1]):
        for path, column in ((f"{HOOK}/acts", whole.acts), ("tokens", whole.tokens)):
            stored = opened.read_stored(0, path, np.array(slots, dtype=np.int64))
            out = torch.empty(len(slots), *column.shape[1:], dtype=column.dtype)
            found = decode_numbers(stored, opened.arrays[path].numbers, out)
            assert found is out
            assert torch.equal(found, column[slots])


def test_a_range_inside_a_chunk_is_not_copied(opened):
    stored = opened.read_stored(0, f"{HOOK}/acts", range(2, 5))
    assert stored.numbers.base is not None
    assert len(stored.numbers) == 3
    assert len(opened.read_stored(0, "tokens", range(4, 4)).numbers) == 0


def test_opening_reads_no_shard(opened, monkeypatch):
    monkeypatch.delattr(os, "pread")
    monkeypatch.delattr(os, "preadv")
    assert store.open_store(opened.where).manifest == opened.manifest


def test_verify_reports_progress(opened):
    seen = []
    opened.verify(on_progress=seen.append)
    files = [file for shard in opened.manifest.shards for file in shard.files.values()]
    assert seen == [file.bytes for file in files]


def test_formats_cover_the_cases():
    assert {name for case in CASES for name in case[1:3]} | {"int32"} == set(FORMATS)
    assert {case[3] for case in CASES} == set(COMPRESSIONS)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_exact_rows_or_an_error_of_compressed_int8(compressed, data):
    """Any byte of any file changed, scales and all: what can still be read is what was written."""
    path, expected = compressed
    file = data.draw(st.sampled_from(sorted(f for f in path.rglob("*") if f.is_file())))
    content = file.read_bytes()
    damaged = bytearray(content)
    damaged[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(damaged)
    try:
        opened = store.open_store(path)
        for shard in opened.shards:
            try:
                rows = opened.read_shard(shard.index)
            except store.StoreError:
                continue
            assert_rows_equal(rows, expected[shard.index])
    except store.StoreError:
        pass
    finally:
        file.write_bytes(content)


@pytest.fixture(scope="module", params=["zstd", "blosc"])
def compressed(request, tmp_path_factory):
    spec = make_spec(PADDED, acts_dtype="int8", grads_dtype="int8", compression=request.param)
    opened = write_store(tmp_path_factory.mktemp("store") / "out", spec)
    shards = [opened.read_shard(shard.index) for shard in opened.shards]
    whole = tuple(torch.cat(columns) for columns in zip(*shards, strict=True))
    assert_rows_equal(whole, all_rows(spec))
    return Path(opened.where), shards
