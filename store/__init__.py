"""A Zarr store of a language model's activations and gradients: exactly what was written.

    import store
    rows = store.open_store("stores/demo").read_block(3)
    rows.acts, rows.grads                                   # [context_length, d_model]

Writing is prepare_work, write_shard for each shard, publish. docs/format.md is the format.
"""

from store.blocks import BlockBatch, stream_blocks
from store.errors import (
    AccessDenied,
    DiskFull,
    ManifestError,
    NumberRangeError,
    ShardCorrupt,
    ShardMissing,
    StoreError,
    StoreLocked,
    StoreMismatch,
    StoreNotFound,
    StoreUnreachable,
)
from store.identity import diff_identities, fingerprint_of
from store.layout import ShardSpec, StoreLayout, permute_rows, plan_shards
from store.lock import lock_work
from store.manifest import Manifest, StoreSpec
from store.mixing import Mixedness
from store.publication import find_published, publish, sweep_aside
from store.reader import ActivationStore, Rows, Token, open_store
from store.stream import Batch, stream_batches
from store.stream_plan import (
    StreamPlan,
    StreamState,
    count_rows,
    find_mixedness,
    plan_stream,
    resume_batch,
    stream_memory_bytes,
)
from store.work import committed_shards, sweep
from store.writer import ShardRows, prepare_work, required_bytes, write_shard

__all__ = [
    "AccessDenied",
    "ActivationStore",
    "Batch",
    "BlockBatch",
    "DiskFull",
    "Manifest",
    "ManifestError",
    "Mixedness",
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
    "StoreUnreachable",
    "StreamPlan",
    "StreamState",
    "Token",
    "committed_shards",
    "count_rows",
    "diff_identities",
    "find_mixedness",
    "find_published",
    "fingerprint_of",
    "lock_work",
    "open_store",
    "permute_rows",
    "plan_shards",
    "plan_stream",
    "prepare_work",
    "publish",
    "required_bytes",
    "resume_batch",
    "stream_batches",
    "stream_blocks",
    "stream_memory_bytes",
    "sweep",
    "sweep_aside",
    "write_shard",
]
