"""What is kept of a remote store: damaged copies come anew, and files before they are needed."""

import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import store
from store.files import LocalFiles
from store.manifest import FileRecord
from store.reader import list_files
from store.remote import RemoteFiles, open_remote
from store.shard_cache import ShardCache
from store.verify import verify_full
from tests.remotes import HANG_S, local_remote
from tests.store.published import ACTS, FAST, HOOKS
from tests.store.remote_reads import open_url, read_all


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", 10**6)


def test_a_damaged_cached_copy_is_dropped_and_fetched_anew(server, cache, spec):
    opened = open_url(f"{server.url}/small", cache)
    read_all(opened, spec)
    sha256 = opened.manifest.shards[0].files[f"{HOOKS[1]}/acts"].sha256
    copy = cache.root / sha256[:2] / sha256
    content = bytearray(copy.read_bytes())
    content[3] ^= 1
    copy.write_bytes(content)
    with pytest.raises(store.ShardCorrupt, match="copy in the shard cache, now removed"):
        opened.read_slots(0, 0, 4, HOOKS[1])
    read_all(opened, spec)
    copy.write_bytes(content[:-1])
    read_all(opened, spec)


def break_folder(cache: ShardCache, sha256: str) -> None:
    """A file where the cache wants to make a folder."""
    cache.root.mkdir()
    (cache.root / sha256[:2]).write_text("")


def break_partials(cache: ShardCache, sha256: str) -> None:  # noqa: ARG001
    cache.root.mkdir()
    (cache.root / "partial").write_text("")


def break_locks(cache: ShardCache, sha256: str) -> None:  # noqa: ARG001
    cache.root.mkdir()
    (cache.root / "locks").write_text("")


@pytest.mark.parametrize("break_cache", [break_folder, break_partials, break_locks])
def test_trouble_with_the_cache_is_not_the_remotes(server, cache, break_cache):
    opened = open_url(f"{server.url}/small", cache)
    break_cache(cache, opened.manifest.shards[0].files["tokens"].sha256)
    with pytest.raises(store.StoreError, match=r"shard cache at .*GSAE_SHARD_CACHE") as raised:
        opened.read_column(0, "tokens")
    assert type(raised.value) is store.StoreError
    assert server.counts["small/tokens/c/0"] <= 1  # not tried again


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cache_that_is_deleted_during_a_download_is_named(folder, cache, when):
    """Not: the remote has no such file."""

    def download(system: object, address: str, partial: Path, file: FileRecord) -> None:  # noqa: ARG001
        if when == "before":
            shutil.rmtree(cache.root)
        shutil.copyfile(address, partial)
        assert file.bytes == partial.stat().st_size
        shutil.rmtree(cache.root)

    files = RemoteFiles(local_remote(folder / "small")._replace(download=download), cache=cache)
    with pytest.raises(store.StoreError, match="shard cache at") as raised:
        store.open_store(files).read_column(0, "tokens")
    assert type(raised.value) is store.StoreError


def test_verify_blames_the_cache_for_a_bad_copy(server, cache, spec):
    opened = open_url(f"{server.url}/small", cache)
    read_all(opened, spec)
    sha256 = opened.manifest.shards[0].files[f"{HOOKS[1]}/acts"].sha256
    copy = cache.root / sha256[:2] / sha256
    copy.write_bytes(bytes(copy.stat().st_size))
    assert verify_full(opened.files) == []
    assert server.counts[f"small/{ACTS}"] == 2
    server.faults[f"small/{ACTS}"] = itertools.repeat("wrong")
    copy.unlink()
    assert [(file.path, file.problem) for file in verify_full(opened.files)] == [
        (ACTS, "other content")
    ]


def list_shard(opened: store.ActivationStore, shard: int) -> list:
    files = list_files(opened, HOOKS[1])
    return [(file.path, file.record) for file in files if file.shard == shard]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def count_shard_files(server) -> int:
    return sum("/c/" in path for path in server.counts)


def test_prefetching_brings_files_before_they_are_opened(server, cache, spec):
    opened = open_url(f"{server.url}/small", cache)
    wanted = list_shard(opened, 0)
    opened.files.prefetch(wanted)
    wait_until(lambda: len(list(cache.root.glob("??/*"))) == len(wanted))
    read_all(opened, spec)
    assert max(server.counts.values()) == 1


def test_prefetching_stops_at_half_the_cache_until_files_are_opened(server, tmp_path, spec):
    files = open_remote(f"{server.url}/small", retry=FAST)
    assert isinstance(files, RemoteFiles)
    opened = store.open_store(files)
    wanted = list_shard(opened, 0) + list_shard(opened, 1)
    first = sum(record.bytes for _, record in wanted[:3])
    files.cache = ShardCache(tmp_path / "cache", 2 * first)
    files.prefetch(wanted)
    wait_until(lambda: len(list(files.cache.root.glob("??/*"))) >= 3)
    time.sleep(0.1)
    assert count_shard_files(server) == 3
    with files.open(*wanted[0]):
        pass
    wait_until(lambda: count_shard_files(server) == 4)
    files.cache = ShardCache(tmp_path / "cache", 10**6)
    read_all(opened, spec)


def test_what_an_abandoned_stream_asked_for_does_not_hold_up_the_next(server, tmp_path):
    opened = store.open_store(open_remote(f"{server.url}/small", retry=FAST))
    files = opened.files
    assert isinstance(files, RemoteFiles)
    first = list_shard(opened, 0)
    files.cache = ShardCache(tmp_path / "cache", 2 * sum(record.bytes for _, record in first))
    assert files.room_bytes == files.cache.limit_bytes
    files.prefetch(first + list_shard(opened, 1))  # room for the first shard, and never opened
    wait_until(lambda: count_shard_files(server) == len(first))
    files.cancel_prefetch()
    wanted = list_shard(opened, 2)[:1]
    files.prefetch(wanted)
    wait_until(lambda: server.counts[f"small/{wanted[0][0]}"] == 1)
    wait_until(lambda: not files._running)
    assert count_shard_files(server) == len(first) + 1  # nor does it still wait
    assert LocalFiles(tmp_path).room_bytes is None


def test_what_goes_wrong_in_the_background_is_raised_by_opening(server, cache):
    opened = open_url(f"{server.url}/small", cache)
    server.faults[f"small/{ACTS}"] = itertools.repeat(403)
    opened.files.prefetch(list_shard(opened, 0))
    wait_until(lambda: count_shard_files(server) == 6)
    with pytest.raises(store.AccessDenied):
        opened.read_slots(0, 0, 4, HOOKS[1])


def test_a_program_ends_while_files_are_prefetched(server, tmp_path):
    """The server hangs for much longer than that may take."""
    code = (
        "import sys, store, time; from store.reader import list_files; "
        "opened = store.open_store(sys.argv[1]); "
        "opened.files.prefetch([(f.path, f.record) for f in list_files(opened)]); time.sleep(0.3)"
    )
    opened = store.open_store(f"{server.url}/small")
    for file in list_files(opened):
        server.faults[f"small/{file.path}"] = itertools.repeat("hang")
    done = subprocess.run(
        [sys.executable, "-c", code, f"{server.url}/small"],
        env=os.environ | {"GSAE_SHARD_CACHE": str(tmp_path / "cache")},
        cwd=Path(store.__file__).parents[1],
        capture_output=True, text=True, check=False, timeout=HANG_S,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list((tmp_path / "cache/partial").iterdir())
    assert not list((tmp_path / "cache").glob("??/*"))


def test_eviction_while_reading_never_yields_other_rows(server, tmp_path, spec):
    """The cache holds two files, a read of a shard takes six."""
    files = open_remote(f"{server.url}/small", retry=FAST)
    assert isinstance(files, RemoteFiles)
    opened = store.open_store(files)
    largest = max(record.bytes for _, record in list_shard(opened, 0))
    files.cache = ShardCache(tmp_path / "tiny", 2 * largest)
    files.prefetch(list_shard(opened, 0))
    read_all(opened, spec)
    held = sum(path.stat().st_size for path in files.cache.root.glob("??/*"))
    assert held <= 2 * largest
