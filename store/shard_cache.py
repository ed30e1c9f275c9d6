"""A bounded folder of verified shard files, shared by all processes of this machine.

    <root>/<sha256[:2]>/<sha256>     a file, named by its content; touched when used
    <root>/partial/<sha256>.<bytes>  one being downloaded, with the size that it will have
    <root>/locks/<sha256>.lock       held by who downloads it; the kernel's, so it dies with it
    <root>/lock                      held while room is made

Files and partials together stay under the limit: room for a download is made before it starts, by
removing the least recently used files. A reader's open descriptor outlives its file's name.
"""

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from store.disk import free_bytes, remove, rename_durably
from store.download import MissingFile, fill_verified
from store.errors import DiskFull, StoreError
from store.manifest import FileRecord

DEFAULT_GB = 50.0
_POLL_S = 0.05


class Collected(NamedTuple):
    """What `ShardCache.collect` did."""

    files: int  # removed, partials of dead processes among them
    bytes: int  # removed
    kept_bytes: int


class _Entry(NamedTuple):
    used: float  # seconds since the epoch
    bytes: int
    path: Path


class ShardCache:
    """Verified files by their content. `root` and the limit default to find_root, find_limit."""

    def __init__(self, root: str | Path | None = None, limit_bytes: int | None = None) -> None:
        self.root = find_root() if root is None else Path(root)
        self.limit_bytes = find_limit() if limit_bytes is None else limit_bytes

    def open(self, file: FileRecord, download: Callable[[Path], object], where: str) -> int:
        """A descriptor of the file, after `download` (into a path) if it is not here.

        One process downloads, others wait for it. Raises what `download` raises, ShardCorrupt where
        its result is not the recorded content, DiskFull, and StoreError for a file beyond the limit
        or a folder that cannot be written.
        """
        found = self._take(file)
        if found is not None:
            return found
        if file.bytes > self.limit_bytes:
            raise StoreError(
                f"shard cache at {self.root}: expected a limit of at least {file.bytes:,} bytes, "
                f"got {self.limit_bytes:,}. Raise run.shard_cache_gb (or GSAE_SHARD_CACHE_GB)."
            )
        with self._lock(file.sha256):
            found = self._take(file)  # another process was first
            return self._fetch(file, download, where) if found is None else found

    def discard(self, file: FileRecord, descriptor: int) -> None:
        """Remove the file if it is still the one that `descriptor` reads."""
        with self._local_errors(needed_bytes=0), suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(self._locate(file).stat(), os.fstat(descriptor)):
                remove(self._locate(file))

    def collect(self, limit_bytes: int) -> Collected:
        """Remove dead partials, then least recently used files until the rest fits the limit."""
        if not self.root.is_dir():
            return Collected(0, 0, 0)
        with self._local_errors(needed_bytes=0), FileLock(self.root / "lock"):
            before = self._list_files() + self._list_partials()
            self._make_room(limit_bytes)
            after = self._list_files() + self._list_partials()
        removed, kept = (sum(entry.bytes for entry in entries) for entries in (before, after))
        return Collected(len(before) - len(after), removed - kept, kept)

    def _locate(self, file: FileRecord) -> Path:
        return self.root / file.sha256[:2] / file.sha256

    @contextmanager
    def _lock(self, sha256: str, timeout: float = -1.0) -> Iterator[None]:
        folder = self.root / "locks"
        with self._local_errors(needed_bytes=0):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / f"{sha256}.lock", timeout=timeout)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _take(self, file: FileRecord) -> int | None:
        path = self._locate(file)
        with self._local_errors(needed_bytes=0):
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except (FileNotFoundError, NotADirectoryError):
                return None
        found = os.fstat(descriptor)
        if found.st_size != file.bytes or not stat.S_ISREG(found.st_mode):
            try:
                self.discard(file, descriptor)
            finally:
                os.close(descriptor)
            return None
        with suppress(PermissionError):  # another user's, in a cache that users share
            os.utime(descriptor)
        return descriptor

    def _fetch(self, file: FileRecord, download: Callable[[Path], object], where: str) -> int:
        path, partial = self._locate(file), self._reserve(file)
        descriptor = None
        try:
            with self._local_errors(file.bytes):
                fill_verified(partial, file, download, where)
                descriptor = os.open(partial, os.O_RDONLY)  # before others can evict it
                path.parent.mkdir(exist_ok=True)
                rename_durably(partial, path, kind="cached")
        except BaseException:
            with suppress(OSError):  # the first error tells more
                remove(partial)
            if descriptor is not None:
                os.close(descriptor)
            raise
        return descriptor

    def _reserve(self, file: FileRecord) -> Path:
        """An empty partial, its full size accounted for; waits while other downloads fill it."""
        partial = self.root / "partial" / f"{file.sha256}.{file.bytes}"
        with self._local_errors(file.bytes):
            partial.parent.mkdir(exist_ok=True)
            remove(partial)  # a dead process's: its lock is ours
            while True:
                with FileLock(self.root / "lock"):
                    if self._make_room(self.limit_bytes - file.bytes):
                        partial.touch()
                        return partial
                time.sleep(_POLL_S)

    def _make_room(self, limit_bytes: int) -> bool:
        """Remove what is needed to get under the limit; whether that was possible."""
        for partial in self._list_partials():
            with suppress(Timeout), self._lock(partial.path.stem, timeout=0.0):
                remove(partial.path)  # nobody downloads it any more
        coming = sum(entry.bytes for entry in self._list_partials())
        if coming > limit_bytes:
            return False
        files = sorted(self._list_files())
        total = coming + sum(entry.bytes for entry in files)
        for entry in files:
            if total <= limit_bytes:
                break
            remove(entry.path)
            total -= entry.bytes
        return True

    def _list_files(self) -> list[_Entry]:
        entries = []
        for path in self.root.glob("[0-9a-f][0-9a-f]/*"):
            with suppress(FileNotFoundError):
                found = path.stat()
                entries.append(_Entry(found.st_mtime, found.st_size, path))
        return entries

    def _list_partials(self) -> list[_Entry]:
        return [
            _Entry(0, int(path.suffix[1:]), path)
            for path in self.root.glob("partial/*")
            if path.suffix[1:].isdigit()
        ]

    @contextmanager
    def _local_errors(self, needed_bytes: int) -> Iterator[None]:
        try:
            yield
        except MissingFile:
            raise  # the source's
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFull(
                    f"disk of the shard cache at {self.root}: expected room for {needed_bytes:,} "
                    f"bytes, got {free_bytes(self.root):,}. Make room (`pipeline store gc`) or "
                    "name a folder elsewhere (run.shard_cache), then run the same command again."
                ) from None
            if isinstance(error, Timeout):
                raise
            raise StoreError(
                f"shard cache at {self.root}: expected a folder that can be written, got "
                f"{error.strerror or error}. Name another with run.shard_cache or GSAE_SHARD_CACHE."
            ) from None


def find_root() -> Path:
    """GSAE_SHARD_CACHE, else the user's cache folder."""
    if named := os.environ.get("GSAE_SHARD_CACHE"):
        return Path(named)
    import platformdirs

    return platformdirs.user_cache_path("gsae-pipeline") / "shards"


def find_limit() -> int:
    """Bytes in GSAE_SHARD_CACHE_GB, else in 50 GB. Raises StoreError if that is no number."""
    named = os.environ.get("GSAE_SHARD_CACHE_GB", str(DEFAULT_GB))
    try:
        limit = int(float(named) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise StoreError(
            f"GSAE_SHARD_CACHE_GB: expected a number of gigabytes, got {named!r}. Set one, or none."
        )
    return limit
