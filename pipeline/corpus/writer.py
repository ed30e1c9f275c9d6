"""Blocks → Parquet parts of about 64 MB in row groups of equal size, and the content's hash."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32

from pipeline.corpus.packing import BlockTokens
from pipeline.corpus.reader import Part, Split, hash_file

GROUP_BLOCKS = 1024  # per row group, the least that a reader decodes
PART_BYTES = 64 * 10**6  # of tokens, before compression


class PartWriter:
    """The parts of one split, written as blocks come; leaving its context closes the file.

    Row groups and parts end at multiples of GROUP_BLOCKS blocks, so the files do not depend on how
    blocks arrive.
    """

    def __init__(self, folder: Path, split: Split, context_length: int):
        self._folder, self._split = folder, split
        self._width = context_length + 1
        self._groups_per_part = max(1, PART_BYTES // (4 * self._width * GROUP_BLOCKS))
        token = pa.field("item", pa.int32(), nullable=False)
        columns = {"tokens": pa.list_(token, self._width), "length": pa.int32()}
        self._schema = pa.schema(
            [pa.field(name, kind, nullable=False) for name, kind in columns.items()]
        )
        # Each row is a block, followed by its length.
        self._pending: list[Int32[np.ndarray, "n_blocks width"]] = []
        self._content = hashlib.sha256()
        self._parts: list[Part] = []
        self._part_blocks = 0
        self._parquet: pq.ParquetWriter | None = None
        (folder / split).mkdir()

    def __enter__(self) -> "PartWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._parquet is not None:
            self._parquet.close()

    def write(self, tokens: BlockTokens, lengths: Int32[np.ndarray, " n_blocks"]) -> None:
        """Take blocks [n_blocks, context_length + 1] and lengths; writes every whole row group."""
        if not len(tokens):
            return
        self._pending.append(np.concatenate([tokens, lengths[:, None]], axis=1))
        if sum(map(len, self._pending)) < GROUP_BLOCKS:
            return
        rows = np.concatenate(self._pending)
        end = len(rows) // GROUP_BLOCKS * GROUP_BLOCKS
        for start in range(0, end, GROUP_BLOCKS):
            self._write_group(rows[start : start + GROUP_BLOCKS])
        self._pending = [rows[end:].copy()]

    def finish(self) -> tuple[tuple[Part, ...], str]:
        """Write what is pending; returns the parts and the sha256 of their content."""
        if any(map(len, self._pending)):
            self._write_group(np.concatenate(self._pending))
        self._close_part()
        sync(self._folder / self._split)
        return tuple(self._parts), self._content.hexdigest()

    def _write_group(self, rows: Int32[np.ndarray, "n_blocks width"]) -> None:
        self._content.update(rows.astype("<i4").tobytes())
        if self._parquet is None:
            self._parquet = pq.ParquetWriter(
                self._folder / self._part_name(),
                self._schema,
                compression="zstd",
                use_dictionary=False,
                write_page_checksum=True,
            )
        flat = pa.array(np.ascontiguousarray(rows[:, :-1]).reshape(-1))
        tokens = pa.FixedSizeListArray.from_arrays(flat, type=self._schema.field("tokens").type)
        lengths = pa.array(np.ascontiguousarray(rows[:, -1]))
        self._parquet.write_table(
            pa.table([tokens, lengths], schema=self._schema), row_group_size=GROUP_BLOCKS
        )
        self._part_blocks += len(rows)
        if self._part_blocks == self._groups_per_part * GROUP_BLOCKS:
            self._close_part()

    def _close_part(self) -> None:
        if self._parquet is None:
            return
        self._parquet.close()
        name = self._part_name()
        path = self._folder / name
        sync(path)
        self._parts.append(
            Part(
                file=name,
                blocks=self._part_blocks,
                bytes=path.stat().st_size,
                sha256=hash_file(path),
            )
        )
        self._parquet, self._part_blocks = None, 0

    def _part_name(self) -> str:
        return f"{self._split}/part-{len(self._parts):05d}.parquet"


def sync(path: Path) -> None:
    """Make a file or folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
