"""Stores with arrays as wide as real ones, for benchmarks and for tests of memory."""

import numpy as np

import store
from store.numbers import FORMATS


def make_wide_spec(
    n_shards: int,
    blocks_per_shard: int,
    *,
    context: int,
    d_model: int,
    numbers: str = "float16",
    compression: str = "none",
    hook: str = "h",
    chunk_bytes: int = 2**20,
) -> store.StoreSpec:
    """`n_shards` whole shards of whole blocks; acts and grads in one number format."""
    row_bytes = d_model * FORMATS[numbers].disk.itemsize
    return store.StoreSpec(
        identity={"numbers": numbers, "compression": compression},
        hooks=(hook,),
        d_model=d_model,
        context_length=context,
        acts_dtype=numbers,
        grads_dtype=numbers,
        compression=compression,
        seed=0,
        layout=store.plan_shards(
            np.full(n_shards * blocks_per_shard, context, np.int32),
            context_length=context,
            bytes_per_row=row_bytes,
            shard_bytes=blocks_per_shard * context * row_bytes,
            min_shards=n_shards,
            chunk_bytes=chunk_bytes,
        ),
    )
