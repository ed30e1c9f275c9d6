"""Whole blocks: every one once, in position order, padded with zeros, resumable, sliced by rank."""

import itertools
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import store
from store.blocks import plan_block_batches
from tests.store.small_store import (
    CONTEXT,
    HOOK,
    PACKED,
    PADDED,
    all_rows,
    make_spec,
    select_rows,
    write_store,
)

FORMATS = [(PACKED, "float16", "bfloat16"), (PADDED, "int8", "float32")]
PLANS = st.fixed_dictionaries(
    {
        "blocks_per_shard": st.lists(st.integers(1, 9), min_size=1, max_size=5),
        "batch_blocks": st.integers(1, 12),
        "epochs": st.integers(1, 3),
        "seed": st.none() | st.integers(0, 9),
    }
)


@pytest.fixture(scope="module", params=FORMATS, ids=["packed", "padded"])
def opened(request, tmp_path_factory):
    lengths, acts, grads = request.param
    spec = make_spec(lengths, acts_dtype=acts, grads_dtype=grads)
    return write_store(tmp_path_factory.mktemp("store") / "out", spec)


def stream(opened, **options):
    defaults = {"hook": HOOK, "batch_blocks": 4, "epochs": 1, "seed": 0}
    return list(store.stream_blocks(opened, **(defaults | options)))


def join(batches):
    return store.BlockBatch(*(torch.cat(columns) for columns in zip(*batches, strict=True)))


def assert_same(found, expected):
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("seed", [None, 5])
def test_blocks_are_whole_and_exact(opened, seed):
    batches = stream(opened, seed=seed)
    assert [len(batch.block) for batch in batches] == [4, 4, 4, 4, 4, 1]
    found = join(batches)
    assert sorted(found.block.tolist()) == list(range(21))
    assert (found.block.tolist() == list(range(21))) == (seed is None)
    expected = all_rows(opened.spec)
    for row, block in enumerate(found.block.tolist()):
        rows = select_rows(expected, expected.block == block)
        length = len(rows.position)
        assert found.lengths[row] == length
        for name in ("acts", "grads", "tokens", "loss"):
            values = getattr(found, name)[row]
            assert len(values) == CONTEXT
            if name not in ("acts", "grads") or opened.manifest.acts_dtype != "int8":
                assert torch.equal(values[:length], getattr(rows, name)), name
            assert not values[length:].any(), name


def test_blocks_are_those_that_read_block_gives(opened):
    found = join(stream(opened))
    for row, block in enumerate(found.block.tolist()):
        rows = opened.read_block(block)
        assert torch.equal(found.acts[row, : len(rows.acts)], rows.acts)
        assert torch.equal(found.grads[row, : len(rows.acts)], rows.grads)


@pytest.mark.parametrize("first", [0, 3, 10, 11])
def test_resume(opened, first):
    whole = stream(opened, epochs=2)
    found = stream(opened, epochs=2, first_batch=first)
    assert len(whole) == 11
    assert len(found) == 11 - first
    for left, right in zip(found, whole[first:], strict=True):
        assert_same(left, right)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_what_one_reader_sees(opened, world_size):
    ranks = [stream(opened, rank=rank, world_size=world_size) for rank in range(world_size)]
    for batch, *parts in zip(stream(opened), *ranks, strict=True):
        assert_same(join(parts), batch)


def test_present_shards_alone_are_streamed(tmp_path):
    write_store(tmp_path / "out", make_spec())
    (tmp_path / f"out/{HOOK}/grads/c/1/0").unlink()
    opened = store.open_store(tmp_path / "out", allow_partial=True)
    found = join(stream(opened, seed=None)).block.tolist()
    assert found == [block for block in range(21) if block not in range(4, 8)]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"hook": "other"}, "hook at"), ({"first_batch": 7}, r"expected a first batch in 0\.\.6")],
)
def test_impossible_streams_are_refused_at_once(opened, options, message):
    before = threading.active_count()
    with pytest.raises(store.StoreError, match=message):
        stream(opened, **options)
    assert threading.active_count() == before


def list_blocks(batches):
    return [(piece.shard, block) for batch in batches for piece in batch for block in piece.blocks]


@given(PLANS)
def test_every_block_once_in_an_epoch(options):
    found = list_blocks(plan_block_batches(**options))
    counts = options["blocks_per_shard"]
    everything = [(shard, block) for shard, n in enumerate(counts) for block in range(n)]
    assert len(found) == options["epochs"] * len(everything)
    for first in range(0, len(found), len(everything)):
        epoch = found[first : first + len(everything)]
        assert sorted(epoch) == everything
        assert options["seed"] is not None or epoch == everything
        shards = [shard for shard, _ in itertools.groupby(epoch, key=lambda place: place[0])]
        assert len(shards) == len(counts)  # one shard at a time


@given(PLANS, st.integers(0, 9), st.integers(1, 4))
def test_any_batch_and_rank_is_a_part_of_the_whole(options, first, world_size):
    whole = list(plan_block_batches(**options))[first:]
    ranks = [
        list(plan_block_batches(**options, first_batch=first, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert list_blocks(parts) == list_blocks([batch])
