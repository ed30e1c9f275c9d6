"""Mend a damaged store: take each bad file from where a good one is, else have it computed again.

Plan first: verify says what is bad, the commit records what the work folder has. Then per shard
either all its bad files are replaced by copies whose sha256 is the manifest's, or the shard is
given up: its bad files are removed and its commit record is dropped, so that `pipeline cache`
computes that shard and no other. Nothing is ever written into a file that exists: it may have other
names, such as one in DVC's cache.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from store.adoption import adopt_shard, list_shard, place, read_facts, read_provenance
from store.disk import disk_errors, remove, write_durably
from store.errors import (
    ManifestError,
    ShardCorrupt,
    ShardMissing,
    StoreMismatch,
    StoreNotFound,
)
from store.files import LocalFiles, StoreFiles
from store.identity import check_identity
from store.lock import lock_work
from store.manifest import (
    MANIFEST_NAME,
    Manifest,
    build_manifest,
    encode_manifest,
)
from store.reader import ListedFile, locate_pull, read_manifest
from store.verify import DamagedFile, describe_damage, verify_full
from store.work import (
    forget_shard,
    locate_work,
    read_commits,
    read_spec,
    store_folder,
    sweep,
)
from store.writer import prepare_work


class RepairedShard(NamedTuple):
    shard: int
    files: tuple[str, ...]  # that were bad, by their path inside the store
    done: Literal["relinked", "fetched", "dropped"]  # with the work folder's copies; the source's


class RepairReport(NamedTuple):
    manifest_restored: bool
    metadata: tuple[str, ...]  # zarr.json files that were written again
    shards: tuple[RepairedShard, ...]
    notes: tuple[str, ...]  # why recomputed bytes may differ from those that the store had

    @property
    def dropped(self) -> tuple[int, ...]:
        """Shards that `pipeline cache` has to compute again."""
        return tuple(repaired.shard for repaired in self.shards if repaired.done == "dropped")


def repair(
    path: Path,
    *,
    source: StoreFiles | None = None,
    work: Path | None = None,
    machine: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> RepairReport:
    """Make the store at `path` whole, or as whole as it gets without the model.

    `source` is another copy of the store, of which every byte is checked by hash. `work` is its
    work folder, made where there is none. `machine` (device, threads, torch) is compared with
    provenance.json for the notes. `on_progress` is told the bytes verified.

    Raises ManifestError or StoreNotFound where no manifest can be had, StoreMismatch if `source` is
    another store, StoreLocked while the store is being written.
    """
    files = LocalFiles(path)
    manifest, restored = _find_manifest(files, source, work)
    damage = [] if restored else verify_full(files, on_progress)
    if not damage and not restored:
        return RepairReport(False, (), (), ())
    work = work or locate_work(path, manifest.fingerprint)
    had_work = work.exists()
    command = f"pipeline store repair {path}"
    with lock_work(work), disk_errors(work, _largest_file(manifest), command):
        prepare_work(work, manifest.spec)
        sweep(work)
        if restored:
            content = [encode_manifest(manifest)]
            remove(path / MANIFEST_NAME)
            write_durably(path / MANIFEST_NAME, content, scratch=work / "scratch", kind="manifest")
            damage = verify_full(files, on_progress)
        metadata = tuple(file.path for file in damage if file.shard is None)
        for name in metadata:
            place(work, store_folder(work) / name, (path / name,))
        shards = tuple(
            _repair_shard(path, work, manifest, source, shard, bad)
            for shard, bad in _group(damage).items()
        )
        report = RepairReport(restored, metadata, shards, ())
        if report.dropped or had_work:
            commits, facts = read_commits(work, manifest.spec), read_facts(path)
            for record in manifest.shards:
                commit = commits.get(record.index)
                same = commit is not None and commit.record == record
                if record.index not in report.dropped and not same:
                    adopt_shard(path, work, record, facts)
    return report._replace(notes=_compare_machines(path, report.dropped, machine or {}))


def _largest_file(manifest: Manifest) -> int:
    return max(file.bytes for shard in manifest.shards for file in shard.files.values())


def _find_manifest(
    files: LocalFiles, source: StoreFiles | None, work: Path | None
) -> tuple[Manifest, bool]:
    """The store's manifest; where it is broken, the source's or the work folder's, and True."""
    theirs = None if source is None else read_manifest(source)
    try:
        ours = read_manifest(files)
    except (ManifestError, StoreNotFound) as error:
        fingerprint = _read_fingerprint(files)
        if theirs is None or source is None:
            if fingerprint and (rebuilt := _rebuild_manifest(files.folder, fingerprint, work)):
                return rebuilt, True
            if fingerprint is None or locate_pull(files.folder).exists():
                raise
            raise type(error)(
                f"manifest at {files.locate(MANIFEST_NAME)}: expected a whole one, got a broken "
                "one or none, and no work folder with every shard to make it again from. Take that "
                f"of another copy with `pipeline store repair {files.where} --from STORE`, or move "
                "the folder away and run `pipeline cache`."
            ) from None
        if fingerprint != theirs.fingerprint:
            raise StoreMismatch(
                f"store at {files.where}: expected to be a damaged copy of {source.where}, got "
                "another fingerprint or none. Name a copy of the same store with --from."
            ) from None
        return theirs, True
    if theirs is not None and source is not None:
        check_identity(
            ours.identity, theirs.identity, source.where, "Name a copy of the same store."
        )
    return ours, False


def _rebuild_manifest(path: Path, fingerprint: str, work: Path | None) -> Manifest | None:
    """The manifest that publishing would write now; None without a commit for every shard."""
    work = work or locate_work(path, fingerprint)
    try:
        spec = read_spec(work)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if spec.fingerprint != fingerprint:
        return None
    commits = read_commits(work, spec)
    if len(commits) < len(spec.layout.shards):
        return None
    return build_manifest(spec, [commits[shard.index].record for shard in spec.layout.shards])


def _read_fingerprint(files: LocalFiles) -> str | None:
    """What a store without a whole manifest says that it is."""
    for read in (
        lambda: json.loads(files.read_bytes("zarr.json"))["attributes"]["fingerprint"],
        lambda: json.loads(files.read_bytes(MANIFEST_NAME))["fingerprint"],
    ):
        try:
            return read()
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _group(damage: Iterable[DamagedFile]) -> dict[int, list[DamagedFile]]:
    shards: dict[int, list[DamagedFile]] = {}
    for file in damage:
        if file.shard is not None:
            shards.setdefault(file.shard, []).append(file)
    return shards


def _repair_shard(
    path: Path,
    work: Path,
    manifest: Manifest,
    source: StoreFiles | None,
    index: int,
    bad: Sequence[DamagedFile],
) -> RepairedShard:
    """Replace the shard's bad files, or give the shard up."""
    names = tuple(file.path for file in bad)
    listed = list_shard(manifest.shards[index])
    wanted = [listed[name] for name in names]
    if not any(file.as_recorded for file in bad):
        own = LocalFiles(store_folder(work))
        if all(describe_damage(own, file) is None for file in wanted):
            for file in wanted:
                place(work, store_folder(work) / file.path, (path / file.path,))
            return RepairedShard(index, names, "relinked")
        if source is not None and all(_fetch(path, work, source, file) for file in wanted):
            return RepairedShard(index, names, "fetched")
    forget_shard(work, index)
    for name in names:
        remove(path / name)
    for name in listed:
        remove(store_folder(work) / name)
    return RepairedShard(index, names, "dropped")


def _fetch(path: Path, work: Path, source: StoreFiles, file: ListedFile) -> bool:
    """Put a copy of the source's file in both places if its content is the recorded one."""
    draft = work / "scratch" / f"fetched-{os.getpid()}"
    try:
        source.copy(file.path, file.record, draft)
        place(work, draft, (store_folder(work) / file.path, path / file.path))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ShardMissing, ShardCorrupt):
        return False  # it has no such file; if it cannot be reached, that is for the user to mend
    finally:
        draft.unlink(missing_ok=True)
    return True


def _compare_machines(
    path: Path, dropped: Sequence[int], machine: Mapping[str, Any]
) -> tuple[str, ...]:
    """Where this machine is not the one that computed the dropped shards."""
    versions = read_provenance(path).get("versions")
    facts = read_facts(path)
    notes = []
    for index in dropped:
        recorded = {**(versions if isinstance(versions, dict) else {}), **facts.get(index, {})}
        different = [
            f"{key} {recorded.get(key, 'not recorded')}, here {value}"
            for key, value in machine.items()
            if recorded.get(key) != value
        ]
        if different:
            notes.append(
                f"shard {index} was computed with {'; '.join(different)}: "
                "its bytes may differ when they are computed again"
            )
    return tuple(notes)
