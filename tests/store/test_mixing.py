"""Mixedness from the plan alone: closed cases, 14M tokens, and a count of real batches."""

import numpy as np
import pytest

import store
from store.mixing import WANTED, expect_blocks, measure_mixedness, plan_window
from tests.store.small_store import HOOK, write_store


def sizes_of(n_tokens, *, block, context, d_model, shard_mb, min_shards=8, excluded=0):
    """Rows and blocks of each shard of float16 activations."""
    layout = store.plan_shards(
        np.full(-(-n_tokens // block), block, np.int32),
        context_length=context,
        bytes_per_row=2 * d_model,
        shard_bytes=shard_mb * 2**20,
        min_shards=min_shards,
    )
    blocks = [shard.n_blocks for shard in layout.shards]
    return [shard.n_rows - excluded * shard.n_blocks for shard in layout.shards], blocks


# rows drawn, rows of the shard, its blocks, distinct blocks to expect
DRAWS = [
    (1, 100, 10, 1),
    (100, 100, 10, 10),  # all of it
    (91, 100, 10, 10),  # no block can be missed
    (2, 4, 2, 1 + 2 / 3),
    (10, 10, 10, 10),  # every row a block of its own
    (3, 6, 1, 1),
]


@pytest.mark.parametrize(("drawn", "rows", "blocks", "expected"), DRAWS)
def test_expected_blocks(drawn, rows, blocks, expected):
    assert expect_blocks({0: drawn}, [(rows, blocks)]) == pytest.approx(expected)
    assert expect_blocks({0: drawn, 2: drawn}, [(rows, blocks)] * 3) == pytest.approx(2 * expected)


# 14M tokens of GPT-2 small: window, steady mixedness at batch 4096
REFERENCE = [(1, 0.17), (2, 0.33), (4, 0.54), (21, 0.90), (81, 1.00)]


@pytest.mark.parametrize("block", [255, 256])
@pytest.mark.parametrize(("window", "expected"), REFERENCE)
def test_fourteen_million_tokens(block, window, expected):
    """The block's first position left out, or blocks of one row less from the beginning."""
    rows, blocks = sizes_of(
        *(14_000_000,), block=block, context=block, d_model=768, shard_mb=256, excluded=block - 255
    )
    assert len(rows) == 81
    found = measure_mixedness(rows, blocks, batch_size=4096, window=window, seed=0)
    assert found.steady == pytest.approx(expected, abs=0.006)
    assert found.start == pytest.approx(0.33 if window > 1 else 0.17, abs=0.006)
    assert found.unshuffled == pytest.approx(17 / 3950, rel=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_default_window_of_fourteen_million_tokens(seed):
    rows, blocks = sizes_of(
        *(14_000_000,), block=256, context=256, d_model=768, shard_mb=256, excluded=1
    )
    window = plan_window(rows, blocks, batch_size=4096, seed=seed)
    assert 20 <= window <= 25
    mixed = [
        measure_mixedness(rows, blocks, batch_size=4096, window=w, seed=seed).steady
        for w in (window - 1, window)
    ]
    assert mixed[0] < WANTED <= mixed[1]


@pytest.mark.parametrize("n_tokens", [524_288, 525_056, 100_000])
def test_the_demo_store_is_mixed_enough(n_tokens):
    """Also where its last shard is a tiny ninth one."""
    rows, blocks = sizes_of(
        *(n_tokens,), block=256, context=256, d_model=128, shard_mb=128, excluded=1
    )
    window = plan_window(rows, blocks, batch_size=2048, seed=0)
    found = measure_mixedness(rows, blocks, batch_size=2048, window=window, seed=0)
    assert found.steady >= WANTED


@pytest.mark.parametrize(("rows", "expected"), [([500], 1), ([64] * 3, 3)])
def test_all_shards_where_no_window_mixes_enough(rows, expected):
    assert plan_window(rows, [2] * len(rows), batch_size=50, seed=0) == expected


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """400 blocks of 8 rows in 10 shards."""
    lengths = np.full(400, 8, np.int32)
    layout = store.plan_shards(
        lengths, context_length=8, bytes_per_row=10, shard_bytes=3200, chunk_bytes=320
    )
    spec = store.StoreSpec(
        identity={"lengths": lengths.tolist()},
        hooks=(HOOK,),
        d_model=5,
        context_length=8,
        acts_dtype="float16",
        grads_dtype="bfloat16",
        seed=3,
        layout=layout,
    )
    assert len(layout.shards) == 10
    return write_store(tmp_path_factory.mktemp("store") / "out", spec)


@pytest.mark.parametrize(("window", "excluded"), [(2, ()), (4, (0,)), (10, (0, 5)), (None, ())])
def test_mixedness_is_what_real_batches_have(opened, window, excluded):
    """Distinct blocks counted in the batches of ten epochs but the first."""
    plan = store.plan_stream(
        opened,
        hook=HOOK,
        batch_size=200,
        epochs=11,
        seed=0,
        window=window,
        exclude_positions=excluded,
    )
    counts = [len(batch.block.unique()) for batch in store.stream_batches(opened, plan)]
    ideal = 400 * (1 - (1 - 1 / 400) ** 200)
    predicted = store.find_mixedness(opened, plan)
    steady = counts[plan.n_rows // 200 + 1 :]
    assert np.mean(steady) / ideal == pytest.approx(predicted.steady, rel=0.04)
    assert counts[0] / ideal == pytest.approx(predicted.start, rel=0.1)  # one draw


def test_unshuffled_is_what_a_reader_in_order_has(opened):
    blocks = np.repeat(np.arange(400), 8)
    counts = [len(set(blocks[i : i + 200].tolist())) for i in range(3000)]
    ideal = 400 * (1 - (1 - 1 / 400) ** 200)
    plan = store.plan_stream(opened, hook=HOOK, batch_size=200, epochs=1, seed=0, window=4)
    found = store.find_mixedness(opened, plan).unshuffled
    assert found == pytest.approx(np.mean(counts) / ideal, rel=0.01)
