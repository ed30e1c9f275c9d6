"""A Zarr store of a language model's activations and gradients: exactly what was written.

    import store
    rows = store.open_store("stores/demo").read_block(3)
    rows.acts, rows.grads                                   # [context_length, d_model]

Writing is prepare_work, write_shard for each shard, publish. docs/format.md is the format.
"""

from store.errors import (
    DiskFull,
    ManifestError,
    NumberRangeError,
    ShardCorrupt,
    ShardMissing,
    StoreError,
    StoreLocked,
    StoreMismatch,
    StoreNotFound,
)
from store.layout import ShardSpec, StoreLayout, permute_rows, plan_shards
from store.manifest import Manifest, StoreSpec, diff_identities, fingerprint_of
from store.publication import find_published, publish
from store.reader import ActivationStore, Rows, Token, open_store
from store.stream import Batch, count_rows, stream_batches
from store.writer import (
    ShardRows,
    committed_shards,
    lock_work,
    prepare_work,
    required_bytes,
    sweep,
    write_shard,
)

__all__ = [
    "ActivationStore",
    "Batch",
    "DiskFull",
    "Manifest",
    "ManifestError",
    "NumberRangeError",
    "Rows",
    "ShardCorrupt",
    "ShardMissing",
    "ShardRows",
    "ShardSpec",
    "StoreError",
    "StoreLayout",
    "StoreLocked",
    "StoreMismatch",
    "StoreNotFound",
    "StoreSpec",
    "Token",
    "committed_shards",
    "count_rows",
    "diff_identities",
    "find_published",
    "fingerprint_of",
    "lock_work",
    "open_store",
    "permute_rows",
    "plan_shards",
    "prepare_work",
    "publish",
    "required_bytes",
    "stream_batches",
    "sweep",
    "write_shard",
]
