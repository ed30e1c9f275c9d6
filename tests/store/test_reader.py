"""Reading: exactly what was written, by our reader, by zarr-python and by TensorStore."""

import os
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import zarr

import store
from store.layout import permute_rows
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

FORMAT_PAIRS = [("float32", "float16"), ("float16", "bfloat16"), ("bfloat16", "float32")]
CASES = [(lengths, *pair) for lengths in (PACKED, PADDED) for pair in FORMAT_PAIRS]


@pytest.fixture(scope="module", params=CASES, ids=lambda c: f"{c[0].sum()}-{c[1]}-{c[2]}")
def opened(request, tmp_path_factory):
    lengths, acts_dtype, grads_dtype = request.param
    spec = make_spec(lengths, acts_dtype=acts_dtype, grads_dtype=grads_dtype)
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


@pytest.mark.parametrize("read", [read_with_zarr, read_with_tensorstore])
def test_other_readers_see_the_same(opened, read):
    """Un-permuted by the documented rule, they are what was written; padding is the fill value."""
    spec, written = opened.spec, all_rows(opened.spec)
    names = {"acts": f"{HOOK}/acts", "grads": f"{HOOK}/grads"}
    for field, expected in zip(store.Rows._fields, written, strict=True):
        array = spec.arrays()[names.get(field, field)]
        stored = read(Path(opened.where), array.path)
        assert stored.shape == (spec.layout.n_slots, *array.row_shape)
        assert stored.dtype == array.numbers.disk
        rows, padding = [], []
        for shard in opened.shards:
            first = shard.index * spec.layout.rows_per_shard
            slots = stored[first : first + spec.layout.rows_per_shard]
            order = permute_rows(spec.seed, shard.index, shard.n_rows)
            unpermuted = np.empty_like(slots[: shard.n_rows])
            unpermuted[order] = slots[: shard.n_rows]
            rows.append(unpermuted)
            padding.append(slots[shard.n_rows :])
        assert torch.equal(decode_numbers(Stored(np.concatenate(rows)), array.numbers), expected)
        fill = np.full((), array.numbers.fill, array.numbers.disk)
        assert np.array_equal(
            np.concatenate(padding), np.broadcast_to(fill, np.concatenate(padding).shape),
            equal_nan=array.numbers.disk.kind == "f",
        )  # fmt: skip


def test_zarr_sees_dimensions_and_attributes(opened):
    root = zarr.open_group(opened.where, mode="r")
    assert root.attrs["fingerprint"] == opened.manifest.fingerprint
    assert root[f"{HOOK}/acts"].metadata.dimension_names == ("slot", "channel")
    assert root[f"{HOOK}/acts"].attrs["number_format"] == opened.manifest.acts_dtype
    assert root["loss"].metadata.dimension_names == ("slot",)


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
    shard, rows_per_chunk = 0, opened.manifest.rows_per_chunk
    n_rows = opened.shards[shard].n_rows
    reads = []
    pread = os.pread

    def spy(file, length, offset):
        reads.append((os.readlink(f"/proc/self/fd/{file}"), offset, length))
        return pread(file, length, offset)

    monkeypatch.setattr(os, "pread", spy)
    opened.read_slots(shard, rows_per_chunk + 1, min(rows_per_chunk + 3, n_rows))
    chunk_bytes = {
        str(Path(opened.where) / store.manifest.locate_shard(array.path, shard)): (
            opened.spec.shard_format(array).chunk_bytes + 4
        )
        for array in opened.spec.arrays().values()
    }
    data = [(path, offset) for path, offset, length in reads if length == chunk_bytes[path]]
    assert sorted(data) == sorted(chunk_bytes.items())  # the second chunk starts after one chunk
    assert len(reads) == 2 * len(data)  # and the index of each file


def test_opening_reads_no_shard(opened, monkeypatch):
    monkeypatch.delattr(os, "pread")
    assert store.open_store(opened.where).manifest == opened.manifest


def test_verify_reports_progress(opened):
    seen = []
    opened.verify(on_progress=seen.append)
    files = [file for shard in opened.manifest.shards for file in shard.files.values()]
    assert seen == [file.bytes for file in files]


def test_formats_cover_the_cases():
    assert {name for case in CASES for name in case[1:]} | {"int32"} == set(FORMATS)
