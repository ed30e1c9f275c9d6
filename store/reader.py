"""Read a store: the exact bytes that were written, or an error.

    import store
    rows = store.open_store("stores/demo").read_block(3)
    rows.acts, rows.grads

`open_store` checks everything that can be checked without reading the shards; each read vouches for
each chunk that it touches by the checksums in the manifest. Readers go by the manifest and never by
an array's shape.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from store.arrays import ReadChunk, Slots, open_array, take_rows
from store.errors import (
    ManifestError,
    ShardCorrupt,
    ShardMissing,
    StoreError,
    StoreNotFound,
    is_url,
    mend,
)
from store.files import LocalFiles, StoreFiles
from store.layout import ShardSpec, permute_rows
from store.manifest import (
    MANIFEST_NAME,
    ArraySpec,
    FileRecord,
    Manifest,
    StoreSpec,
    locate_scales,
    locate_shard,
    parse_manifest,
)
from store.metadata import check_metadata
from store.numbers import Stored, decode_numbers

COLUMNS = ("tokens", "loss", "block", "position")  # of every hook alike


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


@dataclass(frozen=True, eq=False)
class ActivationStore:
    """An opened store; holds no file open and no rows in memory."""

    files: StoreFiles
    manifest: Manifest
    present: tuple[int, ...]  # shards that can be read: all of them, unless told that some will do

    @cached_property
    def spec(self) -> StoreSpec:
        return self.manifest.spec

    @cached_property
    def arrays(self) -> dict[str, ArraySpec]:
        return self.spec.arrays()

    @property
    def where(self) -> str:
        """The store's path or URL, for messages; never with credentials."""
        return self.files.where

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
                f"hook at {self.where}: expected one of {', '.join(self.hooks)}, got "
                f"{hook or 'none'}. "
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
                f"slots of shard {shard} at {self.where}: expected a range in 0..{n_rows}, "
                f"got {start}..{stop}. Ask for slots that hold rows."
            )
        return self._take_rows(shard, range(start, stop), hook)

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
                f"position in block {block} at {self.where}: expected 0..{len(slots) - 1}, "
                f"got {position}. Ask for a position that the block has."
            )
        acts, grads, tokens, loss, _, _ = self._take_rows(
            shard, slots[position : position + 1], hook
        )
        return Token(acts[0], grads[0], int(tokens[0]), float(loss[0]), block, position)

    def read_column(self, shard: int, name: str) -> Tensor:
        """A shard's "tokens", "loss", "block" or "position", whole, in stored order."""
        return self._take_values(shard, name, range(self._find_shard(shard).n_rows))

    def verify(self, on_progress: Callable[[int], None] | None = None) -> None:
        """Compare every file's sha256 with the manifest. Raises ShardCorrupt naming the damage."""
        from store.verify import find_damage  # which reads through this module

        damage = find_damage(self, on_progress)
        if damage:
            listed = "; ".join(f"{file.path} ({file.problem})" for file in damage)
            raise ShardCorrupt(
                f"store at {self.where}: expected the bytes in the manifest, "
                f"got {len(damage)} damaged files: {listed}. {mend(self.where)}"
            )

    def _find_shard(self, shard: int) -> ShardSpec:
        if not 0 <= shard < len(self.shards):
            raise StoreError(
                f"shard at {self.where}: expected 0..{len(self.shards) - 1}, got {shard}. "
                "Ask for one of these."
            )
        return self.shards[shard]

    def _find_block(self, block: int) -> tuple[int, np.ndarray]:
        """The block's shard, and the slots of its rows in position order."""
        if not 0 <= block < self.manifest.n_blocks:
            raise StoreError(
                f"block at {self.where}: expected 0..{self.manifest.n_blocks - 1}, got {block}. "
                "Ask for one of these."
            )
        shard = block // self.spec.layout.blocks_per_shard
        slots = np.flatnonzero(self.read_column(shard, "block").numpy() == block)
        position = self._take_values(shard, "position", slots)
        return shard, slots[np.argsort(position.numpy())]

    def read_stored(self, shard: int, path: str, slots: Slots) -> Stored:
        """An array's numbers at these slots of a shard, in their order, as they are on disk.

        Reads and checks each chunk that holds one of them once; copies nothing where they are a
        range inside one chunk. Raises as read_slots does.
        """
        numbers = self._take_array(shard, path, slots)
        if not self.arrays[path].numbers.scaled:
            return Stored(numbers)
        rows, channels = locate_scales(path)
        row_scale = self._take_array(shard, rows, slots)
        return Stored(numbers, row_scale, self._take_array(shard, channels, range(1))[0])

    def _take_rows(self, shard: int, slots: Slots, hook: str | None) -> Rows:
        hook = self.pick_hook(hook)
        paths = (f"{hook}/acts", f"{hook}/grads", *COLUMNS)
        return Rows(*(self._take_values(shard, path, slots) for path in paths))

    def _take_values(self, shard: int, path: str, slots: Slots) -> Tensor:
        return decode_numbers(self.read_stored(shard, path, slots), self.arrays[path].numbers)

    def open_array(self, shard: int, path: str) -> AbstractContextManager[ReadChunk]:
        """Keep a shard's file of one array open; yields what reads its chunks."""
        record = self.manifest.shards[shard]
        return open_array(self.files, self.spec, self.arrays[path], record)

    def _take_array(self, shard: int, path: str, slots: Slots) -> np.ndarray:
        shard_format = self.spec.shard_format(self.arrays[path])
        with self.open_array(shard, path) as read:
            return take_rows(read, slots, shard_format)


def open_store(
    source: str | Path | StoreFiles, *, hook: str | None = None, allow_partial: bool = False
) -> ActivationStore:
    """Open the store at a path or URL, checking all that needs no reading of shards.

    That is its manifest, its Zarr metadata, and, on this machine, every file's presence and size;
    given a hook, only of the files that reading that hook takes. With `allow_partial`, shards that
    are not there are left out of `present` instead of an error. Raises StoreNotFound,
    ManifestError, ShardMissing or ShardCorrupt.
    """
    files = open_files(source) if isinstance(source, str | Path) else source
    manifest = read_manifest(files)
    store = ActivationStore(files, manifest, tuple(range(len(manifest.shards))))
    check_metadata(files, store.spec)
    hook = None if hook is None else store.pick_hook(hook)
    missing = find_missing(store, hook)
    if len(missing) == len(store.shards) or (missing and not allow_partial):
        raise ShardMissing(
            f"store at {store.where}: expected every shard, got {len(missing)} of "
            f"{len(store.shards)} shards missing (the first file is {next(iter(missing.values()))})"
            f". {mend(store.where)}"
        )
    return replace(store, present=tuple(i for i in store.present if i not in missing))


def open_files(
    source: str | Path, *, cache_root: str | None = None, cache_bytes: int | None = None
) -> StoreFiles:
    """The files at a path or URL; a URL's shards come through the ShardCache at `cache_root`."""
    if is_url(str(source)):
        from store.remote import open_remote  # with its libraries, which a path needs not
        from store.shard_cache import ShardCache

        return open_remote(str(source), cache=ShardCache(cache_root, cache_bytes))
    return LocalFiles(source)


def find_missing(store: ActivationStore, hook: str | None = None) -> dict[int, str]:
    """Shards that lack a file (for one hook, if given), with the first such file.

    Raises ShardCorrupt for a file of another size.
    """
    missing: dict[int, str] = {}
    for file in list_files(store, hook):
        found = store.files.find_size(file.path, file.record)
        if found is None:
            missing.setdefault(file.shard, file.path)
        elif found != file.record.bytes:
            raise ShardCorrupt(
                f"shard file at {store.files.locate(file.path)}: expected {file.record.bytes} "
                f"bytes, got {found}. {mend(store.where)}"
            )
    return missing


class ListedFile(NamedTuple):
    shard: int
    path: str  # inside the store
    record: FileRecord


def list_files(store: ActivationStore, hook: str | None = None) -> Iterator[ListedFile]:
    """Every shard file; given a hook, only those that reading it takes."""
    others = {other for other in store.hooks if hook not in (None, other)}
    for shard in store.manifest.shards:
        for array, record in shard.files.items():
            if array.rpartition("/")[0] not in others:
                yield ListedFile(shard.index, locate_shard(array, shard.index), record)


def read_manifest(files: StoreFiles) -> Manifest:
    """Read and check a store's manifest. Raises StoreNotFound if there is none, ManifestError."""
    return parse_manifest(read_manifest_bytes(files), files.locate(MANIFEST_NAME))


def read_manifest_bytes(files: StoreFiles) -> bytes:
    """manifest.json as it is, unchecked. Raises StoreNotFound if there is none, ManifestError."""
    try:
        return files.read_bytes(MANIFEST_NAME)
    except IsADirectoryError:
        raise ManifestError(
            f"manifest at {files.locate(MANIFEST_NAME)}: expected a file, got a folder. "
            f"{mend(files.where)}"
        ) from None
    except (FileNotFoundError, NotADirectoryError):
        raise StoreNotFound(
            f"store at {files.where}: expected a folder with {MANIFEST_NAME}, got "
            f"{_describe_other(files)}"
        ) from None


def locate_pull(folder: Path) -> Path:
    """The folder beside a store in which an unfinished pull keeps what it needs to go on."""
    return folder.with_name(f".{folder.name}.pull")


def _describe_other(files: StoreFiles) -> str:
    """What is there instead of a store, and what to do about it."""
    if not isinstance(files, LocalFiles):
        return "none. Correct the URL, or have the store uploaded there."
    folder = files.folder
    if re.match(r"[a-z0-9+]+:/", files.where):
        return f"none. Write a URL with two slashes, as in {files.where.replace(':/', '://', 1)}."
    if locate_pull(folder).exists():
        return "a pull that was interrupted. Run the same `pipeline store pull` again."
    if (folder / "zarr.json").exists():
        return f"a store without it. Run `pipeline store repair {folder}`."
    if (folder / "config.json").exists():
        return "a folder of SAEs or of a model. Name a store, or make one with `pipeline cache`."
    if folder.is_file():
        return "a file. Name a store's folder, or make one with `pipeline cache`."
    if folder.is_dir():
        return "a folder of something else. Name a store, or make one with `pipeline cache`."
    return "no such folder. Correct the path, or make the store with `pipeline cache`."
