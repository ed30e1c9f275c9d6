"""Exact bytes or an error: every damage, every way to read."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import store
from store.errors import ManifestError, ShardCorrupt, ShardMissing, StoreError, StoreNotFound
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


def stream(opened):
    return list(store.stream_batches(opened, batch_size=16, epochs=1, seed=0, window=2))


# All of these need shard 1, whose first block is 4 and last is 7.
READS = {
    "slots": lambda opened: opened.read_slots(1, 0, opened.shards[1].n_rows),
    "shard": lambda opened: opened.read_shard(1),
    "blocks": lambda opened: [opened.read_block(block) for block in range(4, 8)],
    "tokens": lambda opened: [
        opened.read_token(block, position)
        for block in range(4, 8)
        for position in range(PADDED[block])
    ],
    "stream": stream,
    "verify": lambda opened: opened.verify(),
}


def cut(size):
    return lambda file: file.write_bytes(file.read_bytes()[: size(file.stat().st_size)])


def flip(place):
    def damage(file):
        content = bytearray(file.read_bytes())
        content[place(len(content))] ^= 16
        file.write_bytes(content)

    return damage


def swap(file):
    """With the same array's file of shard 0, which has as many chunks."""
    other = file.with_name("0") if file.name == "1" else file.parents[1] / "0/0"
    mine, others = file.read_bytes(), other.read_bytes()
    assert len(mine) == len(others)
    file.write_bytes(others)
    other.write_bytes(mine)


DAMAGES = {
    "cut to 0": cut(lambda _: 0),
    "cut to half": cut(lambda size: size // 2),
    "cut by one byte": cut(lambda size: size - 1),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "zero-filled": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "first bit": flip(lambda _: 0),
    "bit in a checksum": flip(lambda size: size - 36 - 2),
    "bit in the index": flip(lambda size: size - 20),
    "last bit": flip(lambda size: size - 1),
    "swapped": swap,
    "removed": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("file", [ACTS, TOKENS])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shard(path, file, damage):
    opened = store.open_store(path)  # before the damage: reads must find out by themselves
    DAMAGES[damage](path / file)
    for name, read in READS.items():
        with pytest.raises((StoreError, IsADirectoryError)) as caught:
            read(opened)
        assert damage == "a folder" or isinstance(caught.value, ShardCorrupt | ShardMissing), name
        assert damage == "a folder" or "pipeline cache" in str(caught.value)


@pytest.mark.parametrize("damage", ["cut to 0", "cut by one byte", "longer", "removed", "a folder"])
def test_opening_finds_wrong_sizes(path, damage):
    DAMAGES[damage](path / ACTS)
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


def test_undamaged_shards_are_still_read(path):
    opened = store.open_store(path)
    (path / ACTS).unlink()
    rows = SPEC.layout.shards[0].n_rows
    assert_rows_equal(opened.read_shard(0), store.Rows(*(column[:rows] for column in EXPECTED)))


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
