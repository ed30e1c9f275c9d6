"""What can go wrong with a store.

    StoreError
    ├── StoreNotFound       there is no store at that path
    ├── ManifestError       the manifest is unreadable, or disagrees with itself or with zarr.json
    ├── StoreMismatch       the store is not the one asked for (a field-by-field difference)
    ├── ShardMissing        a shard that is needed is not there or was never committed
    ├── ShardCorrupt        a shard's bytes are not those that were written
    ├── NumberRangeError    values that the number format cannot hold, or NaN and Inf
    ├── StoreLocked         another process is writing; names its host and PID
    ├── AccessDenied        a remote refuses to hand out a file (403, expired or no credentials)
    ├── StoreUnreachable    a remote kept failing through all retries
    └── DiskFull            not enough room; names the bytes needed

Every message says what, where, expected and got, and which command to run next.
"""

from pathlib import Path


def is_url(where: str) -> bool:
    """Whether a store is behind a URL; otherwise it is at a path."""
    return "://" in where or where.startswith("dvc+")


def mend(where: str) -> str:
    """What to do about damage of a store, or of its file, at this path or URL."""
    if is_url(where):
        return (
            "Run the same command again. If it is so again, tell its publisher, or pull from "
            "another copy."
        )
    return f"Run `pipeline store repair {_find_store(Path(where))}`."


def _find_store(path: Path) -> Path:
    """The store that a file is in, by its manifest.json or, without it, the outermost zarr.json."""
    folder = path if path.is_dir() else path.parent
    found = folder
    for parent in (folder, *folder.parents):
        if (parent / "manifest.json").exists():
            return parent
        if (parent / "zarr.json").exists():
            found = parent
    return found


class StoreError(Exception):
    """Base of every error that a store raises."""


class StoreNotFound(StoreError):
    """There is no store at that path."""


class ManifestError(StoreError):
    """The manifest is unreadable, or disagrees with itself or with the Zarr metadata."""


class StoreMismatch(StoreError):
    """The store is not the one that was asked for."""


class ShardMissing(StoreError):
    """A shard is not there or was never committed."""


class ShardCorrupt(StoreError):
    """A shard's bytes are not those that were written."""


class NumberRangeError(StoreError):
    """Values are not finite, or too many leave the number format's range."""


class StoreLocked(StoreError):
    """Another process is writing to the same store."""


class AccessDenied(StoreError):
    """A remote refuses: 401, 403, expired credentials or none."""


class StoreUnreachable(StoreError):
    """A remote kept failing through all retries."""


class DiskFull(StoreError):
    """The disk has not enough room."""
