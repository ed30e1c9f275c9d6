"""Copies of stores and of parts of them: whole and verified, or not there."""

import itertools
import shutil
import signal

import pytest
from filelock import FileLock, Timeout

import store
from store.crash import CRASH_POINTS
from store.files import LocalFiles
from store.pull import Pulled, plan_pull, pull_store
from store.remote import open_remote
from tests.store.published import ACTS, FAST, HOOKS
from tests.store.small_store import list_files, make_spec, write_store
from tests.store.test_crash import die_at


def pull(url: str, out, **part) -> Pulled:
    source = open_remote(url, retry=FAST)
    return pull_store(source, out, plan_pull(source, **part))


def test_a_pulled_store_is_the_store(server, folder, tmp_path):
    pulled = pull(f"{server.url}/small", tmp_path / "copy")
    assert pulled.kept == 0
    for path in (folder / "small").rglob("*"):
        if path.is_file():
            copied = tmp_path / "copy" / path.relative_to(folder / "small")
            assert copied.read_bytes() == path.read_bytes()
    store.open_store(tmp_path / "copy").verify()
    assert not (tmp_path / ".copy.pull").exists()


def test_shards_of_one_layer_are_a_partial_store_that_can_grow(server, tmp_path, spec):
    url, out = f"{server.url}/small", tmp_path / "copy"
    first = pull(url, out, shards=(0, 2), layer=7)
    assert first.files == 2 * 6
    assert not any(HOOKS[0] in path for path in server.counts if "/c/" in path)
    opened = store.open_store(out, hook=HOOKS[1], allow_partial=True)
    assert opened.present == (0, 1)
    with pytest.raises(store.ShardMissing):
        store.open_store(out, hook=HOOKS[1])
    more = pull(url, out, shards=(0, 3), hook=HOOKS[1])
    assert (more.files, more.kept) == (6, 12)
    read = store.open_store(out, hook=HOOKS[1], allow_partial=True).read_shard(2, HOOKS[1])
    assert len(read.block) == spec.layout.shards[2].n_rows


def test_an_interrupted_pull_goes_on_and_a_damaged_file_is_replaced(server, tmp_path):
    url, out = f"{server.url}/small", tmp_path / "copy"
    server.faults[f"small/{ACTS}"] = itertools.repeat("wrong")
    with pytest.raises(store.ShardCorrupt, match="sha256"):
        pull(url, out)
    assert not (out / ACTS).exists()
    assert not (out / "manifest.json").exists()
    server.faults.clear()
    there = [path for path in out.rglob("c/*") if path.is_file()]
    there[0].write_bytes(b"x" * there[0].stat().st_size)
    pulled = pull(url, out)
    assert pulled.kept >= len(there) - 1 > 0
    store.open_store(out).verify()


def test_a_pull_never_mixes_stores(server, tmp_path):
    write_store(tmp_path / "other", make_spec(hooks=HOOKS, weights="w1"))
    for name, content in (("other", None), ("notes", "mine")):
        out = tmp_path / name
        if content:
            out.mkdir()
            (out / "notes.txt").write_text(content)
        before = sorted(out.rglob("*"))
        with pytest.raises(store.StoreMismatch, match="Choose another --out"):
            pull(f"{server.url}/small", out)
        assert sorted(out.rglob("*")) == before


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A store of the same shape and other bytes."""
    return write_store(
        tmp_path_factory.mktemp("other") / "other", make_spec(hooks=HOOKS, weights="w1", seed=4)
    ).files


POINTS = [point for point in CRASH_POINTS if point.endswith((":file", ":pulled"))]


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at(point, skip, folder, other, tmp_path):
    source, out = LocalFiles(folder / "small"), tmp_path / "copy"
    died = die_at(point, skip, lambda: pull_store(source, out, plan_pull(source)))
    assert died == signal.SIGKILL
    assert not (out / "manifest.json").exists()
    before = list_files(out)
    if before:  # of which nobody could tell the shards of two stores
        with pytest.raises(store.StoreMismatch, match="another or an unknown store"):
            pull_store(other, out, plan_pull(other, shards=(0, 2)))
        assert list_files(out) == before
    pulled = pull_store(source, out, plan_pull(source))
    assert pulled.kept == sum("/c/" in path for path in before)
    assert list_files(out) == list_files(folder / "small")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_files_without_a_manifest_are_not_taken_for_ours(folder, other, tmp_path):
    source, out = LocalFiles(folder / "small"), tmp_path / "copy"
    pull_store(source, out, plan_pull(source))
    (out / "manifest.json").unlink()
    for files in (source, other):
        with pytest.raises(store.StoreMismatch, match=r"pipeline store repair .* --from"):
            pull_store(files, out, plan_pull(files, shards=(0, 2)))
    shutil.rmtree(out)
    pull_store(other, out, plan_pull(other))
    store.open_store(out).verify()


def test_an_unfinished_pull_that_was_deleted_stops_nobody(folder, other, tmp_path):
    source, out = LocalFiles(folder / "small"), tmp_path / "copy"
    die_at("before-rename:pulled", 3, lambda: pull_store(source, out, plan_pull(source)))
    shutil.rmtree(out)
    pull_store(other, out, plan_pull(other))
    assert list_files(out) == list_files(other.folder)


def test_a_folder_in_a_files_place_is_replaced(folder, tmp_path):
    source, out = LocalFiles(folder / "small"), tmp_path / "copy"
    pull_store(source, out, plan_pull(source))
    for path in (ACTS, "zarr.json", "provenance.json"):
        (out / path).unlink()
        (out / path / "more").mkdir(parents=True)
    pull_store(source, out, plan_pull(source))
    assert list_files(out) == list_files(folder / "small")


def test_a_folder_in_a_files_place_at_the_source_is_named(folder, tmp_path):
    source = LocalFiles(shutil.copytree(folder / "small", tmp_path / "source"))
    for path in (ACTS, "provenance.json"):
        (source.folder / path).unlink()
        (source.folder / path).mkdir()
    with pytest.raises(store.ShardMissing, match=ACTS):
        pull_store(source, tmp_path / "copy", plan_pull(source))
    pull_store(source, tmp_path / "part", plan_pull(source, shards=(1, 2)))
    assert not (tmp_path / "part/provenance.json").exists()


def test_the_scratch_folder_goes_while_the_lock_is_held(folder, tmp_path, monkeypatch):
    """Another pull could have made it its own by then."""
    held = []
    remove, source, out = shutil.rmtree, LocalFiles(folder / "small"), tmp_path / "copy"

    def watch(path, **options):
        with pytest.raises(Timeout):
            FileLock(path / "lock", timeout=0).acquire()
        held.append(path)
        remove(path, **options)

    monkeypatch.setattr("store.pull.shutil.rmtree", watch)
    pull_store(source, out, plan_pull(source))
    assert held == [tmp_path / ".copy.pull"]


def test_a_copy_is_not_made_inside_a_store(folder, tmp_path):
    source = LocalFiles(folder / "small")
    pull_store(source, tmp_path / "copy", plan_pull(source, layer=7))
    before = list_files(tmp_path)
    with pytest.raises(store.StoreMismatch, match=f"one in the store at {tmp_path}/copy. Choose"):
        pull_store(source, tmp_path / "copy/deep/mine", plan_pull(source))
    assert list_files(tmp_path) == before


def test_what_a_killed_pull_left_makes_room(folder, tmp_path, monkeypatch):
    source, out = LocalFiles(folder / "small"), tmp_path / "copy"
    die_at("before-rename:pulled", 0, lambda: pull_store(source, out, plan_pull(source)))
    scratch = tmp_path / ".copy.pull"
    assert len(list(scratch.iterdir())) > 2
    left = []
    monkeypatch.setattr("store.pull.check_room", lambda *_: left.extend(scratch.iterdir()))
    pull_store(source, out, plan_pull(source))
    assert sorted(path.name for path in left) == ["lock", "source"]


def test_no_store_to_pull(server, tmp_path):
    with pytest.raises(store.StoreNotFound, match="Correct the URL"):
        plan_pull(open_remote(f"{server.url}/none", retry=FAST))
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(store.ManifestError, match="got a folder"):
        plan_pull(LocalFiles(tmp_path))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"shards": (0, 99)}, r"expected a range in 0:\d+, got 0:99"),
        ({"shards": (2, 2)}, "got 2:2"),
        ({"layer": 3}, "expected one of"),
        ({"hook": "blocks.7"}, "expected one of"),
    ],
)
def test_a_part_that_is_not_there_is_refused(folder, part, message):
    with pytest.raises(store.StoreError, match=message):
        plan_pull(LocalFiles(folder / "small"), **part)
