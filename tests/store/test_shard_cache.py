"""The shard cache: one download per file, a size that is kept, never other bytes."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import store
from store.download import MissingFile
from store.manifest import FileRecord
from store.shard_cache import Collected, ShardCache, find_limit, find_root
from tests.store.test_crash import die_at

KB = 1000


def make_file(seed: int, size: int = KB) -> tuple[bytes, FileRecord]:
    content = bytes((seed + i) % 256 for i in range(size))
    return content, record_of(content)


def record_of(content: bytes) -> FileRecord:
    return FileRecord(
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        crc32c=(0,),
        chunk_bytes=(),
    )


def fetch(cache: ShardCache, content: bytes, record: FileRecord) -> bytes:
    """The file through the cache; the source always has it."""
    return read(cache.open(record, lambda path: path.write_bytes(content), "there"))


def read(descriptor: int) -> bytes:
    try:
        return os.pread(descriptor, 10**6, 0)
    finally:
        os.close(descriptor)


def refuse(path: Path) -> None:
    raise AssertionError(f"downloaded {path}")


def names(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.root.glob("??/*")}


def test_a_file_is_downloaded_once_and_found_after(tmp_path):
    cache = ShardCache(tmp_path, 10 * KB)
    content, record = make_file(1)
    assert fetch(cache, content, record) == content
    assert read(cache.open(record, refuse, "there")) == content
    assert (tmp_path / record.sha256[:2] / record.sha256).read_bytes() == content
    assert not list(tmp_path.glob("partial/*"))


@pytest.mark.parametrize("wrong", [b"", b"x" * 999, b"x" * 1000, b"x" * 1001])
def test_wrong_content_never_gets_a_name(tmp_path, wrong):
    cache = ShardCache(tmp_path, 10 * KB)
    content, record = make_file(1)
    with pytest.raises(store.ShardCorrupt, match="at there: expected"):
        cache.open(record, lambda path: path.write_bytes(wrong), "there")
    assert not names(cache)
    assert not list(tmp_path.glob("partial/*"))
    assert fetch(cache, content, record) == content


def test_the_least_recently_used_make_room(tmp_path):
    cache = ShardCache(tmp_path, 3 * KB)
    files = [make_file(seed) for seed in range(4)]
    for age, (content, record) in enumerate(files[:3]):
        fetch(cache, content, record)
        os.utime(tmp_path / record.sha256[:2] / record.sha256, (age, age))
    assert fetch(cache, *files[0]) == files[0][0]  # used again, so now the newest
    assert fetch(cache, *files[3]) == files[3][0]
    assert names(cache) == {files[i][1].sha256 for i in (0, 2, 3)}


def test_a_reader_keeps_what_is_evicted_under_it(tmp_path):
    cache = ShardCache(tmp_path, KB)
    first, second = make_file(1), make_file(2)
    descriptor = cache.open(first[1], lambda path: path.write_bytes(first[0]), "there")
    assert fetch(cache, *second) == second[0]
    assert names(cache) == {second[1].sha256}
    assert read(descriptor) == first[0]


def test_a_file_beyond_the_limit_is_refused_with_both_sizes(tmp_path):
    cache = ShardCache(tmp_path, KB - 1)
    with pytest.raises(store.StoreError, match=r"at least 1,000 bytes, got 999.*shard_cache_gb"):
        cache.open(make_file(1)[1], refuse, "there")


def test_a_cut_copy_is_fetched_again_and_a_changed_one_discarded(tmp_path):
    cache = ShardCache(tmp_path, 10 * KB)
    content, record = make_file(1)
    fetch(cache, content, record)
    path = tmp_path / record.sha256[:2] / record.sha256
    path.write_bytes(content[:-1])
    assert fetch(cache, content, record) == content
    descriptor = cache.open(record, refuse, "there")
    other = tmp_path / "other"
    other.write_bytes(content)
    other.rename(path)  # another process was quicker to mend it
    cache.discard(record, descriptor)
    assert path.exists()
    os.close(descriptor)
    descriptor = cache.open(record, refuse, "there")
    cache.discard(record, descriptor)
    assert not path.exists()
    os.close(descriptor)


def test_a_full_disk_is_named_with_the_bytes_needed(tmp_path):
    def fill(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(store.DiskFull, match=r"room for 1,000 bytes.*store gc"):
        ShardCache(tmp_path, 10 * KB).open(make_file(1)[1], fill, "there")
    assert not list(tmp_path.glob("partial/*"))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(store.StoreError, match=r"a folder that can be written.*GSAE_SHARD_CACHE"):
        ShardCache(tmp_path / "file" / "cache", KB).open(make_file(1)[1], refuse, "there")


def test_threads_under_a_tiny_limit_get_the_right_bytes(tmp_path):
    """Room for two of six files, four readers: constant eviction, never wrong bytes."""
    cache = ShardCache(tmp_path, 2 * KB)
    files = [make_file(seed) for seed in range(6)]
    seen: Counter = Counter()
    largest = 0

    def work(offset: int) -> None:
        nonlocal largest
        for i in range(30):
            content, record = files[(offset + i * (offset + 1)) % 6]
            seen[fetch(cache, content, record) == content] += 1
            found = list(tmp_path.glob("??/*"))
            largest = max(largest, len(found))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {True: 120}
    assert largest <= 2


CHILD = """
import sys, time
from pathlib import Path
from store.shard_cache import ShardCache
from tests.store.test_shard_cache import make_file, read

root, log, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
for seed in range(3):
    content, record = make_file(seed)
    def download(path):
        with path.open("wb") as file:
            file.write(content[:500])
            file.flush()
            with log.open("a") as lines:
                lines.write(f"{seed}\\n")
            time.sleep(pause)
            file.write(content[500:])
    assert read(ShardCache(root, 10_000).open(record, download, "there")) == content
"""


def start_child(tmp_path: Path, pause: float) -> subprocess.Popen:
    arguments = [sys.executable, "-c", CHILD, tmp_path / "cache", tmp_path / "log", str(pause)]
    return subprocess.Popen(arguments, cwd=Path(store.__file__).parents[1])


def test_two_processes_download_each_file_once(tmp_path):
    children = [start_child(tmp_path, 0.3) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert sorted((tmp_path / "log").read_text().split()) == ["0", "1", "2"]


def test_a_killed_download_leaves_nothing_that_counts(tmp_path):
    child = start_child(tmp_path, 60)
    deadline = time.monotonic() + 30
    while not (tmp_path / "log").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()
    child.wait()
    (partial,) = (tmp_path / "cache" / "partial").iterdir()
    assert partial.stat().st_size == 500
    cache = ShardCache(tmp_path / "cache", KB)
    content, record = make_file(7)
    assert fetch(cache, content, record) == content  # its room is not held for ever
    assert not partial.exists()
    assert fetch(cache, *make_file(0)) == make_file(0)[0]


@pytest.mark.parametrize("point", ["before-rename:cached", "after-rename:cached"])
def test_killed_at_its_naming(tmp_path, point):
    cache = ShardCache(tmp_path, 2 * KB)
    content, record = make_file(1)
    assert die_at(point, 0, lambda: fetch(cache, content, record)) == signal.SIGKILL
    assert names(cache) == ({record.sha256} if point.startswith("after") else set())
    assert fetch(cache, content, record) == content
    assert fetch(cache, *make_file(2)) == make_file(2)[0]
    assert not list(tmp_path.glob("partial/*"))


def test_a_folder_in_a_files_place_is_removed(tmp_path):
    """Also one of the file's very size."""
    cache = ShardCache(tmp_path, 10**6)
    path = tmp_path / "a" / "folder"
    path.mkdir(parents=True)
    for content in (b"x", bytes(path.stat().st_size)):
        record = record_of(content)
        (tmp_path / record.sha256[:2] / record.sha256 / "more").mkdir(parents=True)
        assert fetch(cache, content, record) == content


def test_what_the_source_lacks_is_no_trouble_of_the_cache(tmp_path):
    cache, record = ShardCache(tmp_path, KB), make_file(1)[1]

    def lack(_: Path) -> None:
        raise MissingFile(errno.ENOENT, "No such file", "there")

    with pytest.raises(FileNotFoundError, match="there"):
        cache.open(record, lack, "there")

    def lose(partial: Path) -> None:
        partial.unlink()

    with pytest.raises(store.StoreError, match=r"shard cache at .*No such file"):
        cache.open(record, lose, "there")


def test_collect_keeps_the_newest_and_says_what_went(tmp_path):
    assert ShardCache(tmp_path / "none", KB).collect(0) == Collected(0, 0, 0)
    assert not (tmp_path / "none").exists()
    cache = ShardCache(tmp_path, 10 * KB)
    files = [make_file(seed) for seed in range(3)]
    for age, (content, record) in enumerate(files):
        fetch(cache, content, record)
        os.utime(tmp_path / record.sha256[:2] / record.sha256, (age, age))
    assert cache.collect(1500) == Collected(2, 2 * KB, KB)
    assert names(cache) == {files[2][1].sha256}
    assert cache.collect(0) == Collected(1, KB, 0)


def test_defaults_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("GSAE_SHARD_CACHE", str(tmp_path))
    monkeypatch.setenv("GSAE_SHARD_CACHE_GB", "0.5")
    assert (find_root(), find_limit()) == (tmp_path, 500_000_000)
    monkeypatch.setenv("GSAE_SHARD_CACHE_GB", "much")
    with pytest.raises(store.StoreError, match="expected a number of gigabytes, got 'much'"):
        find_limit()
    monkeypatch.delenv("GSAE_SHARD_CACHE_GB")
    monkeypatch.delenv("GSAE_SHARD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert (find_root(), find_limit()) == (tmp_path / "gsae-pipeline" / "shards", 50_000_000_000)
