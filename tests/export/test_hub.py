"""Uploading, through the real client, to a hub on loopback."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import HfApi

from pipeline.errors import PipelineError
from pipeline.export import plan_export, push_export, run_export
from tests.export.examples import write_run


class Handler(BaseHTTPRequestHandler):
    """Takes a repository and one commit of small files, as the hub's API does."""

    protocol_version = "HTTP/1.1"
    status = 200
    calls: list[tuple[str, bytes]]

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b"".join(iter(self.read_chunk, b""))
        self.calls.append((self.path, body))
        url = f"http://{self.headers['Host']}/owner/name"
        answer: dict = {"url": url, "id": "owner/name"}
        if "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            answer = {
                "files": [
                    {"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in files
                ]
            }
        elif "/commit/" in self.path:
            answer = {"commitUrl": f"{url}/commit/abc", "commitOid": "abc", "success": True}
        self.answer(answer)

    def do_GET(self):
        self.answer({"id": "owner/name", "sha": "0" * 40, "siblings": []})

    def read_chunk(self):
        chunk = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return chunk

    def answer(self, content):
        body = json.dumps(content if self.status == 200 else {"error": "no"}).encode()
        self.send_response(self.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        """Stay silent."""


@pytest.fixture
def hub():
    class Own(Handler):
        calls = []  # noqa: RUF012

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield Own, HfApi(f"http://127.0.0.1:{server.server_address[1]}", token="hf_secret")
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    run_export(plan_export(write_run(tmp_path / "run"), to="saelens"), tmp_path / "export")
    return tmp_path / "export"


def test_every_file_is_uploaded_to_a_private_repository(hub, folder):
    handler, api = hub
    assert push_export(folder, "owner/name", api=api).endswith("/commit/abc")
    sent = dict(handler.calls)
    created = json.loads(sent["/api/repos/create"])
    assert created["name"] == "name"
    assert created.get("private") or created.get("visibility") == "private"
    commit = next(body for path, body in handler.calls if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    assert {line["value"]["path"] for line in lines if line["key"] == "file"} == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_one_line_and_the_export_stays(hub, folder, status):
    handler, api = hub
    handler.status = status
    with pytest.raises(PipelineError, match=f"push to owner/name: .*{status}.*hf auth login") as e:
        push_export(folder, "owner/name", api=api)
    assert "\n" not in str(e.value)
    assert "hf_secret" not in str(e.value)
    assert (folder / "README.md").is_file()


def test_a_hub_that_is_not_there_is_one_line(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(PipelineError, match=r"push to owner/name: .*ConnectError") as caught:
        push_export(folder, "owner/name", api=HfApi(f"http://127.0.0.1:{port}", token="hf_secret"))
    assert "\n" not in str(caught.value)
