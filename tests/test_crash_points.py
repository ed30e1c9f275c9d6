"""`pipeline cache` killed for real, in the driver and in a worker: the rerun, or the same run, ends
with the bytes of an undisturbed one. tests/store/test_crash.py goes through every point.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_dvc import Clone
from tests.tiny import make_project, read_tree, run_cli, spawn_cli

STORE = "stores/tiny"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A project with its corpus and store."""
    folder = make_project(tmp_path_factory.mktemp("undisturbed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_cli("cache") == 0
    return folder


@pytest.fixture
def project(undisturbed, tmp_path, monkeypatch):
    """A copy without the store."""
    folder = tmp_path / "project"
    shutil.copytree(undisturbed, folder, ignore=shutil.ignore_patterns("stores"))
    monkeypatch.chdir(folder)
    return folder


def committed(folder: Path) -> int:
    return len(list(folder.glob("stores/.work/*/commits/*.json")))


def files_of(folder: Path) -> dict[str, bytes]:
    assert [path.name for path in (folder / "stores").iterdir() if path.name != "tiny"] == [".work"]
    assert not list(folder.glob("stores/.work/*/scratch/*"))
    return read_tree(folder / STORE)


@pytest.mark.parametrize(
    ("point", "skip", "kept"),
    [
        ("after-rename:zarr.json", "0", 0),
        ("before-rename:array", "20", 3),  # six arrays in a shard
        ("after-commit", "4", 5),
        ("after-rename:manifest", "0", None),
        ("after-link", "0", None),
    ],
)
def test_12_killed_driver(project, undisturbed, capsys, point, skip, kept):
    killed = spawn_cli("cache", cwd=project, STORE_CRASH_POINT=point, STORE_CRASH_SKIP=skip)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not (project / STORE).exists()
    n_shards = len(json.loads((undisturbed / STORE / "manifest.json").read_text())["shards"])
    kept = n_shards if kept is None else kept
    assert committed(project) == kept
    assert run_cli("cache") == 0
    assert f"computed {n_shards - kept} of {n_shards} shards" in capsys.readouterr().out
    assert files_of(project) == files_of(undisturbed)


@pytest.mark.parametrize("point", ["before-rename:array", "after-commit"])
def test_9_killed_worker(project, undisturbed, point):
    """Of two workers one dies, inside a shard or just after it; another takes its place."""
    token = project / "token"
    token.touch()
    run = spawn_cli(
        "cache", "--workers", "2",
        cwd=project, STORE_CRASH_POINT=point, STORE_CRASH_TOKEN=str(token),
    )  # fmt: skip
    out, err = run.communicate(timeout=180)
    assert run.returncode == 0, out + err
    assert not token.exists()
    assert files_of(project) == files_of(undisturbed)
    pids = {
        s["pid"] for s in json.loads((project / STORE / "provenance.json").read_text())["shards"]
    }
    assert run.pid not in pids


def test_13_killed_dvc_repro_while_its_child_lives_on(tmp_path, monkeypatch):
    clone = Clone(tmp_path / "clone")
    monkeypatch.chdir(clone.folder)
    assert run_cli("corpus", "--out", "data/tiny") == 0
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONSAFEPATH": "1",
    }
    dvc = subprocess.Popen(
        ["dvc", "repro", "--single-item", "cache"],
        cwd=clone.folder, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    child = None
    try:
        child = wait_for_holder(clone.folder)
        os.kill(child, signal.SIGSTOP)  # in the middle of its work
        dvc.kill()
        dvc.wait()
        os.kill(child, 0)  # lives on
        for command in (["pipeline", "cache"], ["dvc", "repro", "--single-item", "cache"]):
            second = subprocess.run(
                [*command], cwd=clone.folder, env=environment, capture_output=True, text=True,
                check=False, timeout=120,
            )  # fmt: skip
            assert second.returncode != 0
            holder = f"process {child} on host {socket.gethostname()}"
            assert holder in second.stdout + second.stderr
        os.kill(child, signal.SIGCONT)
        wait_until(lambda: (clone.folder / STORE / "manifest.json").exists())
        wait_until(lambda: not has_holder(clone.folder))
    finally:
        for pid in (dvc.pid, child):
            if pid is not None and dvc.returncode is None:
                os.kill(pid, signal.SIGKILL)
    assert run_cli("store", "verify", STORE) == 0
    assert run_cli("cache") == 0


def has_holder(folder: Path) -> bool:
    return bool(list(folder.glob("stores/.work/*/holder.json")))


def wait_until(ready, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def wait_for_holder(folder: Path) -> int:
    wait_until(lambda: has_holder(folder))
    (note,) = folder.glob("stores/.work/*/holder.json")
    return json.loads(note.read_text())["pid"]
