"""Stores behind URLs: the same rows as at home, or an error that says what to do and no secret."""

import importlib
import itertools
import json
import logging
import os
import shutil

import pytest

import store
from store.download import Retry, classify
from store.errors import mend
from store.files import LocalFiles, StoreFiles
from store.identity import fingerprint_of
from store.remote import open_remote, strip_url
from store.shard_cache import ShardCache
from tests.remotes import LOOPBACK, serve_http, serve_s3, serve_ssh, upload
from tests.store.published import ACTS, HOOKS
from tests.store.remote_reads import open_url, read_all

SECRET = "s3cr3t-signature"


@pytest.fixture
def cache(tmp_path):
    return ShardCache(tmp_path / "cache", 10**6)


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
