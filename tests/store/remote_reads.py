"""Reading a remote store whole."""

import store
from store.download import Retry
from store.remote import open_remote
from store.shard_cache import ShardCache
from tests.store.published import FAST, HOOKS
from tests.store.small_store import all_rows, assert_rows_equal, select_rows


def open_url(url: str, cache: ShardCache, retry: Retry = FAST) -> store.ActivationStore:
    return store.open_store(open_remote(url, cache=cache, retry=retry))


def read_all(opened: store.ActivationStore, spec: store.StoreSpec) -> None:
    """Every row of a hook is the one that was written."""
    for shard in spec.layout.shards:
        rows = opened.read_shard(shard.index, HOOKS[1])
        everything = all_rows(spec, HOOKS[1])
        here = (everything.block >= shard.first_block) & (
            everything.block < shard.first_block + shard.n_blocks
        )
        assert_rows_equal(rows, select_rows(everything, here))
