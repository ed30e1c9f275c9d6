"""Fault 8: pickles that would run code in the place of a store's files. Nothing is unpickled."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import store
from store.files import LocalFiles
from store.pull import plan_pull, pull_store
from store.repair import repair
from store.verify import verify_full, verify_quick
from store.work import commit_path
from tests.store.small_store import (
    HOOK,
    PADDED,
    all_rows,
    assert_rows_equal,
    list_files,
    make_spec,
    work_of,
    write_store,
)

SPEC = make_spec(PADDED)
# Which error opening, or else reading, raises.
OPENING = {
    "manifest.json": store.ManifestError,
    "zarr.json": store.ManifestError,
    f"{HOOK}/acts/zarr.json": store.ManifestError,
    "tokens/c/2": store.ShardCorrupt,
    f"{HOOK}/acts/c/1/0": store.ShardCorrupt,
}
PROTOCOLS = [0, 5]  # text and bytes


class Bomb:
    """Leaves a file behind wherever it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.trace,))


@pytest.fixture(params=PROTOCOLS)
def bomb(request, tmp_path):
    """A pickle; fails if anything unpickled it."""
    trace = tmp_path / "trace"
    yield pickle.dumps(Bomb(trace), protocol=request.param)
    assert not trace.exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_bomb_goes_off(tmp_path, protocol):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "trace"), protocol=protocol))
    assert (tmp_path / "trace").exists()


def offer(file: Path, bomb: bytes, whole: bool) -> None:
    """In the place of a file; as long as it, where that is wanted."""
    size = file.stat().st_size
    file.unlink()  # it may have other names
    file.write_bytes(bomb.ljust(size, b"\0") if whole else bomb)


def join(shards: list[store.Rows]) -> store.Rows:
    return store.Rows(*(torch.cat(columns) for columns in zip(*shards, strict=True)))


def read(path: Path) -> list[store.Rows]:
    opened = store.open_store(path)
    return [opened.read_shard(shard.index) for shard in opened.shards]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", OPENING)
def test_8_a_pickle_in_a_store_is_refused_unread(tmp_path, bomb, name, whole):
    out = tmp_path / "out"
    write_store(out, SPEC)
    offer(out / name, bomb, whole)
    with pytest.raises(OPENING[name]) as caught:
        read(out)
    assert len(str(caught.value).splitlines()) == 1
    assert f"pipeline store repair {out}" in str(caught.value)
    for check in (verify_quick, verify_full):
        if name == "manifest.json":
            with pytest.raises(store.ManifestError):
                check(LocalFiles(out))
        elif check is verify_full or not (whole and "/c/" in name):
            assert [file.path for file in check(LocalFiles(out))] == [name]
    with pytest.raises(store.StoreError):
        pull_store(LocalFiles(out), tmp_path / "copy", plan_pull(LocalFiles(out)))
    assert not (tmp_path / "copy/manifest.json").exists()
    assert repair(out).dropped == ()  # mended with the work folder's
    assert_rows_equal(join(read(out)), all_rows(SPEC))


def test_8_a_pickle_as_provenance_decides_nothing(tmp_path, bomb):
    out = tmp_path / "out"
    write_store(out, SPEC)
    (out / "provenance.json").write_bytes(bomb)
    assert len(read(out)) == len(SPEC.layout.shards)
    assert verify_full(LocalFiles(out)) == []
    shutil.rmtree(work_of(out, SPEC))
    (out / "tokens/c/2").write_bytes(bomb)
    assert repair(out, machine={"device": "cpu"}).dropped == (2,)  # reads who computed it


@pytest.mark.parametrize("name", ["commits/00001.json", "spec.json", "holder.json"])
def test_8_a_pickle_in_the_work_folder_is_computed_anew(tmp_path, bomb, name):
    """A shard whose commit record is a pickle does not exist; the rest is kept."""
    out = tmp_path / "out"
    write_store(out, SPEC)
    before = list_files(out)
    work = work_of(out, SPEC)
    shutil.rmtree(out)
    (work / name).write_bytes(bomb)
    committed = store.committed_shards(work, SPEC)
    assert (1 in committed) is (work / name != commit_path(work, 1))
    write_store(out, SPEC)
    assert list_files(out) == before


def test_8_a_codec_that_unpickles_is_refused(tmp_path):
    out = tmp_path / "out"
    write_store(out, SPEC)
    file = out / f"{HOOK}/acts/zarr.json"
    fields = json.loads(file.read_text())
    fields["codecs"][0]["configuration"]["codecs"].append({"name": "numcodecs.pickle"})
    file.write_text(json.dumps(fields))
    with pytest.raises(store.ManifestError, match=r"codecs in .*as in the manifest, got"):
        store.open_store(out)
