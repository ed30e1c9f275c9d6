"""A corpus on disk: its manifest, and blocks read from it a few row groups at a time.

<folder>/manifest.json
<folder>/train/part-00000.parquet ...       <folder>/held_out/part-00000.parquet ...

columns    tokens    fixed_size_list<int32>[context_length + 1]
           length    int32, the block's number of real rows
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.corpus.text import one_line
from pipeline.errors import CorpusError

FORMAT = "gsae-corpus"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

_Count = Annotated[int, Field(ge=0)]
_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Part(_Record):
    """One Parquet file."""

    file: Annotated[
        str, Field(pattern=r"^(train|held_out)/part-\d{5}\.parquet$")
    ]  # relative to the folder
    blocks: _Count
    bytes: _Count
    sha256: _Sha256


class SplitRecord(_Record):
    """What one side of the split holds."""

    documents: _Count  # that gave tokens
    tokens: _Count  # rows, that is positions with a target
    blocks: _Count
    dropped_documents: _Count  # empty, or under per_document without a row
    dropped_tokens: (
        _Count  # of read documents, but in no block: the tail, and what per_document cuts off
    )
    content_sha256: _Sha256  # of every block's tokens and length, int32 little-endian, in order
    parts: tuple[Part, ...]


class CorpusManifest(_Record):
    """What a corpus is. Equal sources, settings and versions give equal bytes."""

    format: Literal["gsae-corpus"]
    format_version: Literal[1]
    fingerprint: _Sha256  # of the identity below
    source: str
    subset: str | None  # of a hub dataset; null for other sources, as is split
    split: str | None
    column: str | None  # null for the demo
    tokenizer_hash: _Sha256
    context_length: Annotated[int, Field(gt=0)]
    packing: Literal["packed", "per_document"]
    prepend_bos: bool
    held_out_fraction: float
    train_tokens: int | None  # as asked for; null is all there were
    held_out_tokens: int | None
    blocks_per_group: Annotated[
        int, Field(gt=0)
    ]  # blocks in each Parquet row group but a part's last
    splits: dict[Split, SplitRecord]
    versions: dict[str, str]  # recorded, and no part of the identity

    def identity(self) -> dict[str, Any]:
        """Everything that decides the token blocks.

        Where they came from (source, subset, split, column) and how much was asked for stay out:
        the content's hash says which tokens they are, and a folder of text may move.
        """
        decides = (
            "format_version",
            "tokenizer_hash",
            "context_length",
            "packing",
            "prepend_bos",
            "held_out_fraction",
        )
        return {name: getattr(self, name) for name in decides} | {
            split: self.splits[split].content_sha256 for split in SPLITS
        }

    @model_validator(mode="after")
    def _agree(self) -> "CorpusManifest":
        if set(self.splits) != set(SPLITS):
            raise ValueError(f"splits: expected {', '.join(SPLITS)}, got {', '.join(self.splits)}")
        for name, record in self.splits.items():
            if sum(part.blocks for part in record.parts) != record.blocks:
                raise ValueError(
                    f"splits.{name}: expected parts of {record.blocks} blocks together"
                )
        if self.fingerprint != fingerprint_of(self.identity()):
            raise ValueError("fingerprint: expected the hash of the manifest's own identity")
        return self


class Blocks(NamedTuple):
    """Some blocks of a corpus."""

    tokens: Int32[np.ndarray, "n_blocks context_and_one"]  # the last is the target of the last row
    lengths: Int32[np.ndarray, " n_blocks"]  # real rows of each; what follows them is padding


@dataclass(frozen=True)
class Corpus:
    """An opened corpus; it holds no file open and can be sent to other processes."""

    folder: Path
    manifest: CorpusManifest

    def n_blocks(self, split: Split) -> int:
        return self.manifest.splits[split].blocks

    def lengths(self, split: Split) -> Int32[np.ndarray, " n_blocks"]:
        """Real rows of every block of a split."""
        if self.manifest.packing == "packed":
            return np.full(self.n_blocks(split), self.manifest.context_length, np.int32)
        columns = [self._read(part, ["length"], None) for part in self.manifest.splits[split].parts]
        return np.concatenate([column["length"].to_numpy() for column in columns])

    def read_blocks(self, split: Split, first: int, n: int) -> Blocks:
        """Read `n` blocks from their row groups alone; raises CorpusError beyond the last."""
        if first < 0 or n < 0 or first + n > self.n_blocks(split):
            raise CorpusError(
                f"{split} blocks {first} to {first + n - 1} of corpus at {self.folder}: expected"
                f" blocks below {self.n_blocks(split)}. Run `pipeline corpus` with more tokens."
            )
        tokens = [np.empty((0, self.manifest.context_length + 1), np.int32)]
        lengths = [np.empty(0, np.int32)]
        for part, start, stop in self._locate(split, first, first + n):
            size = self.manifest.blocks_per_group
            groups = range(start // size, (stop - 1) // size + 1)
            rows = self._read(part, ["tokens", "length"], groups)
            rows = rows.slice(start - groups.start * size, stop - start).combine_chunks()
            tokens.append(_flatten(rows["tokens"]).reshape(stop - start, -1))
            lengths.append(rows["length"].to_numpy())
        return Blocks(np.concatenate(tokens), np.concatenate(lengths))

    def _locate(self, split: Split, first: int, end: int) -> Iterator[tuple[Part, int, int]]:
        """Each part with some of blocks first .. end - 1, and which of its own blocks they are."""
        offset = 0
        for part in self.manifest.splits[split].parts:
            start, stop = max(first - offset, 0), min(end - offset, part.blocks)
            if start < stop:
                yield part, start, stop
            offset += part.blocks

    def _read(self, part: Part, columns: list[str], groups: range | None) -> pa.Table:
        path = self.folder / part.file
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                wanted = range(file.num_row_groups) if groups is None else groups
                return file.read_row_groups(list(wanted), columns=columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise _damaged(path, f"a whole Parquet file, got {one_line(error)}") from None


def open_corpus(folder: Path) -> Corpus:
    """Open a corpus after checking its manifest and every part's sha256; raises CorpusError."""
    manifest = read_manifest(folder)
    for record in manifest.splits.values():
        for part in record.parts:
            path = folder / part.file
            if not path.is_file():
                raise _damaged(path, "a part that the manifest lists, got no file")
            if path.stat().st_size != part.bytes:
                raise _damaged(path, f"{part.bytes} bytes, got {path.stat().st_size}")
            if hash_file(path) != part.sha256:
                raise _damaged(path, f"sha256 {part.sha256}, got another")
    return Corpus(folder, manifest)


def read_manifest(folder: Path) -> CorpusManifest:
    """Read and check a manifest alone; raises CorpusError naming the field."""
    path = folder / MANIFEST
    try:
        return CorpusManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CorpusError(
            f"corpus at {folder}: expected {MANIFEST}, got none. Make it with `pipeline corpus"
            f" --out {folder}`."
        ) from None
    except OSError as error:
        raise _damaged(path, f"a readable file, got {one_line(error)}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"])) or "the whole"
        raise _damaged(
            path, f"a version {FORMAT_VERSION} manifest, got {field}: {problem['msg']}"
        ) from None


def fingerprint_of(identity: dict[str, Any]) -> str:
    """sha256 of canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(
        json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flatten(tokens: pa.ChunkedArray) -> Int32[np.ndarray, " n_tokens"]:
    return tokens.combine_chunks().flatten().to_numpy()


def _damaged(path: Path, problem: str) -> CorpusError:
    return CorpusError(
        f"corpus file {path}: expected {problem}. Remove"
        f" {path.parent if path.name == MANIFEST else path.parent.parent} and run `pipeline"
        " corpus` again."
    )
