"""One writer per work folder.

The lock is the kernel's (flock on <work>/lock), which ends with the process that holds it, however
it ends. <work>/holder.json is a note of who that is, for the message that others get.
"""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from store.disk import disk_errors, make_folder
from store.errors import StoreError, StoreLocked

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


@contextmanager
def lock_work(work: Path) -> Iterator[None]:
    """Hold the work folder's lock.

    Raises StoreLocked, naming the holder's host and PID, if another process has it; StoreError if
    the folder cannot be written or its file system has no locks.
    """
    holder = work / "holder.json"
    with disk_errors(work, needed_bytes=4096):
        make_folder(work)
        lock = os.open(work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _acquire(lock, work, holder)
        with disk_errors(work, needed_bytes=4096):
            _write_note(holder)
        try:
            yield
        finally:
            holder.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _acquire(lock: int, work: Path, holder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreLocked(
            f"work folder at {work}: expected no other writer, got {_describe_holder(holder)}. "
            "Wait for it or stop it, then run `pipeline cache` again."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise StoreError(
            f"work folder at {work}: expected a file system with locks (flock), got "
            f"{error.strerror}. Choose an --out on another, or mount it with locks."
        ) from None


def _write_note(holder: Path) -> None:
    """Under another name first: who reads it meanwhile finds the former note or this one."""
    draft = holder.with_suffix(".new")
    draft.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
    draft.rename(holder)


def _describe_holder(holder: Path) -> str:
    """What the note says, unless it is a dead process's: then the holder has not written its own.

    A PID of another host tells nothing here.
    """
    try:
        fields = json.loads(holder.read_text())
        host, pid = str(fields["host"]), int(fields["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
    if host == socket.gethostname() and not _is_alive(pid):
        return f"another process on host {host}, which has not said yet who it is"
    return f"process {pid} on host {host}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
