"""Streams of a small store, and the same rows read slowly."""

import torch

import store
from store.shuffle import plan_batches
from tests.store.small_store import HOOK


def plan(opened, **options):
    defaults = {"hook": HOOK, "batch_size": 16, "epochs": 1, "seed": 0, "window": 3}
    return store.plan_stream(opened, **(defaults | options))


def stream(opened, **options):
    return list(store.stream_batches(opened, plan(opened, **options)))


def names(batches):
    return [
        pair
        for batch in batches
        for pair in zip(batch.block.tolist(), batch.position.tolist(), strict=True)
    ]


def join(batches):
    return store.Batch(*(torch.cat(columns) for columns in zip(*batches, strict=True)))


def stream_slowly(opened, planned):
    """Every shard filtered, then the planned slices one after the other."""
    shards = []
    for shard in opened.present:
        rows = opened.read_slots(shard, 0, opened.shards[shard].n_rows)
        kept = torch.tensor([p not in planned.exclude_positions for p in rows.position.tolist()])
        shards.append(store.Rows(*(column[kept] for column in rows)))
    batches = plan_batches(
        planned.rows_per_shard,
        batch_size=planned.batch_size,
        window=planned.window,
        seed=planned.seed,
    )
    for _, pieces in zip(range(planned.n_batches), batches, strict=False):
        parts = [
            store.Rows(*(column[piece.start : piece.stop] for column in shards[piece.shard]))
            for piece in pieces
        ]
        yield join(parts)
