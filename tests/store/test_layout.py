"""plan_shards as a table and as properties; the permutation against a slow reading of its rule."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.layout import ShardSpec, check_layout, draw_keys, permute_rows, plan_shards

LENGTHS = st.integers(1, 16).flatmap(
    lambda context: st.tuples(
        st.just(context), st.lists(st.integers(1, context), min_size=1, max_size=80)
    )
)


@pytest.mark.parametrize(
    ("n_blocks", "shard_bytes", "expected"),
    [
        # (blocks per chunk, per shard, in the last shard, shards); a block is 100 bytes
        (80, 10_000, (2, 10, 10, 8)),  # room for all in one, but eight shards at least
        (80, 500, (1, 5, 5, 16)),  # five fit, likewise
        (81, 10_000, (2, 10, 1, 9)),  # a last shard of the rest
        (7, 10_000, (1, 1, 1, 7)),  # fewer blocks than shards wanted
        (160, 1_700, (1, 17, 7, 10)),  # 17 fit, which two blocks per chunk do not divide
        (80, 50, (1, 1, 1, 80)),  # a block is the least
    ],
)
def test_plan_table(n_blocks, shard_bytes, expected):
    layout = plan_shards(
        np.full(n_blocks, 10), context_length=10, bytes_per_row=10, shard_bytes=shard_bytes,
        chunk_bytes=250,
    )  # fmt: skip
    found = (layout.rows_per_chunk // 10, layout.blocks_per_shard)
    assert (*found, layout.shards[-1].n_blocks, len(layout.shards)) == expected


@settings(deadline=None)
@given(LENGTHS, st.integers(1, 2000), st.integers(1, 500), st.integers(1, 10))
def test_plan_covers_every_block_once(case, shard_bytes, chunk_bytes, min_shards):
    context, lengths = case
    layout = plan_shards(
        np.array(lengths), context_length=context, bytes_per_row=4, shard_bytes=shard_bytes,
        min_shards=min_shards, chunk_bytes=chunk_bytes,
    )  # fmt: skip
    check_layout(layout, context)
    blocks = [b for s in layout.shards for b in range(s.first_block, s.first_block + s.n_blocks)]
    assert blocks == list(range(len(lengths)))
    assert len(layout.shards) >= min(min_shards, len(lengths))
    block_bytes = context * 4
    assert layout.rows_per_shard * 4 <= max(shard_bytes, block_bytes)
    assert layout.rows_per_chunk * 4 <= max(chunk_bytes, block_bytes)
    for shard in layout.shards:
        assert shard.n_rows == sum(lengths[shard.first_block :][: shard.n_blocks])


@pytest.mark.parametrize("lengths", [[], [0], [11], [5, 0]])
def test_plan_refuses_impossible_lengths(lengths):
    with pytest.raises(ValueError, match=r"lengths in 1\.\.10"):
        plan_shards(np.array(lengths), context_length=10, bytes_per_row=1, shard_bytes=100)


@pytest.mark.parametrize(
    "change",
    [
        {"rows_per_chunk": 7},  # no multiple of the context
        {"rows_per_shard": 30},  # not blocks_per_shard blocks
        {"n_slots": 10**15},
        {"n_rows": 1},
        {"shards": ()},
        {"shards": (ShardSpec(1, 0, 2, 20),)},  # starts at index 1
        {"shards": (ShardSpec(0, 0, 2, 21),)},  # more rows than positions
        {"shards": (ShardSpec(0, 0, 1, 10), ShardSpec(1, 1, 2, 20))},  # short one in the middle
    ],
)
def test_check_layout_refuses(change):
    layout = plan_shards(np.full(4, 10), context_length=10, bytes_per_row=1, shard_bytes=20,
                         min_shards=1)  # fmt: skip
    check_layout(layout, 10)
    with pytest.raises(ValueError, match="layout"):
        check_layout(layout._replace(**change), 10)


def mix_slowly(state: int) -> int:
    """docs/format.md, read once more."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def permute_slowly(seed: int, shard: int, n_rows: int) -> list[int]:
    state = mix_slowly(mix_slowly(seed) ^ shard)
    keys = [mix_slowly((state + j * 0x9E3779B97F4A7C15) % 2**64) for j in range(n_rows)]
    return sorted(range(n_rows), key=lambda j: keys[j])  # sorted() is stable


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32), st.integers(0, 300))
def test_permutation_follows_the_documented_rule(seed, shard, n_rows):
    permutation = permute_rows(seed, shard, n_rows)
    assert permutation.dtype == np.int64
    assert permutation.tolist() == permute_slowly(seed, shard, n_rows)


def test_mix_is_splitmix64():
    # The first outputs of the reference implementation for seed 1234567.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    state = [(1234567 + j * 0x9E3779B97F4A7C15) % 2**64 for j in range(3)]
    assert [mix_slowly(s) for s in state] == expected


def test_known_permutations():
    # Held fixed: a change here makes stores of format version 1 unreadable.
    assert permute_rows(0, 0, 8).tolist() == permute_slowly(0, 0, 8)
    assert permute_rows(0, 0, 8).tolist() == [0, 7, 2, 5, 4, 6, 3, 1]
    assert permute_rows(7, 2, 8).tolist() == [2, 5, 6, 3, 0, 7, 4, 1]


def test_keys_depend_on_every_word():
    keys = [tuple(draw_keys(words, 4)) for words in [(0,), (1,), (0, 1), (1, 0), (0, 1, 0)]]
    assert len(set(keys)) == 5
