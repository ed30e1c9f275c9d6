"""The zarr.json files: written by zarr-python, checked by us against the manifest."""

import json
import math
from pathlib import Path
from typing import Any

from store.compression import list_codecs
from store.errors import ManifestError, mend
from store.files import StoreFiles
from store.manifest import FORMAT, FORMAT_VERSION, ArraySpec, StoreSpec
from store.shardfile import ShardFormat

_LITTLE_ENDIAN = {"name": "bytes", "configuration": {"endian": "little"}}
_CHECKSUM: dict[str, Any] = {"name": "crc32c"}


def list_metadata(spec: StoreSpec) -> dict[str, dict[str, Any]]:
    """The content of every zarr.json by its path in the store, as the spec asks for it."""
    nodes = {"": _describe_group(_root_attributes(spec))}
    nodes |= {hook: _describe_group({}) for hook in spec.hooks}
    nodes |= {path: _describe_array(spec, array) for path, array in spec.arrays().items()}
    return {f"{path}/zarr.json".lstrip("/"): content for path, content in nodes.items()}


def create_metadata(folder: Path, spec: StoreSpec) -> None:
    """Make the empty group and arrays at `folder` with zarr-python."""
    import zarr
    from zarr.codecs import BytesCodec

    root = zarr.create_group(folder, zarr_format=3, attributes=_root_attributes(spec))
    for hook in spec.hooks:
        root.create_group(hook)
    for path, array in spec.arrays().items():
        shard_format = spec.shard_format(array)
        root.create_array(
            path,
            shape=(spec.count_slots(array), *array.row_shape),
            shards=(shard_format.rows_per_shard, *array.row_shape),
            chunks=(shard_format.rows_per_chunk, *array.row_shape),
            dtype=array.numbers.disk,
            fill_value=array.numbers.fill,
            filters=None,
            compressors=[*_list_compressors(shard_format), _CHECKSUM],
            serializer=BytesCodec(endian="little"),
            dimension_names=_name_dimensions(array),
            attributes={"number_format": array.numbers.name},
        )


def check_metadata(files: StoreFiles, spec: StoreSpec) -> None:
    """Raise ManifestError where a zarr.json is missing, cut, or not what the manifest asks for."""
    for path, expected in list_metadata(spec).items():
        check_node(files, path, expected)


def check_node(files: StoreFiles, path: str, expected: dict[str, Any]) -> None:
    """Raise ManifestError unless the zarr.json at `path` says what `expected` says."""
    file = files.locate(path)
    try:
        found = json.loads(files.read_bytes(path))
        found.keys()
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        got = "no file" if isinstance(error, FileNotFoundError) else "broken JSON"
        if isinstance(error, OSError) and error.strerror and got != "no file":
            got = error.strerror
        raise ManifestError(
            f"Zarr metadata at {file}: expected a JSON object, got {got}. {mend(file)}"
        ) from None
    for key in sorted(expected.keys() | found.keys()):
        if key not in expected and not found[key]:
            continue  # such as an empty list of storage transformers
        if expected.get(key) != found.get(key):
            raise ManifestError(
                f"{key} in {file}: expected {_shorten(expected.get(key))} as in the manifest, "
                f"got {_shorten(found.get(key))}. {mend(file)}"
            )


def _describe_group(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def _describe_array(spec: StoreSpec, array: ArraySpec) -> dict[str, Any]:
    width = list(array.row_shape)
    fill = array.numbers.fill
    shard_format = spec.shard_format(array)
    to_bytes = _LITTLE_ENDIAN if array.numbers.disk.itemsize > 1 else {"name": "bytes"}
    sharding = {
        "chunk_shape": [shard_format.rows_per_chunk, *width],
        "codecs": [to_bytes, *_list_compressors(shard_format), _CHECKSUM],
        "index_codecs": [_LITTLE_ENDIAN, _CHECKSUM],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [spec.count_slots(array), *width],
        "data_type": array.numbers.disk.name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [shard_format.rows_per_shard, *width]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if math.isnan(fill) else fill,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": list(_name_dimensions(array)),
        "attributes": {"number_format": array.numbers.name},
    }


def _root_attributes(spec: StoreSpec) -> dict[str, Any]:
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "fingerprint": spec.fingerprint}


def _list_compressors(shard_format: ShardFormat) -> list[dict[str, Any]]:
    return list_codecs(shard_format.compression, shard_format.disk.itemsize)


def _name_dimensions(array: ArraySpec) -> tuple[str, ...]:
    return (array.per, "channel") if array.row_shape else (array.per,)


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "..."
