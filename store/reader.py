"""Read a store: the exact bytes that were written, or an error.

    import store
    rows = store.open_store("stores/demo").read_block(3)
    rows.acts, rows.grads

`open_store` checks everything that can be checked without reading the shards; each read vouches for
each chunk that it touches by the checksums in the manifest. Readers go by the manifest and never by
an array's shape.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from store.errors import ShardCorrupt, ShardMissing, StoreError
from store.layout import ShardSpec, permute_rows
from store.manifest import ArraySpec, Manifest, StoreSpec, locate_shard, read_manifest
from store.metadata import check_metadata
from store.numbers import decode_numbers
from store.shardfile import MEND, check_shard, read_chunk


class Rows(NamedTuple):
    """Rows of one hook; every field has the same number of rows."""

    acts: Float[Tensor, "rows d_model"]  # float32, exactly the stored values
    grads: Float[Tensor, "rows d_model"]  # of the summed loss, nats per unit of activation
    tokens: Int[Tensor, " rows"]  # the token at the row's position
    loss: Float[Tensor, " rows"]  # nats, of predicting the next token
    block: Int[Tensor, " rows"]  # counted over the corpus split
    position: Int[Tensor, " rows"]  # in the block


class Token(NamedTuple):
    """One row of one hook."""

    acts: Float[Tensor, " d_model"]
    grads: Float[Tensor, " d_model"]
    token: int
    loss: float
    block: int
    position: int


class DamagedFile(NamedTuple):
    shard: int
    path: str  # inside the store
    problem: str


@dataclass(frozen=True, eq=False)
class ActivationStore:
    """An opened store; holds no file open and no rows in memory."""

    path: Path
    manifest: Manifest

    @cached_property
    def spec(self) -> StoreSpec:
        return self.manifest.spec

    @property
    def hooks(self) -> tuple[str, ...]:
        return self.manifest.hooks

    @property
    def n_rows(self) -> int:
        return self.manifest.n_rows

    @property
    def d_model(self) -> int:
        return self.manifest.d_model

    @property
    def shards(self) -> tuple[ShardSpec, ...]:
        return self.spec.layout.shards

    def pick_hook(self, hook: str | None) -> str:
        """The hook's name; None stands for the only one. Raises StoreError, listing the hooks."""
        if hook is None and len(self.hooks) == 1:
            return self.hooks[0]
        if hook not in self.hooks:
            raise StoreError(
                f"hook at {self.path}: expected one of {self.hooks}, got {hook or 'none'}. "
                "Name one of these, or run `pipeline cache` with that layer too."
            )
        return hook

    def read_slots(self, shard: int, start: int, stop: int, hook: str | None = None) -> Rows:
        """Rows of slots start..stop of a shard, in stored (shuffled) order.

        Reads only the chunks that hold them. Raises ShardCorrupt or ShardMissing if they are not
        what was written, StoreError for slots without rows.
        """
        n_rows = self._find_shard(shard).n_rows
        if not 0 <= start <= stop <= n_rows:
            raise StoreError(
                f"slots of shard {shard} at {self.path}: expected a range in 0..{n_rows}, "
                f"got {start}..{stop}. Ask for slots that hold rows."
            )
        return self._take_rows(shard, np.arange(start, stop), hook)

    def read_shard(self, shard: int, hook: str | None = None) -> Rows:
        """All rows of a shard un-permuted: block by block, position by position."""
        stored = self.read_slots(shard, 0, self._find_shard(shard).n_rows, hook)
        order = torch.from_numpy(np.argsort(permute_rows(self.spec.seed, shard, len(stored.block))))
        return Rows(*(column[order] for column in stored))

    def read_block(self, block: int, hook: str | None = None) -> Rows:
        """A block's rows in position order."""
        shard, slots = self._find_block(block)
        return self._take_rows(shard, slots, hook)

    def read_token(self, block: int, position: int, hook: str | None = None) -> Token:
        """One position of a block. Raises StoreError if the block has no row there."""
        shard, slots = self._find_block(block)
        if not 0 <= position < len(slots):
            raise StoreError(
                f"position in block {block} at {self.path}: expected 0..{len(slots) - 1}, "
                f"got {position}. Ask for a position that the block has."
            )
        acts, grads, tokens, loss, _, _ = self._take_rows(
            shard, slots[position : position + 1], hook
        )
        return Token(acts[0], grads[0], int(tokens[0]), float(loss[0]), block, position)

    def read_column(self, shard: int, name: str) -> Tensor:
        """A shard's "tokens", "loss", "block" or "position", whole, in stored order."""
        slots = np.arange(self._find_shard(shard).n_rows)
        return self._take_array(shard, self.spec.arrays()[name], slots)

    def verify(self, on_progress: Callable[[int], None] | None = None) -> None:
        """Compare every file's sha256 with the manifest. Raises ShardCorrupt naming the damage."""
        damage = find_damage(self, on_progress)
        if damage:
            listed = "; ".join(f"{file.path} ({file.problem})" for file in damage)
            raise ShardCorrupt(
                f"store at {self.path}: expected the bytes in the manifest, "
                f"got {len(damage)} damaged files: {listed}. {MEND}"
            )

    def _find_shard(self, shard: int) -> ShardSpec:
        if not 0 <= shard < len(self.shards):
            raise StoreError(
                f"shard at {self.path}: expected 0..{len(self.shards) - 1}, got {shard}. "
                "Ask for one of these."
            )
        return self.shards[shard]

    def _find_block(self, block: int) -> tuple[int, np.ndarray]:
        """The block's shard, and the slots of its rows in position order."""
        if not 0 <= block < self.manifest.n_blocks:
            raise StoreError(
                f"block at {self.path}: expected 0..{self.manifest.n_blocks - 1}, got {block}. "
                "Ask for one of these."
            )
        shard = block // self.spec.layout.blocks_per_shard
        slots = np.flatnonzero(self.read_column(shard, "block").numpy() == block)
        position = self._take_array(shard, self.spec.arrays()["position"], slots)
        return shard, slots[np.argsort(position.numpy())]

    def _take_rows(self, shard: int, slots: np.ndarray, hook: str | None) -> Rows:
        hook, arrays = self.pick_hook(hook), self.spec.arrays()
        paths = (f"{hook}/acts", f"{hook}/grads", "tokens", "loss", "block", "position")
        return Rows(*(self._take_array(shard, arrays[path], slots) for path in paths))

    def _take_array(self, shard: int, array: ArraySpec, slots: np.ndarray) -> Tensor:
        """The array's values at these slots, in their order; reads and checks each chunk once."""
        shard_format = self.spec.shard_format(array)
        record = self.manifest.shards[shard]
        where = str(self.path / locate_shard(array.path, shard))
        taken = np.empty((len(slots), *array.row_shape), array.numbers.disk)
        chunk_of, row_of = np.divmod(slots, shard_format.rows_per_chunk)
        by_chunk = np.argsort(chunk_of, kind="stable")
        chunks, starts = np.unique(chunk_of[by_chunk], return_index=True)
        with _open_shard(where) as file:
            check_shard(file, shard_format, record.n_rows, where)
            for chunk, here in zip(chunks.tolist(), np.split(by_chunk, starts)[1:], strict=True):
                rows = read_chunk(file, chunk, shard_format, record.files[array.path].crc32c, where)
                taken[here] = rows[row_of[here]]
        return decode_numbers(taken, array.numbers)


def open_store(path: str | Path) -> ActivationStore:
    """Open the store at `path`, checking all that can be checked without reading the shards.

    That is its manifest, its Zarr metadata, and every file's presence and size. Raises
    StoreNotFound, ManifestError, ShardMissing or ShardCorrupt.
    """
    path = Path(path)
    store = ActivationStore(path, read_manifest(path))
    check_metadata(path, store.spec)
    missing = [file for file in _list_files(store) if not (path / file.path).is_file()]
    if missing:
        shards = sorted({file.shard for file in missing})
        raise ShardMissing(
            f"store at {path}: expected every shard, got {len(shards)} of {len(store.shards)} "
            f"shards missing (the first file is {missing[0].path}). {MEND}"
        )
    for file in _list_files(store):
        found = (path / file.path).stat().st_size
        if found != file.bytes:
            where = path / file.path
            raise ShardCorrupt(
                f"shard file at {where}: expected {file.bytes} bytes, got {found}. {MEND}"
            )
    return store


def find_damage(
    store: ActivationStore, on_progress: Callable[[int], None] | None = None
) -> list[DamagedFile]:
    """Every shard file whose sha256 is not the manifest's; `on_progress` is told the bytes read."""
    damage = []
    for file in _list_files(store):
        try:
            found = _hash_file(store.path / file.path)
        except OSError as error:
            damage.append(DamagedFile(file.shard, file.path, error.strerror or str(error)))
            continue
        if found != file.sha256:
            damage.append(DamagedFile(file.shard, file.path, "other content"))
        if on_progress:
            on_progress(file.bytes)
    return damage


@contextmanager
def _open_shard(where: str) -> Iterator[int]:
    try:
        file = os.open(where, os.O_RDONLY)
    except FileNotFoundError:
        raise ShardMissing(f"shard file at {where}: expected a file, got none. {MEND}") from None
    try:
        yield file
    finally:
        os.close(file)


class _ListedFile(NamedTuple):
    shard: int
    path: str
    bytes: int
    sha256: str


def _list_files(store: ActivationStore) -> Iterator[_ListedFile]:
    for record in store.manifest.shards:
        for array, file in record.files.items():
            yield _ListedFile(
                record.index, locate_shard(array, record.index), file.bytes, file.sha256
            )


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
