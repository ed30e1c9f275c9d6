"""Publishing, adopting again, refusing and replacing."""

import json
import shutil
from pathlib import Path

import pytest

import store
from store.errors import ManifestError, ShardCorrupt, ShardMissing, StoreMismatch
from tests.store.small_store import (
    HOOK,
    all_rows,
    assert_rows_equal,
    list_files,
    make_rows,
    make_spec,
    work_of,
    write_store,
)

SPEC = make_spec()


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return Path(write_store(tmp_path_factory.mktemp("pristine") / "out", SPEC).where).parent


@pytest.fixture
def out(pristine, tmp_path):
    """A published store with its work folder; copied, so not linked to each other."""
    return shutil.copytree(pristine, tmp_path / "stores") / "out"


def publish(out, spec=SPEC, **options):
    return store.publish(work_of(out, spec), spec, out, provenance={"time": "second"}, **options)


def count_leftovers(out):
    return [path.name for path in out.parent.iterdir() if path.name not in (out.name, ".work")]


def test_published_store_is_linked_to_the_work_folder(tmp_path):
    out = Path(write_store(tmp_path / "out", SPEC).where)
    work = work_of(out, SPEC)
    for path in list_files(out):
        assert (out / path).stat().st_ino == (work / "store" / path).stat().st_ino
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["time"] == "now"
    assert provenance["shards"][1] == {"index": 1, "pid": 1}
    assert count_leftovers(out) == []


def test_same_store_returns_at_once(out, monkeypatch):
    shutil.rmtree(work_of(out, SPEC))  # not even needed
    monkeypatch.setattr("store.publication.find_damage", None)
    assert publish(out) == store.open_store(out).manifest


def test_removed_store_is_adopted_with_every_byte(out):
    before = list_files(out)
    shutil.rmtree(out)
    publish(out)
    assert list_files(out) == before


@pytest.mark.parametrize("damage", ["file", "metadata"])
def test_damaged_store_is_made_again(out, damage):
    before = list_files(out)
    (out / ("tokens/c/1" if damage == "file" else "loss/zarr.json")).unlink()
    publish(out)
    assert list_files(out) == before
    assert count_leftovers(out) == []


def test_flipped_bit_in_the_work_folder_is_found_before_publishing(out):
    file = work_of(out, SPEC) / f"store/{HOOK}/grads/c/2/0"
    content = bytearray(file.read_bytes())
    content[11] ^= 4
    file.write_bytes(content)
    shutil.rmtree(out)
    with pytest.raises(ShardCorrupt, match=f"{HOOK}/grads/c/2/0.*pipeline cache"):
        publish(out)
    assert not out.exists()
    assert 2 not in store.committed_shards(work_of(out, SPEC), SPEC)
    shard = SPEC.layout.shards[2]
    store.write_shard(work_of(out, SPEC), SPEC, shard, make_rows(SPEC, shard))
    publish(out)
    store.open_store(out).verify()


def test_missing_shards(tmp_path):
    work = tmp_path / "work"
    store.prepare_work(work, SPEC)
    shard = SPEC.layout.shards[0]
    store.write_shard(work, SPEC, shard, make_rows(SPEC, shard))
    with pytest.raises(ShardMissing, match=r"expected 6 committed, got 5 missing \(the first is 1"):
        store.publish(work, SPEC, tmp_path / "out", provenance={})
    assert not (tmp_path / "out").exists()


def test_another_store_is_refused_or_replaced(out):
    other = make_spec(weights="w1", seed=4)
    before = list_files(out)
    with pytest.raises(StoreMismatch, match=r"seed: expected 4, got 3; weights: expected 'w1'"):
        write_store(out, other)
    with pytest.raises(StoreMismatch, match="weights"):
        store.find_published(other, out)
    assert list_files(out) == before
    publish(out, other, overwrite=True)
    assert store.open_store(out).manifest.fingerprint == other.fingerprint
    assert count_leftovers(out) == []
    with pytest.raises(StoreMismatch):
        publish(out)
    publish(out, overwrite=True)  # and back, from its own work folder
    assert list_files(out) == before


def test_replacing_goes_on_where_it_was_killed(out):
    """Between the two renames there is no `out`, but both stores are there under hidden names."""
    other = make_spec(weights="w1")
    aside = out.with_name(f".out.{other.fingerprint[:16]}.old")
    out.rename(aside)
    half = out.with_name(f".out.{other.fingerprint[:16]}.new")
    half.mkdir()
    (half / "manifest.json").write_text("half")
    (half / "stray").touch()
    assert write_store(out, other).manifest.fingerprint == other.fingerprint
    assert not (out / "stray").exists()
    assert count_leftovers(out) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_store_is_never_replaced(tmp_path, overwrite):
    out = tmp_path / "out"
    shutil.rmtree(write_store(out, SPEC).where)
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    with pytest.raises(StoreMismatch, match=f"output at {out}"):
        publish(out, overwrite=overwrite)
    assert (out / "thesis.tex").read_text() == "precious"
    (out / "thesis.tex").unlink()
    publish(out)  # an empty folder is nothing
    found = store.open_store(out).read_block(20)
    expected = all_rows(SPEC)
    assert_rows_equal(found, store.Rows(*(column[160:] for column in expected)))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_place_inside_a_store_is_refused(out, overwrite):
    with pytest.raises(StoreMismatch, match=f"in the store at {out}. Choose another --out"):
        store.find_published(SPEC, out / "deep/inside", overwrite=overwrite)


def test_unreadable_store_of_others(out):
    manifest = out / "manifest.json"
    content = manifest.read_bytes()
    manifest.unlink()  # a link: the work folder's stays
    manifest.write_bytes(content.replace(SPEC.fingerprint.encode(), b"0" * 64))
    with pytest.raises(ManifestError):
        publish(out)
    publish(out, overwrite=True)
    assert manifest.read_bytes() == content
