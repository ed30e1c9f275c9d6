"""One writer; the lock of a dead process is free."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from store.errors import StoreLocked
from store.lock import lock_work

HOLD = """
import sys, time
from pathlib import Path
from store.lock import lock_work
with lock_work(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_second_writer_is_told_who_holds_it(tmp_path):
    work = tmp_path / "work"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, work], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        expected = f"process {holder.pid} on host {socket.gethostname()}"
        with pytest.raises(StoreLocked, match=expected), lock_work(work):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with lock_work(work):  # the dead holder's note is still there, its lock is not
        assert str(os.getpid()) in (work / "holder.json").read_text()
    assert not (work / "holder.json").exists()


def test_unreadable_note_still_refuses(tmp_path):
    with lock_work(tmp_path):
        (tmp_path / "holder.json").write_text("{")
        with pytest.raises(StoreLocked, match="got another process"), lock_work(tmp_path):
            pass


def test_released_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), lock_work(tmp_path):
        raise ZeroDivisionError
    with lock_work(tmp_path):
        pass
