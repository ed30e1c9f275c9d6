"""Stores of a few hundred rows, and the rows that were written into them."""

from pathlib import Path

import numpy as np
import torch

import store
from store import ShardRows, ShardSpec, StoreSpec
from store.numbers import FORMATS, decode_numbers, encode_numbers

HOOK = "blocks.7.hook_resid_post"
CONTEXT = 8
PACKED = np.full(21, CONTEXT, np.int32)
PADDED = np.array([8, 3, 1, 8, 5, 2, 2, 8, 7, 1, 1, 1, 1, 1, 6, 8, 8, 4, 1, 1, 1], np.int32)


def make_spec(
    lengths: np.ndarray = PACKED,
    *,
    hooks: tuple[str, ...] = (HOOK,),
    d_model: int = 5,
    acts_dtype: str = "float16",
    grads_dtype: str = "bfloat16",
    seed: int = 3,
    min_shards: int = 4,
    weights: str = "w0",
    compression: str = "none",
) -> StoreSpec:
    """Shards of four blocks in two chunks where there are 21 blocks."""
    layout = store.plan_shards(
        lengths,
        context_length=CONTEXT,
        bytes_per_row=d_model * 2,
        shard_bytes=4 * CONTEXT * d_model * 2,
        chunk_bytes=2 * CONTEXT * d_model * 2,
        min_shards=min_shards,
    )
    return StoreSpec(
        identity={"weights": weights, "seed": seed, "lengths": lengths.tolist()},
        hooks=hooks,
        d_model=d_model,
        context_length=CONTEXT,
        acts_dtype=acts_dtype,
        grads_dtype=grads_dtype,
        seed=seed,
        layout=layout,
        compression=compression,
    )


def make_rows(spec: StoreSpec, shard: ShardSpec) -> ShardRows:
    """Rows that depend on nothing but the shard's number and the lengths in the identity."""
    generator = torch.Generator().manual_seed(shard.index)
    end = shard.first_block + shard.n_blocks
    lengths = spec.identity["lengths"][shard.first_block : end]

    def draw() -> dict[str, torch.Tensor]:
        shape = (shard.n_rows, spec.d_model)
        return {hook: torch.randn(shape, generator=generator) for hook in spec.hooks}

    return ShardRows(
        acts=draw(),
        grads=draw(),
        tokens=torch.randint(0, 50257, (shard.n_rows,), generator=generator).int(),
        loss=torch.rand(shard.n_rows, generator=generator),
        block=torch.tensor(np.repeat(np.arange(shard.first_block, end), lengths)).int(),
        position=torch.tensor(np.concatenate([np.arange(n) for n in lengths])).int(),
    )


def write_store(out: Path, spec: StoreSpec) -> store.ActivationStore:
    """Write every shard and publish at `out`, with the work folder beside it."""
    work = work_of(out, spec)
    with store.lock_work(work):
        store.prepare_work(work, spec)
        for shard in spec.layout.shards:
            store.write_shard(work, spec, shard, make_rows(spec, shard), facts={"pid": 1})
        store.publish(work, spec, out, provenance={"time": "now"})
    return store.open_store(out)


def work_of(out: Path, spec: StoreSpec) -> Path:
    return out.parent / ".work" / spec.fingerprint[:16]


def as_stored(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """What a format keeps of the values."""
    return decode_numbers(encode_numbers(values, FORMATS[dtype]), FORMATS[dtype])


def all_rows(spec: StoreSpec, hook: str = HOOK) -> store.Rows:
    """Every row of the store in block-major order, as a reader must return it."""
    parts = [make_rows(spec, shard) for shard in spec.layout.shards]
    return store.Rows(  # shard by shard, since int8 has scales for each
        acts=torch.cat([as_stored(part.acts[hook], spec.acts_dtype) for part in parts]),
        grads=torch.cat([as_stored(part.grads[hook], spec.grads_dtype) for part in parts]),
        tokens=torch.cat([part.tokens for part in parts]),
        loss=torch.cat([part.loss for part in parts]),
        block=torch.cat([part.block for part in parts]),
        position=torch.cat([part.position for part in parts]),
    )


def select_rows(rows: store.Rows, mask: torch.Tensor) -> store.Rows:
    return store.Rows(*(column[mask] for column in rows))


def assert_rows_equal(found: tuple, expected: tuple) -> None:
    for name, left, right in zip(store.Rows._fields, found, expected, strict=True):
        assert left.dtype == right.dtype, name
        assert torch.equal(left, right), name


def list_files(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
