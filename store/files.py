"""Where a store's files are, as a reader sees them: a folder, or a remote behind a cache.

A reader asks for small files whole (`read_bytes`: the manifest and the Zarr metadata) and for shard
files as open descriptors (`open`). Neither vouches for content: the manifest's checksums do, in the
reader. `copy` does, for it makes a file that outlives the store it came from.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol, runtime_checkable

from store.download import fill_verified
from store.manifest import FileRecord


@runtime_checkable
class StoreFiles(Protocol):
    """The files of one store, by their path inside it."""

    @property
    def where(self) -> str:
        """The store's path or URL for messages and records; never with credentials."""
        ...

    @property
    def room_bytes(self) -> int | None:
        """Bytes of shard files that can be here at a time, None where all of them are.

        A reader that goes back and forth between files of more bytes fetches them anew each time.
        """
        ...

    def locate(self, path: str) -> str:
        """A file's path or URL for messages; never with credentials."""
        ...

    def read_bytes(self, path: str) -> bytes:
        """A small file's content. Raises FileNotFoundError or NotADirectoryError without one."""
        ...

    def find_size(self, path: str, file: FileRecord) -> int | None:
        """A shard file's size, None where it is missing; `file`'s own where asking costs a trip."""
        ...

    def ask_size(self, path: str, file: FileRecord) -> int | None:
        """As find_size, but asks whatever it costs; `file`'s own where a server does not say."""
        ...

    def open(self, path: str, file: FileRecord) -> AbstractContextManager[int]:
        """A descriptor of a shard file, on this machine. Raises FileNotFoundError without one."""
        ...

    def copy(self, path: str, file: FileRecord, target: Path) -> None:
        """Write a shard file's content to `target`, durably, which has it whole and verified.

        Raises FileNotFoundError without one, ShardCorrupt where it is not the recorded content;
        `target` is then not to be used.
        """
        ...

    def prefetch(self, files: Sequence[tuple[str, FileRecord]]) -> None:
        """Start to fetch these in the background, in this order, after those asked for before.

        What goes wrong is raised when the file is opened.
        """
        ...

    def cancel_prefetch(self) -> None:
        """Forget the files that were asked for ahead; those that nobody opens hold up others."""
        ...


class LocalFiles:
    """A store's files in a folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def where(self) -> str:
        return str(self.folder)

    @property
    def room_bytes(self) -> None:
        return None

    def locate(self, path: str) -> str:
        return str(self.folder / path)

    def read_bytes(self, path: str) -> bytes:
        return (self.folder / path).read_bytes()

    def find_size(self, path: str, file: FileRecord) -> int | None:  # noqa: ARG002
        try:
            return (self.folder / path).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def ask_size(self, path: str, file: FileRecord) -> int | None:
        return self.find_size(path, file)

    @contextmanager
    def open(self, path: str, file: FileRecord) -> Iterator[int]:  # noqa: ARG002
        descriptor = os.open(self.folder / path, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def copy(self, path: str, file: FileRecord, target: Path) -> None:
        source = self.folder / path
        where = self.locate(path)
        fill_verified(target, file, lambda partial: shutil.copyfile(source, partial), where)

    def prefetch(self, files: Sequence[tuple[str, FileRecord]]) -> None:
        """Nothing: they are here."""

    def cancel_prefetch(self) -> None:
        """Nothing: none were fetched."""
