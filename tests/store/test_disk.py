"""Durable writes, links, and real refusals: a full disk and a read-only one, privately mounted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import store.disk
from store.disk import check_room, free_bytes, link_tree, make_folder, write_durably
from store.errors import DiskFull, StoreError
from tests.store.small_store import make_spec, write_store

FAULT = """
import sys
from pathlib import Path
from tests.store.small_store import make_rows, make_spec
import store

spec, work = make_spec(d_model=2000), Path(sys.argv[1]) / "out/.work/x"
try:
    with store.lock_work(work):
        store.prepare_work(work, spec)
        for shard in spec.layout.shards:
            store.write_shard(work, spec, shard, make_rows(spec, shard))
            print("committed", shard.index)
except store.StoreError as error:
    print(type(error).__name__, error)
    print("left in scratch:", len(list(work.glob("scratch/*"))))
print("still committed:", sorted(store.committed_shards(work, spec)))
"""


def run_on_mount(tmp_path: Path, options: str, program: str = FAULT, *args: object) -> str:
    """Run it where `tmp_path` is a tmpfs of its own, seen by that process only."""
    command = f'mount -t tmpfs -o {options} none "{tmp_path}" && exec "$@"'
    call = [sys.executable, "-c", program, str(tmp_path), *map(str, args)]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, "sh", *call],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_full_disk_keeps_what_is_committed(tmp_path):
    # A shard has 4 * 8 rows of 2 * 2000 numbers in 2 bytes, and padding of short chunks: 256 kB.
    lines = run_on_mount(tmp_path, "size=800k").splitlines()
    assert lines[:2] == ["committed 0", "committed 1"]
    assert lines[-3].startswith("DiskFull")
    assert "expected room for 25" in lines[-3]
    assert "pipeline cache" in lines[-3]
    assert lines[-2] == "left in scratch: 0"
    assert lines[-1].startswith("still committed: [0, 1")


# Files of a remote store, of 128 kB each and small ones, on a disk that fills up on the way.
REMOTE = """
import hashlib, sys
from pathlib import Path
import store
from store.download import Retry
from store.pull import plan_pull, pull_store
from store.reader import list_files
from store.remote import RemoteFiles
from store.shard_cache import ShardCache
from tests.remotes import local_remote

root, source, command = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
ballast, out = root / "ballast", root / "copy"
cache = ShardCache(root / "cache")
files = RemoteFiles(local_remote(source), cache=cache, retry=Retry(first_s=0))
opened = store.open_store(source)
records = {file.path: file.record for file in list_files(opened)}
of_stream = dict(hook=None, batch_size=16, epochs=1, seed=0, window=1)

def fill(_=None):
    try:
        ballast.write_bytes(bytes(10**8))
    except OSError:
        pass

def pull(**options):
    return pull_store(files, out, plan_pull(files), **options)

def stream():
    remote = store.open_store(files)
    batches = store.stream_batches(remote, store.plan_stream(remote, **of_stream))
    for n, batch in enumerate(batches, start=1):
        if n == 2 and not ballast.exists():
            fill()
    return n

def check():
    here = [path for path in out.rglob("c/**/*") if path.is_file()]
    for path in here:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        assert found == records[path.relative_to(out).as_posix()].sha256, path
    cached = list(cache.root.glob("[0-9a-f][0-9a-f]/*"))
    for path in cached:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    assert not list(root.glob("cache/partial/*"))
    print("whole:", len(here) + len(cached), "manifest:", (out / "manifest.json").exists())

if command == "full from the start":
    fill()
try:
    stream() if command == "stream" else pull(on_progress=fill)
    print("no error")
except store.StoreError as error:
    print(type(error).__name__, error)
check()
ballast.write_bytes(b"")
if command == "stream":
    print("done", stream() == opened.n_rows // 16)
else:
    print("done", pull().kept)
    store.open_store(out).verify()
"""


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("remote") / "store", make_spec(d_model=2000)).where


def test_15_full_disk_of_the_shard_cache(tmp_path, remote):
    lines = run_on_mount(tmp_path, "size=4m", REMOTE, remote, "stream").splitlines()
    assert len(lines) == 3, lines
    found = re.match(
        r"DiskFull disk of the shard cache at (.*): expected room for ([\d,]+) b", lines[0]
    )
    assert found, lines
    assert found[1] == f"{tmp_path}/cache"
    assert int(found[2].replace(",", "")) > 0
    assert "`pipeline store gc`" in lines[0]
    assert "run the same command again" in lines[0]
    assert int(lines[1].split()[1]) > 0
    assert lines[2] == "done True"


@pytest.mark.parametrize("command", ["full from the start", "full on the way"])
def test_15_full_disk_of_a_pull(tmp_path, remote, command):
    lines = run_on_mount(tmp_path, "size=4m", REMOTE, remote, command).splitlines()
    assert len(lines) == 3, lines
    assert lines[0].startswith(f"DiskFull disk at {tmp_path}/copy: expected room for 1,")
    assert lines[0].endswith("run `pipeline store pull` again: what is whole is kept.")
    n_whole = int(lines[1].split()[1])
    assert lines[1].endswith("manifest: False")
    assert (n_whole > 0) is (command == "full on the way")
    assert lines[2] == f"done {n_whole}"


def test_read_only_file_system_is_named(tmp_path):
    lines = run_on_mount(tmp_path, "ro").splitlines()
    assert lines[0].startswith(f"StoreError folder at {tmp_path}/out/.work/x: expected one that")
    assert "Read-only file system" in lines[0]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    work = tmp_path / "file/work"
    with pytest.raises(StoreError, match=f"folder at {work}"), store.lock_work(work):
        pass


def test_room_is_checked_where_nothing_exists_yet(tmp_path):
    path = tmp_path / "a/b/c"
    free = free_bytes(path)
    assert free > 0
    check_room(path, 1)
    with pytest.raises(DiskFull, match=r"expected room for 1,000,000,000,000,000 bytes"):
        check_room(path, 10**15)
    assert not (tmp_path / "a").exists()


def test_write_is_whole_or_absent(tmp_path):
    target, scratch = tmp_path / "deep/er/file", tmp_path / "scratch"
    written = write_durably(target, [b"abc", memoryview(b"de")], scratch=scratch)
    assert target.read_bytes() == b"abcde"
    assert written.bytes == 5
    assert written.sha256 == "36bbe50ed96841d10443bcb670d6554f0a34b761be67ec9c4a8ad2c0c44ca42c"

    def fail():
        yield b"new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_durably(target, fail(), scratch=scratch)
    assert target.read_bytes() == b"abcde"
    assert list(scratch.iterdir()) == []


def test_order_of_a_write(tmp_path, monkeypatch):
    """Content before name, name before folder: each durable before the next."""
    steps = []
    fsync, rename = os.fsync, Path.rename

    def spy_fsync(file):
        steps.append(("fsync", Path(os.readlink(f"/proc/self/fd/{file}")).parent.name))
        fsync(file)

    def spy_rename(path, target):
        steps.append(("rename", Path(target).name))
        return rename(path, target)

    make_folder(tmp_path / "scratch")
    make_folder(tmp_path / "folder")
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "rename", spy_rename)
    write_durably(tmp_path / "folder/file", [b"x"], scratch=tmp_path / "scratch")
    assert steps == [("fsync", "scratch"), ("rename", "file"), ("fsync", tmp_path.name)]


@pytest.mark.parametrize("links", [True, False])
def test_link_tree(tmp_path, monkeypatch, links):
    source = tmp_path / "source"
    write_durably(source / "a/b", [b"1"], scratch=tmp_path)
    write_durably(source / "c", [b"2"], scratch=tmp_path)
    if not links:

        def refuse(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(store.disk.os, "link", refuse)
    link_tree(source, tmp_path / "target")
    assert (tmp_path / "target/a/b").read_bytes() == b"1"
    assert (tmp_path / "target/c").read_bytes() == b"2"
    same = (tmp_path / "target/c").stat().st_ino == (source / "c").stat().st_ino
    assert same is links
