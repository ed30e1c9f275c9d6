"""Stores behind URLs: the same rows as at home, or an error that says what to do and no secret."""

import importlib
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import store
from store.download import Retry, classify
from store.errors import mend
from store.files import LocalFiles, StoreFiles
from store.identity import fingerprint_of
from store.manifest import FileRecord
from store.reader import list_files
from store.remote import RemoteFiles, open_remote, strip_url
from store.shard_cache import ShardCache
from store.verify import verify_full
from tests.remotes import HANG_S, LOOPBACK, local_remote, serve_http, serve_s3, serve_ssh, upload
from tests.store.published import ACTS, FAST, HOOKS
from tests.store.small_store import (
    all_rows,
    assert_rows_equal,
    select_rows,
)

SECRET = "s3cr3t-signature"


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", 10**6)


def open_url(url: str, cache: ShardCache, retry: Retry = FAST) -> store.ActivationStore:
    return store.open_store(open_remote(url, cache=cache, retry=retry))


def read_all(opened: store.ActivationStore, spec: store.StoreSpec) -> None:
    """Every row of a hook is the one that was written."""
    for shard in spec.layout.shards:
        rows = opened.read_shard(shard.index, HOOKS[1])
        everything = all_rows(spec, HOOKS[1])
        here = (everything.block >= shard.first_block) & (
            everything.block < shard.first_block + shard.n_blocks
        )
        assert_rows_equal(rows, select_rows(everything, here))


def test_http_gives_the_rows_and_fetches_each_file_once(server, cache, spec):
    opened = open_url(f"{server.url}/small/", cache)
    assert isinstance(opened.files, StoreFiles)
    assert opened.where == f"{server.url}/small"
    assert not any("/c/" in path for path in server.counts)  # opening asks for metadata alone
    for _ in range(2):
        read_all(opened, spec)
    read_all(open_url(f"{server.url}/small", cache), spec)
    shard_files = {path: n for path, n in server.counts.items() if "/c/" in path}
    assert set(shard_files.values()) == {1}
    assert not any(HOOKS[0] in path for path in shard_files)


def test_s3_gives_the_rows_and_tells_missing_from_denied(
    folder, cache, spec, monkeypatch, tmp_path
):
    with serve_s3("team", monkeypatch):
        upload(folder / "small", "team", "stores/small")
        read_all(open_url("s3://team/stores/small", cache), spec)
        for url in ("s3://team/stores/other", "s3://nobody/stores/small"):
            with pytest.raises(store.StoreNotFound, match=url):
                open_url(url, cache)
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(store.AccessDenied, match=r"NoCredentials.*AWS_PROFILE"):
            open_url("s3://team/stores/small", cache)


@pytest.fixture
def s3_server(server, monkeypatch):
    """The misbehaving server as an S3 endpoint with a bucket `small`."""
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    return server


@pytest.mark.parametrize("fault", [503, "reset", "short", "wrong"])
def test_a_passing_fault_of_s3_is_survived(s3_server, cache, spec, fault):
    s3_server.faults[f"small/{ACTS}"] = iter([fault, fault])
    read_all(open_url("s3://small", cache), spec)
    assert s3_server.counts[f"small/{ACTS}"] == 3  # no library retries beside ours


@pytest.mark.parametrize("fault", ["ExpiredToken", "InvalidToken", 403])
def test_expired_s3_credentials_are_named_at_once(s3_server, cache, fault):
    opened = open_url("s3://small", cache)
    s3_server.faults[f"small/{ACTS}"] = itertools.repeat(fault)
    with pytest.raises(store.AccessDenied, match=r"small.*AWS_PROFILE.*expired") as raised:
        opened.read_slots(0, 0, 4, HOOKS[1])
    assert SECRET not in str(raised.value)
    assert s3_server.counts[f"small/{ACTS}"] == 1


def test_ssh_gives_the_rows_from_known_hosts_alone(folder, cache, spec, monkeypatch, tmp_path):
    with serve_ssh(tmp_path / "home", monkeypatch) as port:
        url = f"ssh://{os.environ.get('USER', 'root')}@{LOOPBACK}:{port}{folder}/small"
        opened = open_url(url, cache)
        assert opened.where == f"ssh://{LOOPBACK}:{port}{folder}/small"
        read_all(opened, spec)
        with pytest.raises(store.StoreNotFound):
            open_url(url + "er", cache)
        (tmp_path / "home/.ssh/known_hosts").write_text("")
        with pytest.raises(store.AccessDenied, match=r"HostKeyNotVerifiable.*known_hosts"):
            open_url(url, cache)


def test_file_urls_are_folders(folder):
    files = open_remote(f"file://{folder}/small")
    assert isinstance(files, LocalFiles)
    assert store.open_store(files).n_rows


@pytest.mark.parametrize("fault", [503, 500, 429, "reset", "short", "long", "wrong", "trickle"])
def test_a_passing_fault_of_a_shard_is_survived(server, cache, spec, fault):
    server.faults[f"small/{ACTS}"] = iter([fault, fault])
    read_all(open_url(f"{server.url}/small", cache), spec)
    assert server.counts[f"small/{ACTS}"] == (1 if fault == "trickle" else 3)


@pytest.mark.parametrize("fault", [503, "reset"])
def test_a_passing_fault_of_the_manifest_is_survived(server, cache, spec, fault):
    server.faults["small/manifest.json"] = iter([fault, fault])
    read_all(open_url(f"{server.url}/small", cache), spec)


@pytest.mark.parametrize(
    ("fault", "error", "message", "requests"),
    [
        (404, store.ShardMissing, "expected a file, got none", 1),
        (401, store.AccessDenied, "HTTP 401.*netrc", 1),
        (403, store.AccessDenied, "HTTP 403.*netrc", 1),
        (503, store.StoreUnreachable, "within 3 attempts, got .*HTTP 503.*again", 3),
        ("reset", store.StoreUnreachable, "ClientPayloadError", 3),
        ("short", store.ShardCorrupt, "bytes, got.*so 3 times", 3),
        ("long", store.ShardCorrupt, "bytes, got.*so 3 times", 3),
        ("wrong", store.ShardCorrupt, "expected sha256.*so 3 times", 3),
    ],
)
def test_a_lasting_fault_is_named_and_nothing_is_cached(
    server, cache, fault, error, message, requests
):
    opened = open_url(f"{server.url}/small", cache)
    server.faults[f"small/{ACTS}"] = itertools.repeat(fault)
    with pytest.raises(error, match=message) as raised:
        opened.read_slots(0, 0, 4, HOOKS[1])
    assert ACTS in str(raised.value)
    assert server.counts[f"small/{ACTS}"] == requests
    sha256 = opened.manifest.shards[0].files[f"{HOOKS[1]}/acts"].sha256
    assert not list(cache.root.rglob(f"{sha256}*[!k]"))  # but for its lock


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (404, store.StoreNotFound),
        (403, store.AccessDenied),
        (503, store.StoreUnreachable),
        ("short", store.ManifestError),
        ("wrong", store.ManifestError),
    ],
)
def test_a_lasting_fault_of_the_manifest_is_named(server, cache, fault, error):
    server.faults["small/manifest.json"] = itertools.repeat(fault)
    with pytest.raises(error, match=r"small"):
        open_url(f"{server.url}/small", cache)


def test_no_server_is_unreachable(cache):
    with serve_http(cache.root) as server:
        url = server.url
    with pytest.raises(store.StoreUnreachable, match="ClientConnectorError"):
        open_url(f"{url}/small", cache)


def test_a_silent_server_is_given_up(server, cache, monkeypatch):
    monkeypatch.setattr("store.backends.SILENCE_S", 0.005)  # less than the trickle's pauses
    server.faults["small/zarr.json"] = itertools.repeat("trickle")
    with pytest.raises(store.StoreUnreachable, match="TimeoutError"):
        open_url(f"{server.url}/small", cache)


def test_waiting_doubles_up_to_a_cap(server, cache):
    waits: list[float] = []
    server.faults["small/manifest.json"] = itertools.repeat(503)
    retry = Retry(attempts=5, first_s=0.25, cap_s=1.0, sleep=waits.append)
    with pytest.raises(store.StoreUnreachable):
        open_url(f"{server.url}/small", cache, retry)
    assert waits == [0.25, 0.5, 1.0, 1.0]


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


def test_a_forged_manifest_cannot_name_a_file_of_this_machine(folder, cache, tmp_path):
    """A path where the hash should be would be that of a cached copy, and be deleted as damaged."""
    mine = tmp_path / "mine"
    mine.write_text("precious")
    shutil.copytree(folder / "small", tmp_path / "www/small")
    manifest = tmp_path / "www/small/manifest.json"
    fields = json.loads(manifest.read_bytes())
    fields["shards"][0]["files"]["tokens"]["sha256"] = str(mine)
    del fields["checksum"]
    fields["checksum"] = fingerprint_of(fields)
    manifest.write_text(json.dumps(fields))
    with (
        serve_http(tmp_path / "www") as server,
        pytest.raises(store.ManifestError, match=r"tokens\.sha256"),
    ):
        open_url(f"{server.url}/small", cache).read_column(0, "tokens")
    assert mine.read_text() == "precious"


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


def test_advice_for_a_remote_is_not_to_repair_it_here(server, cache, folder):
    with pytest.raises(store.StoreNotFound, match="Correct the URL"):
        open_url(f"{server.url}/none", cache)
    server.faults["small/manifest.json"] = itertools.repeat("short")
    with pytest.raises(store.ManifestError, match=r"same command again.*tell .*publish"):
        open_url(f"{server.url}/small", cache)
    assert "store repair" not in mend("dvc+/srv/repo@main:stores/a")
    assert "store repair" in mend(str(folder))


def test_a_signature_goes_with_each_request_and_nowhere_else(server, cache, spec, caplog):
    server.query = f"sig={SECRET}%2Bx&expires=9"
    url = f"{server.url}/small?{server.query}"
    with caplog.at_level(logging.INFO):
        opened = open_url(url, cache)
        read_all(opened, spec)
        server.query = "sig=renewed"
        with pytest.raises(store.AccessDenied, match="HTTP 403") as raised:
            open_url(url, cache)
    assert opened.where == f"{server.url}/small"
    assert raised.value.__suppress_context__
    for text in (str(raised.value), caplog.text, opened.files.locate("x"), repr(opened)):
        assert SECRET not in text


def test_a_password_in_the_url_is_sent_and_never_shown(server, cache, spec):
    server.authorization = "Basic dXNlcjpzM2NyM3Qtc2lnbmF0dXJl"  # user, SECRET
    url = server.url.replace("//", f"//user:{SECRET}@")
    opened = open_url(f"{url}/small", cache)
    read_all(opened, spec)
    assert opened.where == f"{server.url}/small"
    with pytest.raises(store.AccessDenied) as raised:
        open_url(f"{server.url}/small", cache)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://user:s3cr3t@host/store", "ftp://host/store: expected s3://"),
        ("https:///store", "got another kind of URL"),
        ("https://[host/store?s3cr3t", "cannot be parsed"),
        ("http://host:s3cr3t/store", "cannot be parsed"),
        ("s3://key:s3cr3t@bucket/store", "s3://bucket/store: expected s3://bucket/folder"),
        ("dvc+https://user:s3cr3t@host/repo", "expected dvc+<git"),
    ],
)
def test_a_url_that_is_none_is_refused_without_its_secrets(url, message):
    with pytest.raises(store.StoreError, match=message.replace("+", r"\+")) as raised:
        open_remote(url)
    assert "s3cr3t" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("https://u:p@host:8443/a/b/?x=1#y", "https://host:8443/a/b"),
        ("s3://bucket/a/", "s3://bucket/a"),
        ("ssh://me@host:22/a", "ssh://host:22/a"),
    ],
)
def test_what_is_shown_of_a_url(url, where):
    assert strip_url(url) == where


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("dvc+https://u:p@host/repo@v1:stores/a/", "dvc+https://host/repo@v1:stores/a"),
        ("dvc+git@host:team/repo@v1.0/x:stores/a", "dvc+git@host:team/repo@v1.0/x:stores/a"),
        ("dvc+/srv/repo@main:stores/a", "dvc+/srv/repo@main:stores/a"),
    ],
)
def test_a_dvc_url_is_a_repository_a_revision_and_a_folder(url, where, cache):
    assert open_remote(url, cache=cache).where == where


def test_a_library_that_is_not_there_is_named_with_the_command(cache, monkeypatch):
    real = importlib.import_module

    def import_module(name: str):
        if name == "s3fs":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(store.StoreError, match=r"pip install 'gsae-pipeline\[s3\]'"):
        open_url("s3://bucket/store", cache)


def test_a_refusal_is_never_taken_for_a_missing_file():
    missing, denied = FileNotFoundError("x"), PermissionError("x")
    assert classify(missing) == "missing"
    assert classify(denied) == "denied"
    missing.__cause__ = denied
    assert classify(missing) == "denied"
    assert classify(OSError("x")) == "transient"


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
