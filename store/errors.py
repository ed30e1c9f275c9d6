"""What can go wrong with a store.

    StoreError
    ├── StoreNotFound       there is no store at that path
    ├── ManifestError       the manifest is unreadable, or disagrees with itself or with zarr.json
    ├── StoreMismatch       the store is not the one asked for (a field-by-field difference)
    ├── ShardMissing        a shard that is needed is not there or was never committed
    ├── ShardCorrupt        a shard's bytes are not those that were written
    ├── NumberRangeError    values that the number format cannot hold, or NaN and Inf
    ├── StoreLocked         another process is writing; names its host and PID
    └── DiskFull            not enough room; names the bytes needed

Every message says what, where, expected and got, and which command to run next.
"""


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


class DiskFull(StoreError):
    """The disk has not enough room."""
