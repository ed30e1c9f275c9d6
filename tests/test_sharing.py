"""One project publishes a store; another trains from it: through DVC's remotes, and by URL."""

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

import store
from store.shuffle import plan_batches
from store.stream import stream_batches
from store.stream_plan import plan_stream
from tests.remotes import LOOPBACK, serve_http, serve_s3, serve_ssh
from tests.tiny import make_project, read_tree, run_cli, spawn_cli

STORE = "stores/tiny"
ACTS = "blocks.1.hook_resid_post/acts/c/0/0"
SECRET = "s3cr3t"
SHORT = ("--set", "train.epochs=1")
STAGE = f"""stages:
  cache:
    cmd: pipeline cache --out {STORE}
    outs:
      - {STORE}
"""


class Published(NamedTuple):
    repository: Path  # with the tag v1, and the store in its folder and in three DVC remotes
    objects: Path  # of the local-folder remote
    run: dict[str, bytes]  # SAEs trained from the folder


def run_tool(*command: str, cwd: Path, fails: bool = False) -> str:
    """Run git or dvc; returns all that it prints."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DVC_NO_ANALYTICS": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
    }
    done = subprocess.run(
        command, cwd=cwd, env=environment, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout
    return done.stdout


def commit_all(folder: Path, message: str) -> None:
    run_tool("git", "add", "-A", cwd=folder)
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    run_tool("git", *identity, "commit", "-q", "-m", message, cwd=folder)


def write_dvc_config(folder: Path, remotes: dict[str, dict[str, str]]) -> None:
    """What `dvc init` and `dvc remote add` write; the README's `verify true` for each."""
    lines = ["[core]", "analytics = false", "check_update = false", "remote = folder"]
    lines += ["[cache]", 'type = "hardlink,reflink,symlink,copy"']
    for name, options in remotes.items():
        lines += [f"['remote \"{name}\"']", "verify = true"]
        lines += [f"{key} = {value}" for key, value in options.items()]
    (folder / ".dvc").mkdir(exist_ok=True)
    (folder / ".dvc/config").write_text("\n".join(lines) + "\n")
    (folder / ".dvc/.gitignore").write_text("/config.local\n/tmp\n/cache\n")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The author's side, once: cache, commit, push to a folder, to S3 and over SSH, tag."""
    root = tmp_path_factory.mktemp("sharing")
    with ExitStack() as opened:
        patch = opened.enter_context(pytest.MonkeyPatch.context())
        endpoint = opened.enter_context(serve_s3("team", patch))
        port = opened.enter_context(serve_ssh(root / "home", patch))
        project = make_project(root / "author")
        patch.chdir(project)
        assert run_cli("cache", "--out", STORE) == 0
        assert run_cli("train", *SHORT, "--store", STORE, "--out", "runs/local") == 0
        trained = read_weights(project / "runs/local")
        shutil.rmtree(project / "runs")
        write_dvc_config(
            project,
            {
                "folder": {"url": f"{root}/remote"},
                "s3": {"url": "s3://team/dvc", "endpointurl": endpoint},
                "ssh": {
                    "url": f"ssh://{LOOPBACK}{root}/over-ssh",
                    "port": str(port),
                    "user": "root" if os.geteuid() == 0 else os.environ["USER"],
                    "keyfile": f"{root}/home/.ssh/id_ed25519",
                },
            },
        )
        (project / "dvc.yaml").write_text(STAGE)
        (project / ".gitignore").write_text("/data\n/stores/*\n!/stores/.gitignore\n")
        run_tool("git", "init", "-q", "-b", "main", cwd=project)
        run_tool("dvc", "commit", "-q", "-f", "cache", cwd=project)
        commit_all(project, "a store")
        run_tool("git", "tag", "v1", cwd=project)
        for remote in ("folder", "s3", "ssh"):
            run_tool("dvc", "push", "-q", "-r", remote, cwd=project)
        yield Published(project, root / "remote", trained)


def clone(published: Published, folder: Path) -> Path:
    run_tool("git", "clone", "-q", str(published.repository), str(folder), cwd=folder.parent)
    return folder


def read_weights(run: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in run.glob("*/sae.safetensors")}


def assert_same_store(folder: Path, published: Published) -> None:
    store.open_store(folder).verify()
    assert read_tree(folder) == read_tree(published.repository / STORE)


@pytest.mark.parametrize("remote", ["folder", "s3", "ssh"])
def test_dvc_pull_brings_the_store(published, tmp_path, remote):
    teammate = clone(published, tmp_path / "teammate")
    assert not (teammate / STORE).exists()
    run_tool("dvc", "pull", "-q", "-r", remote, cwd=teammate)
    assert_same_store(teammate / STORE, published)


def test_dvc_import_serves_a_project_on_another_profile(published, tmp_path, monkeypatch):
    teammate = tmp_path / "teammate"
    teammate.mkdir()
    (teammate / "params.yaml").write_text("profile: demo\n")
    write_dvc_config(teammate, {"folder": {"url": f"{tmp_path}/nothing"}})
    run_tool("git", "init", "-q", cwd=teammate)
    source = str(published.repository)
    run_tool("dvc", "import", "-q", source, STORE, "--rev", "v1", "-o", "theirs", cwd=teammate)
    assert_same_store(teammate / "theirs", published)
    monkeypatch.chdir(teammate)
    few = ("--k", "4", "--set", "train.d_saes=[64]", "--set", "train.batch_size=512")
    assert run_cli("train", *SHORT, *few, "--store", "theirs", "--out", "runs/theirs") == 0
    config = json.loads((teammate / "runs/theirs/config.json").read_text())
    opened = store.open_store(published.repository / STORE)
    assert config["store_fingerprint"] == opened.manifest.fingerprint


def test_training_by_dvc_url_gives_the_same_saes(published, tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path / "project"))
    monkeypatch.setenv("GSAE_SHARD_CACHE", str(tmp_path / "cache"))
    url = f"dvc+{published.repository}@v1:{STORE}"
    assert run_cli("train", *SHORT, "--store", url, "--out", "runs/dvc") == 0
    assert read_weights(Path("runs/dvc")) == published.run
    assert json.loads(Path("runs/dvc/config.json").read_text())["store"] == url


@pytest.mark.parametrize("path", ["stores/other", "stores"])
def test_a_dvc_url_without_a_store_is_named(published, tmp_path, monkeypatch, capsys, path):
    monkeypatch.setenv("GSAE_SHARD_CACHE", str(tmp_path / "cache"))
    url = f"dvc+{published.repository}@v1:{path}"
    assert run_cli("store", "info", url) == 1
    assert f"store at {url}" in capsys.readouterr().err
    assert run_cli("store", "info", f"dvc+{published.repository}@v9:{path}") == 1
    assert "got v9, which it has not" in capsys.readouterr().err
    assert run_cli("store", "info", f"dvc+{tmp_path}/nowhere@v9:{path}") == 1
    assert f"repository at {tmp_path}/nowhere: expected" in capsys.readouterr().err


def flip(path: Path) -> None:
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def find_object(published: Published, objects: Path, path: str) -> Path:
    """Where a DVC remote has a file of the store, by its md5."""
    import hashlib

    content = (published.repository / STORE / path).read_bytes()
    md5 = hashlib.md5(content).hexdigest()
    return objects / "files/md5" / md5[:2] / md5[2:]


def test_a_corrupt_object_in_the_remote_is_never_trained_on(published, tmp_path, capsys):
    """With `verify true` DVC refuses it; where that was left out, the manifest does."""
    objects = tmp_path / "remote"
    shutil.copytree(published.objects, objects)
    flip(find_object(published, objects, ACTS))
    teammate = clone(published, tmp_path / "teammate")
    write_dvc_config(teammate, {"folder": {"url": str(objects)}})
    assert "failed" in run_tool("dvc", "pull", cwd=teammate, fails=True).lower()
    assert not (teammate / STORE / ACTS).exists()

    config = (teammate / ".dvc/config").read_text()
    (teammate / ".dvc/config").write_text(config.replace("verify = true", "verify = false"))
    run_tool("dvc", "pull", "-q", cwd=teammate)
    out = tmp_path / "run"
    assert run_cli("train", *SHORT, "--store", teammate / STORE, "--out", out) == 1
    assert run_cli("store", "verify", teammate / STORE) == 1
    printed = capsys.readouterr()
    assert ACTS in printed.err
    assert f"{ACTS}: other content" in printed.out
    assert f"pipeline store repair {teammate / STORE}" in printed.out
    assert not out.exists()


def test_a_lock_of_another_store_and_a_conflicted_one_are_caught(published, tmp_path, capsys):
    """DVC takes what dvc.lock says for the truth; the store's own manifest does not."""
    teammate = clone(published, tmp_path / "teammate")
    run_tool("dvc", "pull", "-q", cwd=teammate)
    file = teammate / STORE / ACTS
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-1])  # an edit in place that someone committed
    run_tool("dvc", "commit", "-q", "-f", "cache", cwd=teammate)
    assert "up to date" in run_tool("dvc", "status", cwd=teammate)
    assert run_cli("train", *SHORT, "--store", teammate / STORE, "--out", tmp_path / "run") == 1
    assert ACTS in capsys.readouterr().err

    lock = (teammate / "dvc.lock").read_text()
    (teammate / "dvc.lock").write_text(f"<<<<<<< ours\n{lock}=======\n{lock}>>>>>>> theirs\n")
    assert "dvc.lock" in run_tool("dvc", "pull", cwd=teammate, fails=True)
    commit_all(teammate, "a conflict")
    url = f"dvc+{teammate}@HEAD:{STORE}"
    assert run_cli("store", "info", url) == 1
    assert url in capsys.readouterr().err


def test_a_missing_dir_object_is_named(published, tmp_path, monkeypatch, capsys):
    objects = tmp_path / "remote"
    shutil.copytree(published.objects, objects)
    (listing,) = objects.glob("files/md5/*/*.dir")
    listing.unlink()
    teammate = clone(published, tmp_path / "teammate")
    write_dvc_config(teammate, {"folder": {"url": str(objects)}})
    commit_all(teammate, "another remote")
    run_tool("dvc", "pull", cwd=teammate, fails=True)
    monkeypatch.setenv("GSAE_SHARD_CACHE", str(tmp_path / "cache"))
    assert run_cli("store", "info", f"dvc+{teammate}@HEAD:{STORE}") == 1
    assert f"store at dvc+{teammate}@HEAD:{STORE}" in capsys.readouterr().err


@pytest.fixture
def server(published):
    with serve_http(published.repository / "stores") as server:
        yield server


def test_training_by_url_gives_the_same_saes_and_shows_no_secret(
    published, server, tmp_path, monkeypatch, capfd, caplog
):
    monkeypatch.chdir(make_project(tmp_path / "project"))
    server.query = f"X-Amz-Signature={SECRET}"
    url = server.url.replace("//", f"//user:{SECRET}@") + f"/tiny?{server.query}"
    settings = ("--set", f"run.shard_cache={tmp_path / 'cache'}", "--set", "run.shard_cache_gb=1")
    with caplog.at_level(logging.INFO):
        assert run_cli("train", *SHORT, *settings, "--store", url, "--out", "runs/http") == 0
        assert run_cli("store", "pull", url, "--shards", "0:1", "--json") == 0
    assert read_weights(Path("runs/http")) == published.run
    config = json.loads(Path("runs/http/config.json").read_text())
    assert config["store"] == f"{server.url}/tiny"

    server.query = "X-Amz-Signature=renewed"
    refused = spawn_cli("--debug", "train", *SHORT, *settings, "--store", url, cwd=Path.cwd())
    out, err = refused.communicate()
    assert refused.returncode == 1
    assert "AccessDenied" in err
    assert "HTTP 403" in err
    captured = capfd.readouterr()
    for text in (out, err, captured.out, captured.err, caplog.text):
        assert SECRET not in text
    for folder in (Path("runs"), Path("stores"), tmp_path / "cache"):
        assert any(folder.rglob("*"))
        for path in folder.rglob("*"):
            assert SECRET not in path.name
            assert not (path.is_file() and SECRET.encode() in path.read_bytes())


def test_the_first_batch_needs_two_shards_and_no_more(published, server, tmp_path, monkeypatch):
    monkeypatch.setenv("GSAE_SHARD_CACHE", str(tmp_path / "cache"))
    opened = store.open_store(f"{server.url}/tiny")
    plan = plan_stream(opened, hook=None, batch_size=512, epochs=1, seed=0, window=None)
    first = next(plan_batches(plan.rows_per_shard, batch_size=512, window=plan.window, seed=0))
    needed = {plan.shards[piece.shard] for piece in first}
    assert len(needed) == 2
    for path in read_tree(published.repository / STORE):
        parts = path.split("/c/")
        if len(parts) == 2 and int(parts[1].split("/")[0]) not in needed:
            server.faults[f"tiny/{path}"] = itertools.repeat(403)
    batches = stream_batches(opened, plan)
    assert next(batches).acts.shape == (512, 16)
    with pytest.raises(store.AccessDenied):
        list(batches)


def test_a_quick_check_asks_the_remote(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GSAE_SHARD_CACHE", str(tmp_path / "cache"))
    url = f"{server.url}/tiny"
    assert run_cli("store", "verify", "--quick", url) == 0
    server.faults = {f"tiny/{ACTS}": itertools.repeat(404)}
    assert run_cli("store", "verify", "--quick", url) == 1
    out = capsys.readouterr().out
    assert f"shard 0: {ACTS}: missing" in out
    assert "1 of 9 shards damaged. Tell its publisher, or pull from another copy." in out
    server.faults = {f"tiny/{ACTS}": itertools.repeat(403)}
    assert run_cli("store", "verify", "--quick", url) == 1
    assert "HTTP 403" in capsys.readouterr().err
    assert run_cli("store", "info", url) == 0
    assert "9; presence not checked on a remote" in capsys.readouterr().out


def test_pull_and_gc_say_what_they_did(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GSAE_SHARD_CACHE", str(tmp_path / "cache"))
    url = f"{server.url}/tiny"
    assert run_cli("store", "pull", url, "--shards", "1:3", "--layer", "1") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"2 of 9 shards in {STORE}: 12 files copied (")
    assert "--allow-partial" in out
    assert run_cli("store", "pull", url, "--shards", "1:3", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["files"], report["kept"], report["shards"]) == (0, 12, [1, 2])

    make_project(tmp_path)
    arguments = ("train", *SHORT, "--set", "train.batch_size=64", "--store", STORE)
    assert run_cli(*arguments) == 1
    assert "7 of 9 shards missing" in capsys.readouterr().err
    assert run_cli(*arguments, "--allow-partial", "--out", "runs/part") == 0
    config = json.loads(Path("runs/part/config.json").read_text())
    assert config["train"]["allow_partial"] is True

    store.open_store(url).read_slots(0, 0, 1)
    capsys.readouterr()
    assert run_cli("store", "gc", "--all", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["files"], report["kept_bytes"]) == (6, 0)
    assert run_cli("store", "gc", "--max-gb", "1") == 0
    assert "removed 0 files" in capsys.readouterr().out
    assert run_cli("store", "pull", url, "--shards", "1-3") == 2
    assert run_cli("store", "gc", "--all", "--max-gb", "1") == 2
