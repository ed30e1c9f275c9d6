"""One writer; the lock of a dead process is free, and its note misleads nobody."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from store.errors import StoreError, StoreLocked
from store.lock import lock_work

HOST = socket.gethostname()
HOLD = """
import sys, time
from pathlib import Path
from store.lock import lock_work
with lock_work(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


@pytest.fixture
def other(work):
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, work], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def find_dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def refusal(work):
    with pytest.raises(StoreLocked) as caught, lock_work(work):
        pass
    return str(caught.value)


def test_second_writer_is_told_who_holds_it(work, other):
    assert f"got process {other.pid} on host {HOST}. Wait" in refusal(work)
    assert json.loads((work / "holder.json").read_text())["pid"] == other.pid


def test_a_dead_process_leaves_a_note_and_no_lock(work, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (work / "holder.json").exists()
    with lock_work(work):
        assert json.loads((work / "holder.json").read_text()) == {"host": HOST, "pid": os.getpid()}
    assert sorted(path.name for path in work.iterdir()) == ["lock"]


@pytest.mark.usefixtures("other")
def test_a_dead_process_note_misleads_nobody(work):
    """Between taking the lock and writing the note, the former holder's is still there."""
    dead = find_dead_pid()
    (work / "holder.json").write_text(json.dumps({"host": HOST, "pid": dead}))
    message = refusal(work)
    assert str(dead) not in message
    assert f"another process on host {HOST}" in message


@pytest.mark.usefixtures("other")
def test_a_note_from_another_host_is_repeated(work):
    (work / "holder.json").write_text(json.dumps({"host": "node7", "pid": find_dead_pid()}))
    assert "on host node7" in refusal(work)


@pytest.mark.usefixtures("other")
@pytest.mark.parametrize("note", ["{", "{}", "[]", '{"host": "a", "pid": "x"}', None])
def test_unreadable_note_still_refuses(work, note):
    (work / "holder.json").unlink()
    if note is not None:
        (work / "holder.json").write_text(note)
    assert "got another process." in refusal(work)


def test_one_process_cannot_take_it_twice(work):
    with lock_work(work):
        assert f"process {os.getpid()}" in refusal(work)
    with lock_work(work):
        pass


def test_released_after_an_error(work):
    with pytest.raises(ZeroDivisionError), lock_work(work):
        raise ZeroDivisionError
    with lock_work(work):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_named(work, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StoreError, match=rf"{work}.*a file system with locks \(flock\), got"):
        lock_work(work).__enter__()


def test_a_folder_of_another_owner_is_named(tmp_path):
    """As another user, in a folder that root owns."""
    folder = tmp_path / "stores"
    folder.mkdir(mode=0o755)
    for parent in tmp_path.parents:  # pytest's own folders are private to root
        if parent.name.startswith("pytest-"):
            parent.chmod(0o755)
    tmp_path.chmod(0o755)
    code = """
import os, sys
from pathlib import Path
from store.errors import StoreError
from store.lock import lock_work
os.setuid(65534)
try:
    with lock_work(Path(sys.argv[1])):
        print("held")
except StoreError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, folder / ".work/x"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.startswith(f"folder at {folder}/.work/x: expected one that can be written")
    assert "Permission denied" in done.stdout
    assert not (folder / ".work").exists()
