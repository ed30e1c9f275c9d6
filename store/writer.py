"""Write shards, whole and durable, into a work folder.

A shard is computed whole, checked, encoded, written under temporary names, fsynced, renamed, and
then its commit record likewise, last. A shard without a commit record does not exist. `publish`
then gives the finished store its public path.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from jaxtyping import Float, Int
from torch import Tensor

from store.disk import disk_errors, make_folder, write_durably
from store.errors import ManifestError
from store.files import LocalFiles
from store.identity import check_identity, fingerprint_of
from store.layout import ShardSpec, permute_rows
from store.manifest import (
    FileRecord,
    ShardRecord,
    StoreSpec,
    locate_scales,
    locate_shard,
)
from store.metadata import check_metadata, create_metadata, list_metadata
from store.numbers import RowNames, Statistics, Stored, check_numbers, encode_numbers
from store.shardfile import encode_shard
from store.work import (
    Commit,
    read_commits,
    store_folder,
    write_commit,
)

_METADATA_BYTES = 4096  # of one zarr.json: a block of common file systems
_MANIFEST_BYTES = 512  # per shard file: hash, names, and a checksum per chunk


class ShardRows(NamedTuple):
    """One shard's rows in block-major order: block by block, position by position."""

    acts: Mapping[str, Float[Tensor, "rows d_model"]]  # by hook, float32
    grads: Mapping[str, Float[Tensor, "rows d_model"]]  # of the summed loss, nats per activation
    tokens: Int[Tensor, " rows"]  # the token at the row's position
    loss: Float[Tensor, " rows"]  # nats, of predicting the next token
    block: Int[Tensor, " rows"]  # counted over the corpus split
    position: Int[Tensor, " rows"]  # in the block


def required_bytes(spec: StoreSpec) -> int:
    """Bytes on disk of the finished store, metadata and manifest estimated.

    As if uncompressed: compression makes it less.
    """
    shards = sum(_shard_bytes(spec, shard) for shard in spec.layout.shards)
    n_files = len(spec.arrays()) * len(spec.layout.shards)
    return shards + n_files * _MANIFEST_BYTES + len(list_metadata(spec)) * _METADATA_BYTES


def _shard_bytes(spec: StoreSpec, shard: ShardSpec) -> int:
    return sum(
        spec.shard_format(array).file_bytes(array.count_rows(shard))
        for array in spec.arrays().values()
    )


def prepare_work(work: Path, spec: StoreSpec) -> None:
    """Make the work folder of `spec` with its empty arrays, or check that it is that; idempotent.

    Raises StoreMismatch if it belongs to another spec, StoreError if it cannot be written.
    """
    wanted = {"identity": spec.identity} | spec.as_dict()
    content = json.dumps(wanted | {"checksum": fingerprint_of(wanted)}, indent=1).encode()
    spec_file, scratch = work / "spec.json", work / "scratch"
    with disk_errors(work, needed_bytes=len(list_metadata(spec)) * _METADATA_BYTES):
        make_folder(scratch)
        try:
            found = json.loads(spec_file.read_bytes())
            checksum = found.pop("checksum")
            if fingerprint_of(found) != checksum:
                raise ValueError(checksum)
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            # Lost, or damaged: the commit records are checked against the spec themselves.
            write_durably(spec_file, [content], scratch=scratch)
        else:
            check_identity(
                wanted, found, work, "Remove that folder and run `pipeline cache` again."
            )
        try:
            check_metadata(LocalFiles(store_folder(work)), spec)
        except ManifestError:
            _write_metadata(work, spec, scratch)


def _write_metadata(work: Path, spec: StoreSpec, scratch: Path) -> None:
    """zarr-python writes in place, so it does that elsewhere."""
    with tempfile.TemporaryDirectory(dir=scratch) as draft:
        create_metadata(Path(draft), spec)
        for path in list_metadata(spec):
            write_durably(
                store_folder(work) / path,
                [(Path(draft) / path).read_bytes()],
                scratch=scratch,
                kind="zarr.json",
            )


def write_shard(
    work: Path,
    spec: StoreSpec,
    shard: ShardSpec,
    rows: ShardRows,
    *,
    facts: Mapping[str, Any] | None = None,
) -> ShardRecord:
    """Check, permute, encode and commit one shard, unless it is committed; returns its record.

    `facts` (who, when, how; JSON) go to provenance.json and decide nothing. Raises ValueError for
    rows that are not the shard's, NumberRangeError for values that the formats cannot hold,
    DiskFull, and StoreError for a folder that cannot be written.
    """
    columns = _list_columns(rows)
    _check_rows(spec, shard, rows, columns)
    stored, statistics = _encode_columns(spec, shard, columns)
    with disk_errors(work, _shard_bytes(spec, shard)), _lock_shard(work, shard.index):
        commit = read_commits(work, spec, (shard,)).get(shard.index)
        if commit is None:
            files = _write_files(work, spec, shard, stored)
            record = ShardRecord(**asdict(shard), files=files, statistics=statistics)
            commit = Commit(record=record, facts=dict(facts or {}))
            write_commit(work, commit)
    return commit.record


def _encode_columns(
    spec: StoreSpec, shard: ShardSpec, columns: Mapping[str, Tensor]
) -> tuple[dict[str, Stored], dict[str, Statistics]]:
    """Every column as the disk will hold it, and the statistics of those of floating point."""
    stored, statistics = {}, {}
    for path, column in spec.columns().items():
        if column.numbers.memory.is_floating_point:
            names = RowNames(shard.index, path, columns["block"], columns["position"])
            values = columns[path].reshape(shard.n_rows, -1)
            stored[path], statistics[path] = check_numbers(values, column.numbers, names)
        else:
            stored[path] = encode_numbers(columns[path], column.numbers)
    return stored, statistics


def _write_files(
    work: Path, spec: StoreSpec, shard: ShardSpec, stored: Mapping[str, Stored]
) -> dict[str, FileRecord]:
    order = permute_rows(spec.seed, shard.index, shard.n_rows)
    arrays, files = spec.arrays(), {}
    for path, numbers in _permute(stored, order):
        rows = numbers.reshape(-1, *arrays[path].row_shape)
        encoded = encode_shard(rows, spec.shard_format(arrays[path]))
        target = store_folder(work) / locate_shard(path, shard.index)
        written = write_durably(target, encoded.pieces, scratch=work / "scratch", kind="array")
        files[path] = FileRecord(
            bytes=written.bytes,
            sha256=written.sha256,
            crc32c=encoded.crc32c,
            chunk_bytes=encoded.chunk_bytes,
        )
    return files


def _permute(stored: Mapping[str, Stored], order: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Every array's numbers in slot order, one column and its scales at a time."""
    for path, column in stored.items():
        permuted = column.take(order)
        yield path, permuted.numbers
        if permuted.row_scale is not None and permuted.channel_scale is not None:
            yield from zip(
                locate_scales(path), (permuted.row_scale, permuted.channel_scale), strict=True
            )


def _list_columns(rows: ShardRows) -> dict[str, Tensor]:
    columns = {
        "tokens": rows.tokens,
        "loss": rows.loss,
        "block": rows.block,
        "position": rows.position,
    }
    columns |= {f"{hook}/acts": values for hook, values in rows.acts.items()}
    return columns | {f"{hook}/grads": values for hook, values in rows.grads.items()}


def _check_rows(
    spec: StoreSpec, shard: ShardSpec, rows: ShardRows, columns: Mapping[str, Tensor]
) -> None:
    """Raise ValueError unless these are the shard's rows, all of them, in block-major order."""
    arrays = spec.columns()
    if columns.keys() != arrays.keys():
        raise ValueError(
            f"shard {shard.index}: expected columns {sorted(arrays)}, got {sorted(columns)}"
        )
    for path, values in columns.items():
        expected = (shard.n_rows, *arrays[path].row_shape)
        if tuple(values.shape) != expected:
            raise ValueError(
                f"{path} of shard {shard.index}: expected shape {expected}, "
                f"got {tuple(values.shape)}"
            )
    for name in ("tokens", "block", "position"):
        if columns[name].is_floating_point() or columns[name].is_complex():
            raise ValueError(f"{name} of shard {shard.index}: expected integers")
    if int(rows.tokens.min()) < 0 or int(rows.tokens.max()) >= 2**31:
        raise ValueError(f"tokens of shard {shard.index}: expected integers in 0..2^31-1")
    block, position = rows.block.numpy() - shard.first_block, rows.position.numpy()
    inside = (block >= 0) & (block < shard.n_blocks)
    lengths = np.bincount(block[inside], minlength=shard.n_blocks)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    if (
        not inside.all()
        or lengths.min() < 1
        or lengths.max() > spec.context_length
        or (block != np.repeat(np.arange(shard.n_blocks), lengths)).any()
        or (position != np.arange(shard.n_rows) - starts).any()
    ):
        raise ValueError(
            f"rows of shard {shard.index}: expected {shard} block by block, position by position"
        )


def _lock_shard(work: Path, shard: int) -> FileLock:
    """Two workers with one shard take turns, so that files and record come from one of them."""
    make_folder(work / "locks")
    return FileLock(work / "locks" / f"{shard:05d}")
