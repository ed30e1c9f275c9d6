"""The work folder: which shards of a store are committed.

    <work>/store/              the growing Zarr group
    <work>/commits/00003.json  {"record": ..., "facts": ..., "checksum": ...}: shard 3 exists
                               because this file does
    <work>/spec.json           what the work folder is for
    <work>/scratch/            files without their final name yet
    <work>/lock, holder.json   one driver at a time, and who it is
    <work>/locks/00003         one writer per shard at a time

Beside the store that it becomes, so that publishing is a matter of hard links.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue

from store.crash import crash_point
from store.disk import write_durably
from store.identity import fingerprint_of
from store.layout import ShardSpec, StoreLayout
from store.manifest import (
    ShardRecord,
    StoreSpec,
    list_file_faults,
    locate_shard,
)


class Commit(BaseModel):
    """The content of a commit record."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    record: ShardRecord  # what the shard is: a function of the inputs
    facts: dict[str, JsonValue]  # who computed it, when and how: goes to provenance.json


def store_folder(work: Path) -> Path:
    return work / "store"


def locate_work(out: Path, fingerprint: str) -> Path:
    """The work folder of the store at `out`; absolute, since workers run elsewhere."""
    return out.absolute().parent / ".work" / fingerprint[:16]


def commit_path(work: Path, shard: int) -> Path:
    return work / "commits" / f"{shard:05d}.json"


def committed_shards(work: Path, spec: StoreSpec) -> dict[int, ShardRecord]:
    """Records of the shards that are committed as this spec wants them and have all their files.

    A record whose files are missing or of another size does not count.
    """
    return {index: commit.record for index, commit in read_commits(work, spec).items()}


def read_commits(
    work: Path, spec: StoreSpec, shards: Sequence[ShardSpec] | None = None
) -> dict[int, Commit]:
    """As committed_shards, with the facts; of all shards or of some."""
    commits = {}
    for shard in spec.layout.shards if shards is None else shards:
        commit = _read_commit(commit_path(work, shard.index))
        if commit is None or commit.record.spec != shard or list_file_faults(spec, commit.record):
            continue
        if _has_files(work, commit.record):
            commits[shard.index] = commit
    return commits


def read_spec(work: Path) -> StoreSpec:
    """What the work folder is for, from spec.json and its commit records.

    Raises OSError, ValueError, KeyError or TypeError without a commit record for every shard.
    """
    fields = json.loads((work / "spec.json").read_bytes())
    found = [_read_commit(path) for path in sorted((work / "commits").glob("*.json"))]
    shards = sorted((c.record.spec for c in found if c is not None), key=lambda spec: spec.index)
    layout = StoreLayout(
        rows_per_chunk=fields["rows_per_chunk"],
        rows_per_shard=fields["rows_per_shard"],
        blocks_per_shard=fields["rows_per_shard"] // max(fields["context_length"], 1),
        shards=tuple(shards),
        n_slots=fields["n_slots"],
        n_rows=fields["n_rows"],
    )
    names = ("identity", "d_model", "context_length", "acts_dtype", "grads_dtype", "seed")
    return StoreSpec(
        **{name: fields[name] for name in (*names, "compression")},
        hooks=tuple(fields["hooks"]),
        layout=layout,
    )


def write_commit(work: Path, commit: Commit) -> None:
    """Make a shard exist: the last thing that is written of it."""
    fields = commit.model_dump(mode="json")
    content = json.dumps(fields | {"checksum": fingerprint_of(fields)}, indent=1)
    crash_point("before-commit")
    path = commit_path(work, commit.record.index)
    write_durably(path, [content.encode()], scratch=work / "scratch", kind="commit")
    crash_point("after-commit")


def sweep(work: Path) -> int:
    """Delete what an interrupted run left without a valid commit record; returns how many files.

    Only for the holder of the work folder's lock.
    """
    kept = set()
    leftovers = [path for path in (work / "scratch").rglob("*") if path.is_file()]
    for path in (work / "commits").glob("*.json"):
        commit = _read_commit(path)
        if (
            commit is None
            or path != commit_path(work, commit.record.index)
            or not _has_files(work, commit.record)
        ):
            leftovers.append(path)
        else:
            kept |= set(locate_files(work, commit.record))
    for path in store_folder(work).rglob("c/**/*"):
        if path.is_file() and path not in kept:
            leftovers.append(path)
    for path in leftovers:
        path.unlink(missing_ok=True)  # a duplicate of a shard may be renaming it
    for folder in (work / "scratch").glob("*/"):
        shutil.rmtree(folder)
    return len(leftovers)


def forget_shard(work: Path, shard: int) -> None:
    """Drop a shard's commit record, so that the next run computes it again."""
    crash_point("before-forget")
    commit_path(work, shard).unlink(missing_ok=True)
    crash_point("after-forget")


def locate_files(work: Path, record: ShardRecord) -> dict[Path, int]:
    """Where a shard's files are, with their sizes."""
    return {
        store_folder(work) / locate_shard(path, record.index): file.bytes
        for path, file in record.files.items()
    }


def _has_files(work: Path, record: ShardRecord) -> bool:
    return all(
        path.is_file() and path.stat().st_size == n_bytes
        for path, n_bytes in locate_files(work, record).items()
    )


def _read_commit(path: Path) -> Commit | None:
    """None for what is no whole commit record: the store's manifest would repeat what it says."""
    try:
        fields = json.loads(path.read_bytes())
        checksum = fields.pop("checksum")
        if checksum != fingerprint_of(fields):
            return None
        return Commit.model_validate_json(json.dumps(fields))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
