"""Files that are whole and durable or not there, and what a disk refuses."""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from store.crash import crash_point
from store.errors import DiskFull, StoreError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_NO_LINKS = {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.EACCES}

_CACHE = "pipeline cache"


class WrittenFile(NamedTuple):
    bytes: int
    sha256: str


def free_bytes(path: Path) -> int:
    """Bytes that a file below `path`, which need not exist yet, could take."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def check_room(path: Path, needed_bytes: int, command: str = _CACHE) -> None:
    """Raise DiskFull unless the disk of `path` has room for `needed_bytes` of the command's."""
    free = free_bytes(path)
    if free < needed_bytes:
        raise DiskFull(_describe_full(path, needed_bytes, free, command))


@contextmanager
def disk_errors(path: Path, needed_bytes: int, command: str = _CACHE) -> Iterator[None]:
    """Turn a full disk into DiskFull, and a refusal to write into a StoreError naming `path`.

    `command` is the one to run again.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            free = free_bytes(path)
            raise DiskFull(_describe_full(path, needed_bytes, free, command)) from error
        if error.errno in _REFUSED:
            raise StoreError(
                f"folder at {path}: expected one that can be written, got {error.strerror} for "
                f"{error.filename}. Make it writable or choose another folder (--out)."
            ) from error
        raise


def make_folder(path: Path) -> None:
    """Make a folder and its parents, durably."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def write_durably(
    path: Path, pieces: Iterable[bytes | memoryview], *, scratch: Path, kind: str = "file"
) -> WrittenFile:
    """Write `path` so that after a crash it is whole or absent.

    A temporary name in `scratch`, a folder on the same file system; fsync, rename, fsync folder.
    `kind` names the crash points on the way.
    """
    temporary = scratch / uuid.uuid4().hex
    make_folder(scratch)
    make_folder(path.parent)
    digest, n_bytes = hashlib.sha256(), 0
    crash_point(f"before-write:{kind}")
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                n_bytes += memoryview(piece).nbytes
            file.flush()
            crash_point(f"after-write:{kind}")
            os.fsync(file.fileno())
        rename_durably(temporary, path, kind=kind)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return WrittenFile(n_bytes, digest.hexdigest())


def rename_durably(source: Path, target: Path, *, kind: str) -> None:
    """Give a durable file its name, whatever has it: a folder there is deleted."""
    crash_point(f"before-rename:{kind}")
    if target.is_dir():
        remove(target)
    source.rename(target)
    crash_point(f"after-rename:{kind}")
    fsync_folder(target.parent)


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def link_tree(source: Path, target: Path) -> None:
    """Make `target` a durable copy of `source`, by hard links where the file system allows them."""
    make_folder(target)
    for entry in sorted(source.iterdir()):
        if entry.is_dir():
            link_tree(entry, target / entry.name)
        else:
            _link_or_copy(entry, target / entry.name)
            crash_point("between-links")
    fsync_folder(target)


def put_link(source: Path, target: Path, *, scratch: Path) -> None:
    """Make `target` durably the same file as `source`, whatever was there; never writes into it.

    What was there may have other names, such as one in DVC's cache, and they keep its content.
    """
    temporary = scratch / uuid.uuid4().hex
    make_folder(scratch)
    make_folder(target.parent)
    try:
        _link_or_copy(source, temporary)
        rename_durably(temporary, target, kind="link")
    finally:
        temporary.unlink(missing_ok=True)  # a rename to the same file does nothing


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        shutil.copyfile(source, target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())


def _describe_full(path: Path, needed_bytes: int, free: int, command: str) -> str:
    kept = "committed shards are" if command == _CACHE else "what is whole is"
    return (
        f"disk at {path}: expected room for {needed_bytes:,} bytes, got {free:,}. "
        f"Make room and run `{command}` again: {kept} kept."
    )
