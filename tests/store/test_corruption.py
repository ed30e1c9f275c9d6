"""Exact bytes or an error: every damage, every way to read."""

import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import store
from store.errors import ManifestError, ShardCorrupt, ShardMissing, StoreError, StoreNotFound
from store.manifest import locate_shard
from tests.store.small_store import (
    HOOK,
    PADDED,
    all_rows,
    assert_rows_equal,
    make_spec,
    write_store,
)

SPEC = make_spec(PADDED)
EXPECTED = all_rows(SPEC)
ACTS, TOKENS = f"{HOOK}/acts/c/1/0", "tokens/c/1"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return Path(write_store(tmp_path_factory.mktemp("pristine") / "out", SPEC).where)


@pytest.fixture
def path(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "out")


# The cross product: every damage to every file of shard 1, and every way to read. Shard 1 has the
# rows of blocks 4 to 7, sixteen in its first chunk and one in its second.

SPECS = {
    "float16 and bfloat16": SPEC,
    "int8 and float32, zstd": make_spec(
        PADDED, acts_dtype="int8", grads_dtype="float32", compression="zstd"
    ),
    "bfloat16 and int8, blosc": make_spec(
        PADDED, acts_dtype="bfloat16", grads_dtype="int8", compression="blosc"
    ),
}
N_ROWS = SPEC.layout.shards[1].n_rows
ROW_OF_SLOT = store.permute_rows(SPEC.seed, 1, N_ROWS)
LAST_ROW = int(ROW_OF_SLOT[N_ROWS - 1])  # alone in its chunk
BLOCK_OF_ROW = [block for block in range(4, 8) for _ in range(PADDED[block])]
FIRST, LAST, BOTH = {0}, {1}, {0, 1}  # chunks


def find_chunks(block):
    """Chunks with rows of a block of shard 1."""
    slots = [slot for slot in range(N_ROWS) if BLOCK_OF_ROW[ROW_OF_SLOT[slot]] == block]
    return {slot // SPEC.layout.rows_per_chunk for slot in slots}


class Read(NamedTuple):
    call: Callable[[store.ActivationStore], object]
    chunks: set[int]  # that it needs of every array
    columns: dict[str, set[int]] | None = None  # but for these


def read_block(block):
    call = partial(store.ActivationStore.read_block, block=block)
    return Read(call, find_chunks(block), {"block": BOTH, "position": find_chunks(block)})


def read_token(row):
    block, position = BLOCK_OF_ROW[row], row - BLOCK_OF_ROW.index(BLOCK_OF_ROW[row])
    call = partial(store.ActivationStore.read_token, block=block, position=position)
    chunk = int(np.flatnonzero(row == ROW_OF_SLOT)[0]) // SPEC.layout.rows_per_chunk
    return Read(call, {chunk}, {"block": BOTH, "position": find_chunks(block)})


def stream(opened):
    plan = store.plan_stream(opened, hook=HOOK, batch_size=13, epochs=1, seed=0, window=2)
    assert plan.n_batches * 13 == opened.n_rows  # none is left over
    return list(store.stream_batches(opened, plan))


READS = {
    "slots, all": Read(lambda opened: opened.read_slots(1, 0, N_ROWS), BOTH),
    "slots, three of a chunk": Read(lambda opened: opened.read_slots(1, 2, 5), FIRST),
    "slots, one of the other": Read(lambda opened: opened.read_slots(1, 16, 17), LAST),
    "shard": Read(lambda opened: opened.read_shard(1), BOTH),
    "another shard": Read(lambda opened: opened.read_shard(4), set()),
    "stream": Read(stream, BOTH),
    "verify": Read(lambda opened: opened.verify(), BOTH),
    "token of the first chunk": read_token(int(ROW_OF_SLOT[0])),
    "token of the last chunk": read_token(LAST_ROW),
    "block in both chunks": read_block(4),
    "block in one chunk": read_block(7),
    **{
        f"column {name}": Read(
            partial(store.ActivationStore.read_column, shard=1, name=name), set(), {name: BOTH}
        )
        for name in ("tokens", "loss", "block", "position")
    },
}


class Damage(NamedTuple):
    do: Callable[[Path], object]
    chunks: set[int] = BOTH  # that it makes unreadable


def rewrite(change):
    return lambda file: file.write_bytes(change(file.read_bytes()))


def flip(place):
    def change(content):
        damaged = bytearray(content)
        damaged[place(len(content))] ^= 16
        return bytes(damaged)

    return rewrite(change)


def swap(file):
    """With the same array's file of shard 0."""
    other = find_twin(file)
    mine, others = file.read_bytes(), other.read_bytes()
    assert mine != others
    file.write_bytes(others)
    other.write_bytes(mine)


def find_twin(file):
    return file.with_name("0") if file.name == "1" else file.parents[1] / "0/0"


INDEX_BYTES = 2 * 16 + 4
DAMAGES = {
    "cut to 0": Damage(rewrite(lambda _: b"")),
    "cut to half": Damage(rewrite(lambda content: content[: len(content) // 2])),
    "cut by one byte": Damage(rewrite(lambda content: content[:-1])),
    "longer": Damage(rewrite(lambda content: content + b"\0")),
    "twice": Damage(rewrite(lambda content: content + content)),
    "zero-filled": Damage(rewrite(lambda content: bytes(len(content)))),
    "first bit": Damage(flip(lambda _: 0), FIRST),
    "last bit": Damage(flip(lambda size: size - 1)),
    "bit in the index": Damage(flip(lambda size: size - 20)),
    "bit in the last chunk": Damage(flip(lambda size: size - INDEX_BYTES - 4 - 1), LAST),
    "bit in the last chunk's checksum": Damage(flip(lambda size: size - INDEX_BYTES - 2), LAST),
    "swapped": Damage(swap),
    "removed": Damage(lambda file: file.unlink()),
    "a folder": Damage(lambda file: (file.unlink(), file.mkdir())),
}


@pytest.fixture(scope="module", params=SPECS)
def whole(request, tmp_path_factory):
    """A store, and what every read returns while nothing is wrong."""
    opened = write_store(tmp_path_factory.mktemp("whole") / "out", SPECS[request.param])
    return opened, {name: read.call(opened) for name, read in READS.items()}


def list_arrays(opened):
    """All of them, but of stores that differ in acts and grads one of the others will do."""
    arrays = opened.arrays.values()
    others = set() if opened.spec == SPEC else {"loss", "block", "position"}
    return [array for array in arrays if array.path not in others]


@contextmanager
def damaged(damage, file):
    twin = find_twin(file)
    before = {path: path.read_bytes() for path in (file, twin)}
    damage.do(file)
    try:
        yield
    finally:
        if file.is_dir():
            file.rmdir()
        for path, content in before.items():
            path.write_bytes(content)


def list_tensors(result):
    """The tensors and numbers of what a read returned."""
    if isinstance(result, list | tuple):
        return [tensor for part in result for tensor in list_tensors(part)]
    return [torch.as_tensor(result)] if result is not None else []


def find_hits(read, damage, array):
    """Chunks that the read needs and the damage spoils; a shard's channel scales are one chunk."""
    needed = (read.columns or {}).get(array.path, read.chunks)
    return needed if array.per == "shard" else needed & damage.chunks


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_read_is_exact_or_raises(whole, damage):
    """Opened before the damage: reads must find out by themselves."""
    opened, expected = whole
    for array in list_arrays(opened):
        file = Path(opened.where) / locate_shard(array.path, 1)
        with damaged(DAMAGES[damage], file):
            for name, read in READS.items():
                case = f"{name} of {array.path}"
                if find_hits(read, DAMAGES[damage], array) or name == "verify":
                    with pytest.raises((ShardCorrupt, ShardMissing)) as caught:
                        pytest.fail(f"{case}: {read.call(opened)}")
                    assert "un `pipeline" in str(caught.value), case
                else:
                    found, wanted = list_tensors(read.call(opened)), list_tensors(expected[name])
                    assert len(found) == len(wanted), case
                    assert all(map(torch.equal, found, wanted)), case


@pytest.mark.parametrize("damage", DAMAGES)
def test_opening_or_reading_raises(whole, damage):
    """Opened after the damage."""
    opened, _ = whole
    for array in list_arrays(opened):
        file = Path(opened.where) / locate_shard(array.path, 1)
        with damaged(DAMAGES[damage], file), pytest.raises((ShardCorrupt, ShardMissing)):
            store.open_store(opened.where).read_shard(1)


@pytest.mark.parametrize("damage", ["cut to 0", "cut by one byte", "longer", "removed", "a folder"])
def test_opening_finds_wrong_sizes(path, damage):
    DAMAGES[damage].do(path / ACTS)
    with pytest.raises((ShardCorrupt, ShardMissing), match=f"{HOOK}/acts/c/1/0"):
        store.open_store(path)


def test_missing_shards_are_counted(path):
    (path / ACTS).unlink()
    (path / TOKENS).unlink()
    (path / "loss/c/4").unlink()
    with pytest.raises(ShardMissing, match="2 of 6 shards missing"):
        store.open_store(path)


def test_verify_names_every_damaged_file(path):
    opened = store.open_store(path)
    swap(path / ACTS)
    (path / "loss/c/4").unlink()
    with pytest.raises(ShardCorrupt, match="3 damaged files") as caught:
        opened.verify()
    for file in (ACTS, f"{HOOK}/acts/c/0/0", "loss/c/4"):
        assert file in str(caught.value)


def test_swapped_chunks_inside_a_file(path):
    """Each with its own right checksum, so only the manifest can tell."""
    length = SPEC.shard_format(SPEC.arrays()["tokens"]).chunk_bytes + 4
    file = next(
        path / f"tokens/c/{shard.index}" for shard in SPEC.layout.shards if shard.n_rows > 16
    )
    content = file.read_bytes()
    file.write_bytes(content[length : 2 * length] + content[:length] + content[2 * length :])
    opened = store.open_store(path)
    with pytest.raises(ShardCorrupt, match="as in the manifest"):
        opened.read_slots(int(file.name), 0, 1)


def test_manifest_removed_or_of_another_store(path):
    manifest = path / "manifest.json"
    other = Path(write_store(path.parent / "other", make_spec(PADDED, weights="w1")).where)
    shutil.copy(other / "manifest.json", manifest)
    with pytest.raises(ManifestError, match="fingerprint"):
        store.open_store(path)
    manifest.unlink()
    with pytest.raises(StoreNotFound):
        store.open_store(path)


def test_manifest_with_another_checksum_list(path):
    """Edited so that it agrees with itself: the bytes still do not agree with it."""
    from store.manifest import _checksum

    content = json.loads((path / "manifest.json").read_text())
    content["shards"][1]["files"]["tokens"]["crc32c"][0] ^= 1
    content["checksum"] = _checksum(content)
    (path / "manifest.json").write_text(json.dumps(content))
    opened = store.open_store(path)
    with pytest.raises(ShardCorrupt, match="tokens/c/1"):
        opened.read_shard(1)


@pytest.mark.parametrize("array", ["", HOOK, f"{HOOK}/acts", "tokens"])
def test_zarr_json(path, array):
    file = path / array / "zarr.json"
    content = file.read_text()
    file.write_text(content[: len(content) // 2])
    with pytest.raises(ManifestError, match=r"zarr\.json"):
        store.open_store(path)


def test_zarr_json_claiming_a_huge_shape(path):
    file = path / HOOK / "acts/zarr.json"
    content = json.loads(file.read_text())
    content["shape"][0] = 10**15
    file.write_text(json.dumps(content))
    with pytest.raises(ManifestError, match=r"shape in .* expected \[168, 5\].*1000000000000000"):
        store.open_store(path)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_exact_bytes_or_an_error(path, data):
    """Any byte of any file changed: what can still be read is what was written."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = data.draw(st.sampled_from(files))
    content = file.read_bytes()
    place = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content)
    damaged[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(damaged)
    try:
        opened = store.open_store(path)
        first = 0
        for shard in opened.shards:
            stop = first + shard.n_rows
            expected = store.Rows(*(column[first:stop] for column in EXPECTED))
            first = stop
            try:
                rows = opened.read_shard(shard.index)
            except StoreError:
                continue
            assert_rows_equal(rows, expected)
    except StoreError:
        pass
    finally:
        file.write_bytes(content)
