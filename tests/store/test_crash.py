"""Killed at every named point while it writes, publishes or replaces a store: the rerun ends with
the same bytes, computes no more than was lost, and leaves nothing else behind.
"""

import json
import os
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import store
from store.crash import CRASH_POINTS, crash_point
from store.files import LocalFiles
from store.manifest import StoreSpec
from store.pull import plan_pull, pull_store
from store.remote import RemoteFiles
from store.repair import repair
from store.shard_cache import ShardCache
from store.work import commit_path, locate_files, read_commits, store_folder
from tests.remotes import local_remote
from tests.store.small_store import list_files, make_rows, make_spec, work_of, write_store

OLD, SPEC = make_spec(weights="w1"), make_spec()
FILES = len(SPEC.arrays())  # of a shard

# Those of a run that writes and publishes; repair, pull and the shard cache pass the others.
MENDING = ("before-rename:link", "after-rename:link", "before-forget", "after-forget")
PULLING = ("before-rename:pulled", "after-rename:pulled")
CACHING = ("before-rename:cached", "after-rename:cached")
WRITING = tuple(p for p in CRASH_POINTS if p not in (*MENDING, *PULLING, *CACHING))

# Passes that are let go first, so that some shards are committed by then.
LATER = {
    **{f"{step}:array": 2 * FILES + 3 for step in ("before-write", "after-write")},
    **{f"{step}:array": 3 * FILES - 1 for step in ("before-rename", "after-rename")},
    **{f"{step}:commit": 2 for step in ("before-write", "after-write")},
    **{f"{step}:commit": 3 for step in ("before-rename", "after-rename")},
    "before-commit": 4,
    "after-commit": 5,
    "before-write:zarr.json": 1,
    "between-links": 20,
}


def fill(out: Path, spec: StoreSpec) -> list[int]:
    """What a driver does, as pipeline.cache does it; returns the shards that it computed."""
    work = work_of(out, spec)
    if store.find_published(spec, out, overwrite=True):
        store.sweep_aside(work, spec, out)
        return []
    with store.lock_work(work):
        store.prepare_work(work, spec)
        store.sweep(work)
        committed = store.committed_shards(work, spec)
        missing = [shard for shard in spec.layout.shards if shard.index not in committed]
        for shard in missing:
            store.write_shard(work, spec, shard, make_rows(spec, shard), facts={"pid": os.getpid()})
        store.publish(work, spec, out, provenance={}, overwrite=True)
    return [shard.index for shard in missing]


def die_at(point: str, skip: int, run: Callable[[], object], token: Path | None = None) -> int:
    """Run in a child that dies at the point; returns the signal that ended it, 0 if none did."""
    child = os.fork()
    if child == 0:
        try:
            os.environ |= {"STORE_CRASH_POINT": point, "STORE_CRASH_SKIP": str(skip)}
            if token is not None:
                os.environ["STORE_CRASH_TOKEN"] = str(token)
            run()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def stamp(files) -> dict[Path, tuple[int, int]]:
    return {file: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return list_files(Path(write_store(folder / "out", SPEC).where))


@pytest.fixture(scope="module")
def replaced(tmp_path_factory):
    """A store of other weights at the place where the new one is to be."""
    folder = tmp_path_factory.mktemp("replaced")
    write_store(folder / "out", OLD)
    return folder


@pytest.fixture
def passed(monkeypatch):
    """The points that were passed."""
    points = set()
    for module in ("disk", "work", "publication"):
        monkeypatch.setattr(f"store.{module}.crash_point", points.add)
    return points


def test_a_run_passes_every_point_of_writing_and_no_other(tmp_path, replaced, passed):
    shutil.copytree(replaced, tmp_path / "stores")
    fill(tmp_path / "stores/out", SPEC)
    assert passed == set(WRITING)


def test_every_other_point_is_passed_by_those_who_copy(tmp_path, undisturbed, passed):
    lay_out(undisturbed, tmp_path / "good")
    good = LocalFiles(tmp_path / "good")
    pull_store(good, tmp_path / "out", plan_pull(good))
    assert {point for point in passed if point not in WRITING} == set(PULLING)
    passed.clear()
    (tmp_path / "out/loss/c/1").unlink()
    repair(tmp_path / "out", source=good)
    repair(tmp_path / "out", work=tmp_path / "work")  # nothing to do
    (tmp_path / "out/loss/c/1").unlink()
    repair(tmp_path / "out", work=tmp_path / "other")
    assert {point for point in passed if point not in WRITING} == set(MENDING)
    passed.clear()
    cache = ShardCache(tmp_path / "cache", 10**6)
    remote = RemoteFiles(local_remote(tmp_path / "good"), cache=cache)
    store.open_store(remote).read_column(0, "tokens")
    assert passed == set(CACHING)


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("point", MENDING)
def test_repair_killed_at(point, skip, tmp_path, undisturbed):
    """Files are bad in two shards, of which one can be had elsewhere: the other is recomputed."""
    lay_out(undisturbed, tmp_path / "good")
    lay_out(undisturbed, tmp_path / "out")
    for path in ("tokens/c/1", "loss/c/1", "loss/c/3"):
        (tmp_path / "out" / path).write_bytes(b"bad")
    (tmp_path / "good/loss/c/3").unlink()
    source = LocalFiles(tmp_path / "good")
    died = die_at(point, skip, lambda: repair(tmp_path / "out", source=source))
    assert died == signal.SIGKILL
    repair(tmp_path / "out", source=source)
    assert fill(tmp_path / "out", SPEC) == [3]
    found = list_files(tmp_path / "out")
    assert {path for path in found if found[path] != undisturbed[path]} <= {"provenance.json"}
    assert found.keys() == undisturbed.keys()


def lay_out(files: dict[str, bytes], folder: Path) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


CASES = [(point, 0) for point in WRITING] + list(LATER.items())


@pytest.mark.parametrize(("point", "skip"), CASES, ids=[f"{p}+{n}" for p, n in CASES])
def test_killed_at(point, skip, tmp_path, replaced, undisturbed):
    out = shutil.copytree(replaced, tmp_path / "stores") / "out"
    work = work_of(out, SPEC)
    assert die_at(point, skip, lambda: fill(out, SPEC)) == signal.SIGKILL

    aside = out.with_name(f".out.{SPEC.fingerprint[:16]}.old")
    assert out.exists() is (point != "between-renames")
    store.open_store(out if out.exists() else aside).verify()  # never half a store in public
    commits = read_commits(work, SPEC)
    kept = stamp(
        [
            *(file for commit in commits.values() for file in locate_files(work, commit.record)),
            *(commit_path(work, shard) for shard in commits),
        ]
    )
    assert not skip or commits or point.endswith("zarr.json")
    computed = fill(out, SPEC)
    assert computed == [s.index for s in SPEC.layout.shards if s.index not in commits]
    assert stamp(kept) == kept
    found = list_files(out)
    assert found.pop("provenance.json")
    expected = {path: data for path, data in undisturbed.items() if path != "provenance.json"}
    assert found == expected

    assert fill(out, SPEC) == []  # a whole store, of which a second run sweeps what is beside it
    assert sorted(path.name for path in out.parent.iterdir()) == [".work", "out"]
    assert list((work / "scratch").iterdir()) == []
    assert list_files(store_folder(work)).keys() == undisturbed.keys()


def test_skip_and_token(tmp_path):
    token = tmp_path / "token"

    def pass_five_times():
        for _ in range(5):
            crash_point("before-link")

    assert die_at("after-link", 0, pass_five_times) == 0
    assert die_at("before-link", 5, pass_five_times) == 0
    assert die_at("before-link", 4, pass_five_times) == signal.SIGKILL
    assert die_at("before-link", 0, pass_five_times, token) == 0
    token.touch()
    assert die_at("before-link", 0, pass_five_times, token) == signal.SIGKILL
    assert not token.exists()
    assert die_at("before-link", 0, pass_five_times, token) == 0


def test_provenance_tells_who_computed_what(tmp_path):
    """The shards of the killed process keep its facts."""
    out = tmp_path / "out"
    assert die_at("before-commit", 2, lambda: fill(out, SPEC)) == signal.SIGKILL
    fill(out, SPEC)
    shards = json.loads((out / "provenance.json").read_text())["shards"]
    mine = [shard["index"] for shard in shards if shard["pid"] == os.getpid()]
    assert mine == [2, 3, 4, 5]
