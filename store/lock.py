"""One writer per work folder."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from store.disk import disk_errors, make_folder
from store.errors import StoreLocked


@contextmanager
def lock_work(work: Path) -> Iterator[None]:
    """Hold the work folder's lock; the kernel releases it when the process dies, however it dies.

    Raises StoreLocked, naming the holder's host and PID, if another process has it; StoreError if
    the folder cannot be written.
    """
    holder = work / "holder.json"
    lock = FileLock(work / "lock")
    with disk_errors(work, needed_bytes=4096):
        make_folder(work)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise StoreLocked(
                f"work folder at {work}: expected no other writer, got "
                f"{_describe_holder(holder)}. "
                "Wait for it or stop it, then run `pipeline cache` again."
            ) from None
    try:
        with disk_errors(work, needed_bytes=4096):
            holder.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _describe_holder(holder: Path) -> str:
    try:
        fields = json.loads(holder.read_text())
        return f"process {fields['pid']} on host {fields['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
