"""An undisturbed store, and what each way of reading it must give."""

import functools
import json
import tempfile
from collections import Counter
from pathlib import Path

import torch

import store
from store.manifest import PROVENANCE_NAME
from tests.store.small_store import (
    PADDED,
    all_rows,
    assert_rows_equal,
    list_files,
    make_spec,
    write_store,
)

LENGTHS = PADDED[:8]
SPECS = (
    make_spec(LENGTHS, d_model=3),
    make_spec(LENGTHS, d_model=3, acts_dtype="int8", grads_dtype="float32", compression="zstd"),
)
SHARED_MEMORY = Path("/dev/shm")


class World:
    """An undisturbed store of a spec, made once; nobody harms it."""

    def __init__(self, spec: store.StoreSpec) -> None:
        self.spec = spec
        self.folder = tempfile.TemporaryDirectory(dir=pick_folder())
        self.good = Path(write_store(Path(self.folder.name) / "good", spec).where)
        self.files = {k: v for k, v in list_files(self.good).items() if k != PROVENANCE_NAME}
        self.rows = all_rows(spec)
        of_shard = Counter()
        for path, content in self.files.items():
            if "/c/" in path:
                of_shard[path.partition("/c/")[2].split("/")[0]] += len(content)
        self.cache_bytes = 2 * max(of_shard.values())  # a stream's window has to fit
        assert self.cache_bytes < sum(of_shard.values())
        self.n_slots_of = [shard.n_rows for shard in spec.layout.shards]

    def rows_of(self, mask: torch.Tensor) -> store.Rows:
        return store.Rows(*(column[mask] for column in self.rows))

    def shard_rows(self, shard: int) -> store.Rows:
        first = sum(self.n_slots_of[:shard])
        stop = first + self.n_slots_of[shard]
        return store.Rows(*(column[first:stop] for column in self.rows))

    def stored_rows(self, shard: int) -> store.Rows:
        order = store.permute_rows(self.spec.seed, shard, self.n_slots_of[shard])
        return store.Rows(*(column[order] for column in self.shard_rows(shard)))

    def read_slots(self, opened: store.ActivationStore, place: float) -> None:
        shard = int(place * len(self.n_slots_of))
        n_rows = self.n_slots_of[shard]
        start, stop = n_rows // 3, n_rows // 3 + max(1, n_rows // 2)
        expected = self.stored_rows(shard)
        found = opened.read_slots(shard, start, stop)
        assert_rows_equal(found, tuple(column[start:stop] for column in expected))

    def read_shard(self, opened: store.ActivationStore, place: float) -> None:
        shard = int(place * len(self.n_slots_of))
        assert_rows_equal(opened.read_shard(shard), self.shard_rows(shard))

    def read_block(self, opened: store.ActivationStore, place: float) -> None:
        block = int(place * len(LENGTHS))
        assert_rows_equal(opened.read_block(block), self.rows_of(self.rows.block == block))

    def read_token(self, opened: store.ActivationStore, place: float) -> None:
        row = int(place * len(self.rows.block))
        block, position = int(self.rows.block[row]), int(self.rows.position[row])
        found = opened.read_token(block, position)
        for value, column in zip(found, self.rows, strict=True):
            assert torch.equal(torch.as_tensor(value, dtype=column.dtype), column[row])

    def read_column(self, opened: store.ActivationStore, place: float) -> None:
        shard = int(place * len(self.n_slots_of))
        name = ("tokens", "loss", "block", "position")[int(place * 997) % 4]
        assert torch.equal(opened.read_column(shard, name), getattr(self.stored_rows(shard), name))

    def read_stream(self, opened: store.ActivationStore, place: float) -> None:
        """Every row of an epoch; the last partial batch is not given out."""
        plan = store.plan_stream(
            opened, hook=None, batch_size=5, epochs=1, seed=int(place * 100), window=2
        )
        batches = list(store.stream_batches(opened, plan))
        found = store.Rows(*(torch.cat(column) for column in zip(*batches, strict=True)))
        key = found.block * 1000 + found.position
        assert len(key.unique()) == len(key) == plan.n_batches * 5
        keys = self.rows.block * 1000 + self.rows.position
        rows = torch.searchsorted(keys, key)  # block-major order is ascending
        assert_rows_equal(found, tuple(column[rows] for column in self.rows))

    def read_blocks(self, opened: store.ActivationStore, place: float) -> None:
        """Every block of an epoch, with nothing but zeros after its rows."""
        batches = store.stream_blocks(
            opened, hook=None, batch_blocks=3, epochs=1, seed=int(place * 100)
        )
        seen = []
        for batch in batches:
            for i, (block, length) in enumerate(
                zip(batch.block.tolist(), batch.lengths.tolist(), strict=True)
            ):
                expected = self.rows_of(self.rows.block == block)
                assert length == LENGTHS[block]
                for name in ("acts", "grads", "tokens", "loss"):
                    found = getattr(batch, name)[i]
                    assert torch.equal(found[:length], getattr(expected, name))
                    assert not found[length:].any()
                seen.append(block)
        assert len(seen) == len(set(seen)) == sum(opened.shards[i].n_blocks for i in opened.present)

    def read_all(self, opened: store.ActivationStore) -> None:
        for shard in range(len(self.n_slots_of)):
            self.read_shard(opened, (shard + 0.5) / len(self.n_slots_of))
        for how in ("slots", "block", "token", "stream", "blocks"):
            getattr(self, f"read_{how}")(opened, 0.5)

    def list_different(self, path: Path) -> set[str]:
        return {name for name, content in self.files.items() if not same(path / name, content)}

    def compare_trees(self, path: Path) -> None:
        assert self.list_different(path) == set()
        assert list_files(path).keys() - {PROVENANCE_NAME} == self.files.keys()


def pick_folder() -> Path | None:
    """Memory rather than a disk, where that is to be had."""
    return SHARED_MEMORY if SHARED_MEMORY.is_dir() else None


@functools.cache
def make_world(number: int) -> World:
    return World(SPECS[number])


def same(file: Path, content: bytes) -> bool:
    """Shard files are compared byte by byte, JSON by what it says."""
    try:
        found = file.read_bytes()
        if file.suffix == ".json":
            return json.loads(found) == json.loads(content)
    except (OSError, ValueError):
        return False
    return found == content
