"""A store behind a URL: small files fetched when asked for, shard files through the shard cache.

    s3://bucket/folder           credentials as boto3 finds them; AWS_ENDPOINT_URL for other servers
    https://host/folder?query    the query, such as a signature, goes with each request; ~/.netrc
    ssh://user@host:port/folder  ~/.ssh and ssh-agent; the host's key must be known
    dvc+<git>@<rev>:<folder>     a path or URL of a git repository, with its DVC remote
    file:///folder

Bytes are data: nothing here loads or runs what a store holds.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from store.backends import Remote, plan_dvc, plan_http, plan_s3, plan_ssh, strip_url
from store.download import Place, Retry, fill_verified, source_errors, try_often
from store.errors import ShardCorrupt, StoreError
from store.files import LocalFiles, StoreFiles
from store.manifest import FileRecord
from store.shard_cache import ShardCache

T = TypeVar("T")

DOWNLOADS = 4  # at a time, in the background


class RemoteFiles:
    """A remote store's files; `store.files.StoreFiles` explains the methods.

    Raises beside what they say: AccessDenied, StoreUnreachable, DiskFull of the cache.
    """

    def __init__(
        self, remote: Remote, *, cache: ShardCache | None = None, retry: Retry | None = None
    ) -> None:
        self.where = remote.where
        self.cache = cache or ShardCache()
        self._remote = remote
        self._retry = retry or Retry()
        self._connecting, self._connection = threading.Lock(), None
        self._planning = threading.Lock()  # of the three below
        self._waiting: deque[tuple[str, FileRecord]] = deque()
        self._ahead: dict[str, int] = {}  # bytes of files prefetched and not yet opened, by sha256
        self._running = 0

    @property
    def room_bytes(self) -> int:
        return self.cache.limit_bytes

    def locate(self, path: str) -> str:
        return f"{self.where}/{path}"

    def read_bytes(self, path: str) -> bytes:
        def attempt() -> bytes:
            return self._ask(path, lambda system, address: system.cat_file(address))

        return try_often(attempt, self._retry)

    def find_size(self, path: str, file: FileRecord) -> int | None:  # noqa: ARG002
        return file.bytes

    def ask_size(self, path: str, file: FileRecord) -> int | None:
        def attempt() -> int | None:
            return self._ask(path, _find_size)

        try:
            found = try_often(attempt, self._retry)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return file.bytes if found is None else found

    @contextmanager
    def open(self, path: str, file: FileRecord) -> Iterator[int]:
        self._forget(file)
        descriptor = self._open_cached(path, file)
        try:
            yield descriptor
        except ShardCorrupt as error:
            self.cache.discard(file, descriptor)
            raise ShardCorrupt(
                f"{error} That was the copy in the shard cache, now removed: the same command "
                "fetches it anew."
            ) from None
        finally:
            os.close(descriptor)

    def copy(self, path: str, file: FileRecord, target: Path) -> None:
        def attempt() -> None:
            fill_verified(target, file, self._downloader(path, file), self.locate(path))

        try_often(attempt, self._retry)

    def prefetch(self, files: Sequence[tuple[str, FileRecord]]) -> None:
        """Bounded by half of the cache's limit, so that nothing is evicted before it is read."""
        with self._planning:
            asked = self._ahead.keys() | {file.sha256 for _, file in self._waiting}
            self._waiting.extend(item for item in files if item[1].sha256 not in asked)
        self._start_downloads()

    def cancel_prefetch(self) -> None:
        with self._planning:
            self._waiting.clear()
            self._ahead.clear()

    def _open_cached(self, path: str, file: FileRecord) -> int:
        def attempt() -> int:
            return self.cache.open(file, self._downloader(path, file), self.locate(path))

        return try_often(attempt, self._retry)

    def _start_downloads(self) -> None:
        """A thread for each waiting file that fits, up to DOWNLOADS; no thread outlives its file.

        They are daemons: the end of the program does not wait for them, and the cache needs no
        farewell.
        """
        with self._planning:
            while self._waiting and self._running < DOWNLOADS:
                path, file = self._waiting[0]
                if self._ahead and sum(self._ahead.values()) + file.bytes > self.room_bytes // 2:
                    return
                self._waiting.popleft()
                self._ahead[file.sha256] = file.bytes
                self._running += 1
                threading.Thread(
                    target=self._download_ahead, args=(path, file), name="shard-fetch", daemon=True
                ).start()

    def _download_ahead(self, path: str, file: FileRecord) -> None:
        try:
            os.close(self._open_cached(path, file))
        except (StoreError, OSError):
            self._forget(file)  # whoever opens the file meets the same
        finally:
            with self._planning:
                self._running -= 1
            self._start_downloads()

    def _forget(self, file: FileRecord) -> None:
        """The file needs no fetching ahead any more."""
        with self._planning:
            known = self._ahead.pop(file.sha256, None) is not None
            if not known and self._waiting:
                self._waiting = deque(item for item in self._waiting if item[1] != file)
        if known:
            self._start_downloads()

    def _downloader(self, path: str, file: FileRecord) -> Callable[[Path], None]:
        """What makes one attempt to bring a file's content."""

        def download(partial: Path) -> None:
            def get(system: Any, address: str) -> None:
                self._remote.download(system, address, partial, file)

            self._ask(path, get, partial)

        return download

    def _ask(self, path: str, action: Callable[[Any, str], T], partial: Path | None = None) -> T:
        """The action's result with the file system and the file's address; one attempt."""
        place = Place(self.locate(path), self._remote.credentials)
        try:
            with source_errors(place, self._retry.attempts, partial):
                return action(self._connect(), self._remote.address(path))
        except Exception:
            if self._remote.reconnect:
                self._connection = None
            raise

    def _connect(self) -> Any:
        with self._connecting:
            if self._connection is None:
                self._connection = self._remote.connect()
            return self._connection


def _find_size(system: Any, address: str) -> int | None:
    """What the remote says of a file, without its content; None where it says no size."""
    try:
        return system.info(address).get("size")
    except FileNotFoundError as error:  # fsspec makes it of every HTTP failure
        raise error.__cause__ or error from None


def open_remote(
    url: str, *, cache: ShardCache | None = None, retry: Retry | None = None
) -> StoreFiles:
    """The files of the store at a URL; connects when the first is read.

    Raises StoreError for a URL that is none of those above, or whose library is not installed.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise StoreError(
            "store's URL: expected one such as s3://bucket/folder, got one that cannot be parsed. "
            "Correct it."
        ) from None
    if url.startswith("dvc+"):
        remote = plan_dvc(url)
    elif parts.scheme in ("http", "https") and parts.netloc:
        remote = plan_http(parts)
    elif parts.scheme == "s3" and parts.netloc:
        remote = plan_s3(parts)
    elif parts.scheme == "ssh" and parts.hostname:
        remote = plan_ssh(parts, port)
    elif parts.scheme == "file":
        return LocalFiles(unquote(parts.path))
    else:
        raise StoreError(
            f"store at {strip_url(url)}: expected s3://, https://, http://, ssh://, file:// or "
            "dvc+<git>@<rev>:<folder>, got another kind of URL. Name one of these, or a path."
        )
    return RemoteFiles(remote, cache=cache, retry=retry)
