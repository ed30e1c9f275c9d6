"""Servers on loopback that hand out stores: HTTP that misbehaves on request, S3 and SSH."""

import functools
import importlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from store.backends import Remote
from store.manifest import FileRecord

LOOPBACK = "127.0.0.1"
S3_CODES = ("ExpiredToken", "InvalidToken")
HANG_S = 30
SSHD = shutil.which("sshd", path=f"/usr/sbin:{os.environ['PATH']}") or "sshd"


def local_remote(folder: Path) -> Remote:
    """A folder as a remote, without a server."""

    def connect() -> object:
        return importlib.import_module("fsspec").filesystem("file")

    def download(system: object, address: str, partial: Path, file: FileRecord) -> None:  # noqa: ARG001
        shutil.copyfile(address, partial)

    return Remote(f"local://{folder}", lambda path: f"{folder}/{path}", connect, download, "None.")


class FaultyServer(ThreadingHTTPServer):
    """Serves a folder; `faults` says by path what the next requests get instead.

    A fault is a status (403), an S3 error code, "reset" or "hang" halfway through the body,
    "trickle" (slow, whole), "wrong" bytes, "short" or "long" content. One is taken for each
    request; after the last all is well.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__((LOOPBACK, 0), functools.partial(_Handler, folder))
        self.faults: dict[str, Iterator[int | str]] = {}
        self.counts: Counter[str] = Counter()  # of requests, by path
        self.query = ""  # that every request must have
        self.authorization: str | None = None  # the same
        self.url = f"http://{LOOPBACK}:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer

    def __init__(self, folder: Path, *args: object) -> None:
        self.folder = folder
        super().__init__(*args)

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = parts.path.lstrip("/")
        self.server.counts[path] += 1
        fault = next(self.server.faults.get(path, iter(())), None)
        allowed = parts.query == self.server.query and (
            self.server.authorization in (None, self.headers["Authorization"])
        )
        if not allowed or not (self.folder / path).is_file() or isinstance(fault, int):
            self.send_error(fault if isinstance(fault, int) else 404 if allowed else 403)
            return
        if fault in S3_CODES:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(f"<Error><Code>{fault}</Code><Message>m</Message></Error>".encode())
            return
        content = (self.folder / path).read_bytes()
        half = len(content) // 2
        sent = {
            "wrong": content[:-1] + bytes([content[-1] ^ 1]),
            "short": content[:half],
            "long": content * 2,
            "reset": content[:half],
            "hang": content[:half],
        }.get(str(fault), content)
        self.send_response(200)
        self.send_header(
            "Content-Length", str(len(content if fault in ("reset", "hang") else sent))
        )
        self.end_headers()
        step = max(len(sent) // 10, 1) if fault == "trickle" else len(sent)
        for start in range(0, len(sent), step):
            self.wfile.write(sent[start : start + step])
            if fault == "trickle":
                time.sleep(0.02)
        if fault == "hang":
            self.wfile.flush()
            time.sleep(HANG_S)
        if fault == "reset":  # a connection that ends without a word
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args: object) -> None:
        """Nothing: the counts tell."""


@contextmanager
def serve_http(folder: Path) -> Iterator[FaultyServer]:
    server = FaultyServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serve_s3(bucket: str, patch: pytest.MonkeyPatch) -> Iterator[str]:
    """moto's S3 with an empty bucket; the environment names it and has credentials for it.

    Yields its endpoint.
    """
    import logging

    import boto3
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address=LOOPBACK, port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    patch.setenv("AWS_ENDPOINT_URL", endpoint)
    patch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "aws-secret")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    try:
        boto3.client("s3").create_bucket(Bucket=bucket)
        yield endpoint
    finally:
        server.stop()


def upload(folder: Path, bucket: str, prefix: str) -> None:
    import boto3

    client = boto3.client("s3")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(folder).as_posix()}"
            client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())


@contextmanager
def serve_ssh(home: Path, patch: pytest.MonkeyPatch) -> Iterator[int]:
    """Debian's sshd with keys of its own; HOME is `home`, whose ~/.ssh has what a client needs.

    Yields its port; the host is LOOPBACK, the user the present one.
    """
    ssh = home / ".ssh"
    ssh.mkdir(parents=True, mode=0o700)
    for name in ("host", "id_ed25519"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / name], check=True
        )
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
    host_key = " ".join((ssh / "host.pub").read_text().split()[:2])
    (ssh / "known_hosts").write_text(f"[{LOOPBACK}]:{port} {host_key}\n")
    (ssh / "sshd_config").write_text(
        f"Port {port}\nListenAddress {LOOPBACK}\nHostKey {ssh}/host\nPidFile none\nUsePAM no\n"
        f"AuthorizedKeysFile {ssh}/authorized_keys\nStrictModes no\nPasswordAuthentication no\n"
        "KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
        "Subsystem sftp internal-sftp\n"
    )
    patch.setenv("HOME", str(home))
    patch.delenv("SSH_AUTH_SOCK", raising=False)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # Debian's sshd wants it when root runs it
    server = subprocess.Popen(
        [SSHD, "-D", "-e", "-f", ssh / "sshd_config"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for_port(port, server)
        yield port
    finally:
        server.terminate()
        server.wait()


def _wait_for_port(port: int, server: subprocess.Popen) -> None:
    for _ in range(200):
        with suppress(ConnectionRefusedError), socket.create_connection((LOOPBACK, port)):
            return
        assert server.poll() is None, "sshd did not start"
        time.sleep(0.02)
    raise AssertionError("sshd does not listen")
