"""What a store is: its identity, layout, and the hashes and statistics of every shard.

`manifest.json` is a pure function of the inputs: no time, host or version stands in it.
docs/format.md describes every field.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from store.compression import COMPRESSIONS
from store.errors import ManifestError, mend
from store.identity import fingerprint_of
from store.layout import ShardSpec, StoreLayout, check_layout
from store.numbers import FORMATS, VALUE_FORMATS, NumberFormat, Statistics
from store.shardfile import ShardFormat

FORMAT = "activation-store"
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
PROVENANCE_NAME = "provenance.json"
_HOOK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_ROOT_FORMATS = {"block": "int32", "loss": "float32", "position": "int32", "tokens": "int32"}
_ROW_SCALE, _CHANNEL_SCALE = "_row_scale", "_channel_scale"


class ArraySpec(NamedTuple):
    """One Zarr array of a store."""

    path: str  # "loss" or "blocks.7.hook_resid_post/acts"
    numbers: NumberFormat
    row_shape: tuple[int, ...]  # (d_model,) or ()
    per: Literal["slot", "shard"] = "slot"  # what has a row

    def count_rows(self, shard: ShardSpec) -> int:
        """Rows of a shard's file of this array."""
        return shard.n_rows if self.per == "slot" else 1


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """All that is decided before the first shard is computed.

    Raises ValueError where it contradicts itself.
    """

    identity: dict[str, Any]  # decides the store's bytes; JSON
    hooks: tuple[str, ...]
    d_model: int
    context_length: int
    acts_dtype: str  # one of VALUE_FORMATS
    grads_dtype: str
    seed: int  # of the row order inside each shard
    layout: StoreLayout
    compression: str = "none"  # one of COMPRESSIONS, of every chunk

    def __post_init__(self) -> None:
        check_layout(self.layout, self.context_length)
        if not self.hooks or len(set(self.hooks)) < len(self.hooks):
            raise ValueError(f"hooks: expected one or more different names, got {self.hooks}")
        for hook in self.hooks:
            if not _HOOK_NAME.fullmatch(hook) or hook in _ROOT_FORMATS or hook.endswith(".json"):
                raise ValueError(
                    f"hook {hook!r}: expected letters, digits, '_', '.' and '-', and no root "
                    "array's or file's name"
                )
        for dtype in (self.acts_dtype, self.grads_dtype):
            if dtype not in VALUE_FORMATS:
                raise ValueError(f"number format {dtype!r}: expected one of {VALUE_FORMATS}")
        if self.compression not in COMPRESSIONS:
            raise ValueError(f"compression: expected {COMPRESSIONS}, got {self.compression!r}")
        if self.d_model < 1:
            raise ValueError(f"d_model: expected at least 1, got {self.d_model}")
        fields = {"format_version": FORMAT_VERSION} | self.as_dict()
        for key in sorted(fields.keys() & self.identity.keys()):
            if fields[key] != self.identity[key]:
                raise ValueError(
                    f"{key}: expected {self.identity[key]!r} as in the identity, got "
                    f"{fields[key]!r}"
                )

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.identity)

    def as_dict(self) -> dict[str, Any]:
        """The manifest's fields apart from format, identity, shards and checksum."""
        return {
            "hooks": list(self.hooks),
            "d_model": self.d_model,
            "context_length": self.context_length,
            "acts_dtype": self.acts_dtype,
            "grads_dtype": self.grads_dtype,
            "compression": self.compression,
            "seed": self.seed,
            "rows_per_chunk": self.layout.rows_per_chunk,
            "rows_per_shard": self.layout.rows_per_shard,
            "n_blocks": self.layout.n_blocks,
            "n_rows": self.layout.n_rows,
            "n_slots": self.layout.n_slots,
        }

    def columns(self) -> dict[str, ArraySpec]:
        """What a row has, by path: the root arrays, then acts and grads of each hook."""
        columns = [ArraySpec(path, FORMATS[name], ()) for path, name in _ROOT_FORMATS.items()]
        for hook in self.hooks:
            columns.append(ArraySpec(f"{hook}/acts", FORMATS[self.acts_dtype], (self.d_model,)))
            columns.append(ArraySpec(f"{hook}/grads", FORMATS[self.grads_dtype], (self.d_model,)))
        return {column.path: column for column in columns}

    def arrays(self) -> dict[str, ArraySpec]:
        """Every array by its path: each column, followed by its scales if it has them."""
        arrays = {}
        for path, column in self.columns().items():
            arrays[path] = column
            if column.numbers.scaled:
                rows, channels = locate_scales(path)
                arrays[rows] = ArraySpec(rows, FORMATS["float32"], ())
                per_shard = (column.row_shape, "shard")
                arrays[channels] = ArraySpec(channels, FORMATS["float32"], *per_shard)
        return arrays

    def count_slots(self, array: ArraySpec) -> int:
        """Length of the array."""
        return self.layout.n_slots if array.per == "slot" else len(self.layout.shards)

    def shard_format(self, array: ArraySpec) -> ShardFormat:
        """How the array's shard files are laid out."""
        layout, has_slots = self.layout, array.per == "slot"
        return ShardFormat(
            disk=array.numbers.disk,
            row_shape=array.row_shape,
            fill=array.numbers.fill,
            rows_per_chunk=layout.rows_per_chunk if has_slots else 1,
            chunks_per_shard=layout.chunks_per_shard if has_slots else 1,
            compression=self.compression,
        )


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        return self.model_dump(mode="json")


class FileRecord(_Record):
    """One shard file of one array."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # also its name in the shard cache
    crc32c: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...]  # of each chunk as in the file
    chunk_bytes: tuple[int, ...]  # length of each compressed chunk; empty if not compressed


class ShardRecord(_Record):
    """What one committed shard is."""

    index: int
    first_block: int
    n_blocks: int
    n_rows: int
    files: dict[str, FileRecord]
    statistics: dict[str, Statistics]

    @property
    def spec(self) -> ShardSpec:
        return ShardSpec(self.index, self.first_block, self.n_blocks, self.n_rows)


class Manifest(_Record):
    """The content of manifest.json."""

    format: str
    format_version: int
    fingerprint: str
    identity: dict[str, JsonValue]
    hooks: tuple[str, ...]
    d_model: int
    context_length: int
    acts_dtype: str
    grads_dtype: str
    compression: str
    seed: int
    rows_per_chunk: int
    rows_per_shard: int
    n_blocks: int
    n_rows: int
    n_slots: int
    shards: tuple[ShardRecord, ...]
    checksum: str

    @property
    def spec(self) -> StoreSpec:
        """The manifest's plan. Raises ValueError where its fields contradict each other."""
        layout = StoreLayout(
            rows_per_chunk=self.rows_per_chunk,
            rows_per_shard=self.rows_per_shard,
            blocks_per_shard=self.rows_per_shard // max(self.context_length, 1),
            shards=tuple(shard.spec for shard in self.shards),
            n_slots=self.n_slots,
            n_rows=self.n_rows,
        )
        return StoreSpec(
            identity=dict(self.identity),
            hooks=self.hooks,
            d_model=self.d_model,
            context_length=self.context_length,
            acts_dtype=self.acts_dtype,
            grads_dtype=self.grads_dtype,
            compression=self.compression,
            seed=self.seed,
            layout=layout,
        )


def build_manifest(spec: StoreSpec, records: Sequence[ShardRecord]) -> Manifest:
    """The manifest of a finished store; `records` in the order of the shards."""
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fingerprint": spec.fingerprint,
        "identity": spec.identity,
        **spec.as_dict(),
        "shards": [record.as_dict() for record in records],
    }
    return Manifest.model_validate_json(json.dumps(content | {"checksum": _checksum(content)}))


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of manifest.json."""
    return (json.dumps(manifest.as_dict(), indent=1) + "\n").encode()


def parse_manifest(content: bytes, file: str) -> Manifest:
    """Check and parse manifest.json, whose path is `file` in messages.

    Raises ManifestError if it is unreadable, of an unknown version, changed since it was written,
    or contradicts itself.
    """
    try:
        fields = json.loads(content)
        if str(fields["format"]).startswith("gsae-"):  # such as a corpus's
            raise ManifestError(
                f"format in {file}: expected {FORMAT}, got {fields['format']}. Name a store."
            )
        _expect(file, "format", FORMAT, fields["format"])
        _expect(file, "format_version", FORMAT_VERSION, fields["format_version"])
        manifest = Manifest.model_validate_json(content)
        spec = manifest.spec
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{first['msg']} at {'.'.join(map(str, first['loc'])) or 'its top'}"
        raise ManifestError(
            f"manifest at {file}: expected a whole manifest, got {reason}. {mend(file)}"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        got = {
            KeyError: f"JSON without the field {error}",
            TypeError: "JSON of another form",
            ValueError: f"fields that contradict each other: {error}",
        }.get(type(error), "broken JSON")
        raise ManifestError(
            f"manifest at {file}: expected a whole manifest, got {got}. {mend(file)}"
        ) from None
    _expect(file, "fingerprint", spec.fingerprint, manifest.fingerprint)
    _expect(file, "checksum", _checksum(manifest.as_dict()), manifest.checksum)
    for record in manifest.shards:
        for line in list_file_faults(spec, record):
            raise ManifestError(f"manifest at {file}: shard {record.index}: {line}. {mend(file)}")
    return manifest


def list_file_faults(spec: StoreSpec, record: ShardRecord) -> list[str]:
    """Where a record's files are not those that the spec gives the shard; empty if all is right."""
    arrays = spec.arrays()
    if record.files.keys() != arrays.keys():
        return [f"expected files of {sorted(arrays)}, got {sorted(record.files)}"]
    faults = []
    for path, array in arrays.items():
        shard_format, file = spec.shard_format(array), record.files[path]
        n_rows = array.count_rows(record.spec)
        n_chunks = shard_format.count_chunks(n_rows)
        n_lengths = n_chunks if spec.compression != "none" else 0
        expected = (shard_format.file_bytes(n_rows, file.chunk_bytes), n_chunks, n_lengths)
        found = (file.bytes, len(file.crc32c), len(file.chunk_bytes))
        if found != expected:
            faults.append(f"expected (bytes, chunks, lengths) {expected} of {path}, got {found}")
        elif min(file.chunk_bytes, default=1) < 1:
            faults.append(f"expected chunks of one byte or more of {path}, got {file.chunk_bytes}")
    return faults


def locate_scales(array_path: str) -> tuple[str, str]:
    """The arrays of the row scales and the channel scales of an array that has them."""
    return array_path + _ROW_SCALE, array_path + _CHANNEL_SCALE


def locate_shard(array_path: str, shard: int) -> str:
    """The shard file's path in the store: Zarr's chunk key, with a 0 for the second dimension."""
    has_one_dimension = array_path in _ROOT_FORMATS or array_path.endswith(_ROW_SCALE)
    return f"{array_path}/c/{shard}" + ("" if has_one_dimension else "/0")


def _expect(file: str, field: str, expected: Any, found: Any) -> None:
    if found != expected:
        raise ManifestError(f"{field} in {file}: expected {expected}, got {found}. {mend(file)}")


def _checksum(content: dict[str, Any]) -> str:
    return fingerprint_of({key: value for key, value in content.items() if key != "checksum"})
