"""Take a published store's good shards into its work folder, so that nobody computes them again."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from store.disk import disk_errors, put_link
from store.errors import ManifestError, StoreNotFound
from store.files import LocalFiles
from store.manifest import (
    PROVENANCE_NAME,
    ShardRecord,
    StoreSpec,
    list_file_faults,
    locate_shard,
)
from store.reader import ListedFile, read_manifest
from store.verify import describe_damage
from store.work import Commit, forget_shard, store_folder, write_commit


def list_adoptable(path: Path, spec: StoreSpec) -> tuple[ShardRecord, ...]:
    """Shards of the spec's store at `path` whose files are all there, in full size; their content
    is unchecked. None of what is another store, or none.
    """
    files = LocalFiles(path)
    try:
        manifest = read_manifest(files)
    except (ManifestError, StoreNotFound):
        return ()
    if manifest.fingerprint != spec.fingerprint:
        return ()
    return tuple(
        record
        for record in manifest.shards
        if all(
            files.find_size(locate_shard(array, record.index), file) == file.bytes
            for array, file in record.files.items()
        )
    )


def adopt_shards(path: Path, work: Path, spec: StoreSpec, shards: Iterable[int]) -> list[int]:
    """Commit those of the shards that the store at `path` has, byte for byte; returns which.

    So that a damaged store without its work folder is not computed whole. Only for the holder of
    the work folder's lock.
    """
    wanted, facts = set(shards), read_facts(path)
    files, adopted = LocalFiles(path), []
    for record in list_adoptable(path, spec):
        if record.index not in wanted or list_file_faults(spec, record):
            continue
        listed = list_shard(record).values()
        if any(describe_damage(files, file) for file in listed):
            continue
        with disk_errors(work, max(file.record.bytes for file in listed)):
            adopt_shard(path, work, record, facts)
        adopted.append(record.index)
    return adopted


def adopt_shard(
    path: Path, work: Path, record: ShardRecord, facts: Mapping[int, dict[str, Any]]
) -> None:
    """Commit a good shard of the store."""
    forget_shard(work, record.index)
    for name in list_shard(record):
        place(work, path / name, (store_folder(work) / name,))
    write_commit(work, Commit(record=record, facts=facts.get(record.index, {})))


def list_shard(record: ShardRecord) -> dict[str, ListedFile]:
    """A shard's files by their path inside the store."""
    names = {locate_shard(array, record.index): file for array, file in record.files.items()}
    return {name: ListedFile(record.index, name, file) for name, file in names.items()}


def place(work: Path, file: Path, targets: Iterable[Path]) -> None:
    for target in targets:
        put_link(file, target, scratch=work / "scratch")


def read_provenance(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / PROVENANCE_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_facts(path: Path) -> dict[int, dict[str, Any]]:
    """Who computed each shard, as far as provenance.json can be read."""
    shards = read_provenance(path).get("shards")
    return {
        shard["index"]: {key: value for key, value in shard.items() if key != "index"}
        for shard in (shards if isinstance(shards, list) else [])
        if isinstance(shard, dict) and isinstance(shard.get("index"), int)
    }
