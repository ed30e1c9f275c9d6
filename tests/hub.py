"""A small Hugging Face hub on loopback, for the real path through huggingface_hub and datasets.

    root/models/gpt2/config.json ...             repository "gpt2"
    root/datasets/owner/name/README.md ...       dataset "owner/name"

Each repository has one revision, "main", whose commit is the hash of its files. huggingface_hub
reads HF_ENDPOINT when it is imported, so a client is a subprocess with the environment of
`hub_environment(url, home)`.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_API = re.compile(r"/api/(models|datasets)/(.+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
_FILE = re.compile(r"/(datasets/)?(.+?)/resolve/([^/]+)/(.+)")


@contextmanager
def serve_hub(root: Path, *, private: Collection[str] = ()) -> Iterator[str]:
    """Serve the repositories under `root` and yield the URL; those in `private` answer 401."""

    class Handler(_HubHandler):
        hub_root = root
        hub_private = frozenset(private)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def hub_environment(url: str, home: Path) -> dict[str, str]:
    """The environment of a client of the hub at `url` that caches in the empty folder `home`."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return inherited | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


class _Refused(Exception):
    """An HTTP error, with the code by which huggingface_hub tells its kinds apart."""

    def __init__(self, status: HTTPStatus, code: str):
        super().__init__(code)
        self.status, self.code = status, code


class _HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub_root: Path
    hub_private: frozenset[str]

    def do_GET(self) -> None:
        self._answer({})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()))

    def log_message(self, format: str, *args: object) -> None:
        """Stay silent: a test that fails shows the client's error."""

    def _answer(self, form: dict[str, list[str]]) -> None:
        path = unquote(urlsplit(self.path).path)
        try:
            if match := _API.fullmatch(path):
                self._describe(form, *match.groups())
            elif match := _FILE.fullmatch(path):
                self._send_file(*match.groups())
            else:
                raise _Refused(HTTPStatus.NOT_FOUND, "NotFound")
        except _Refused as refused:
            self._send(refused.status, b"", {"X-Error-Code": refused.code})

    def _find_repository(self, kind: str, name: str, revision: str | None) -> tuple[Path, str]:
        """The folder and commit of a repository."""
        folder = self.hub_root / kind / name
        if name in self.hub_private:
            raise _Refused(HTTPStatus.UNAUTHORIZED, "RepoNotFound")
        if not folder.is_dir():
            raise _Refused(HTTPStatus.NOT_FOUND, "RepoNotFound")
        commit = hashlib.sha1(json.dumps(_list_entries(folder)).encode()).hexdigest()
        if revision not in (None, "main", commit):
            raise _Refused(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        return folder, commit

    def _describe(
        self, form: dict[str, list[str]], kind: str, name: str, *rest: str | None
    ) -> None:
        verb, revision, under = rest
        folder, commit = self._find_repository(kind, name, revision)
        entries = _list_entries(folder)
        if verb == "tree":
            query = parse_qs(urlsplit(self.path).query)
            recursive = query.get("recursive", ["false"])[0].lower() == "true"
            self._send_json([e for e in entries if _is_under(e["path"], under or ".", recursive)])
        elif verb == "paths-info":
            self._send_json([e for e in entries if e["path"] in form.get("paths", [])])
        else:
            files = [{"rfilename": e["path"]} for e in entries if e["type"] == "file"]
            self._send_json({"id": name, "sha": commit, "siblings": files})

    def _send_file(self, datasets: str | None, name: str, revision: str, path: str) -> None:
        folder, commit = self._find_repository("datasets" if datasets else "models", name, revision)
        file = folder / path
        if path not in [e["path"] for e in _list_entries(folder) if e["type"] == "file"]:
            raise _Refused(HTTPStatus.NOT_FOUND, "EntryNotFound")
        data = file.read_bytes()
        headers = {"ETag": f'"{_oid(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._send(HTTPStatus.PARTIAL_CONTENT, data[first : last + 1], headers)
        else:
            self._send(HTTPStatus.OK, data, headers)

    def _send_json(self, value: object) -> None:
        self._send(HTTPStatus.OK, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: HTTPStatus, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _list_entries(folder: Path) -> list[dict[str, Any]]:
    """Every file and folder of a repository, as the hub's tree lists them."""
    entries = []
    for path in sorted(folder.rglob("*")):
        entry = {"path": path.relative_to(folder).as_posix()}
        file = {"type": "file", "size": path.stat().st_size, "oid": _oid(path)}
        entries.append(entry | (file if path.is_file() else {"type": "directory", "oid": "0" * 40}))
    return entries


def _oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes() if file.is_file() else b"").hexdigest()


def _is_under(path: str, folder: str, recursive: bool) -> bool:
    parents = [parent.as_posix() for parent in Path(path).parents]
    return folder in parents if recursive else folder == parents[0]
