"""Mend a damaged store: take each bad file from where a good one is, else have it computed again.

Plan first: verify says what is bad, the commit records what the work folder has. Then per shard
either all its bad files are replaced by copies whose sha256 is the manifest's, or the shard is
given up: its bad files are removed and its commit record is dropped, so that `pipeline cache`
computes that shard and no other. Nothing is ever written into a file that exists: it may have other
names, such as one in DVC's cache.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from store.disk import disk_errors, put_link, write_durably
from store.errors import (
    ManifestError,
    ShardCorrupt,
    ShardMissing,
    StoreMismatch,
    StoreNotFound,
)
from store.files import LocalFiles, StoreFiles
from store.lock import lock_work
from store.manifest import (
    MANIFEST_NAME,
    PROVENANCE_NAME,
    Manifest,
    check_identity,
    encode_manifest,
    locate_shard,
)
from store.reader import ListedFile, read_manifest
from store.verify import DamagedFile, describe_damage, verify_full
from store.work import (
    Commit,
    forget_shard,
    locate_work,
    read_commits,
    store_folder,
    sweep,
    write_commit,
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
    manifest, restored = _find_manifest(files, source)
    damage = [] if restored else verify_full(files, on_progress)
    if not damage and not restored:
        return RepairReport(False, (), (), ())
    work = work or locate_work(path, manifest.fingerprint)
    had_work = work.exists()
    with lock_work(work), disk_errors(work, needed_bytes=_largest_file(manifest)):
        prepare_work(work, manifest.spec)
        sweep(work)
        if restored:
            content = [encode_manifest(manifest)]
            _remove(path / MANIFEST_NAME)
            write_durably(path / MANIFEST_NAME, content, scratch=work / "scratch", kind="manifest")
            damage = verify_full(files, on_progress)
        metadata = tuple(file.path for file in damage if file.shard is None)
        for name in metadata:
            _place(work, store_folder(work) / name, (path / name,))
        shards = tuple(
            _repair_shard(path, work, manifest, source, shard, bad)
            for shard, bad in _group(damage).items()
        )
        report = RepairReport(restored, metadata, shards, ())
        if report.dropped or had_work:
            _adopt_good_shards(path, work, manifest, set(report.dropped))
    return report._replace(notes=_compare_machines(path, report.dropped, machine or {}))


def _largest_file(manifest: Manifest) -> int:
    return max(file.bytes for shard in manifest.shards for file in shard.files.values())


def _find_manifest(files: LocalFiles, source: StoreFiles | None) -> tuple[Manifest, bool]:
    """The store's manifest; the source's, and True, where it is broken."""
    theirs = None if source is None else read_manifest(source)
    try:
        ours = read_manifest(files)
    except (ManifestError, StoreNotFound) as error:
        if theirs is None or source is None:
            raise type(error)(
                f"{error} Only a whole copy can replace it: "
                f"`pipeline store repair {files.where} --from URL`. Without one, move that folder "
                "away and run `pipeline cache`, which keeps what its work folder has."
            ) from None
        if _read_fingerprint(files) != theirs.fingerprint:
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
    listed = {
        locate_shard(array, index): ListedFile(index, locate_shard(array, index), record)
        for array, record in manifest.shards[index].files.items()
    }
    wanted = [listed[name] for name in names]
    if not any(file.as_recorded for file in bad):
        own = LocalFiles(store_folder(work))
        if all(describe_damage(own, file) is None for file in wanted):
            for file in wanted:
                _place(work, store_folder(work) / file.path, (path / file.path,))
            return RepairedShard(index, names, "relinked")
        if source is not None and all(_fetch(path, work, source, file) for file in wanted):
            return RepairedShard(index, names, "fetched")
    forget_shard(work, index)
    for name in names:
        _remove(path / name)
    for name in listed:
        _remove(store_folder(work) / name)
    return RepairedShard(index, names, "dropped")


def _fetch(path: Path, work: Path, source: StoreFiles, file: ListedFile) -> bool:
    """Put a copy of the source's file in both places if its content is the recorded one."""
    draft = work / "scratch" / f"fetched-{os.getpid()}"
    try:
        source.copy(file.path, file.record, draft)
        _place(work, draft, (store_folder(work) / file.path, path / file.path))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ShardMissing, ShardCorrupt):
        return False  # it has no such file; if it cannot be reached, that is for the user to mend
    finally:
        draft.unlink(missing_ok=True)
    return True


def _adopt_good_shards(path: Path, work: Path, manifest: Manifest, dropped: set[int]) -> None:
    """Commit every good shard of the store that the work folder lacks or has otherwise."""
    commits, facts = read_commits(work, manifest.spec), _read_facts(path)
    for record in manifest.shards:
        commit = commits.get(record.index)
        if record.index in dropped or (commit is not None and commit.record == record):
            continue
        forget_shard(work, record.index)
        for array in record.files:
            name = locate_shard(array, record.index)
            _place(work, path / name, (store_folder(work) / name,))
        write_commit(work, Commit(record=record, facts=facts.get(record.index, {})))


def _place(work: Path, file: Path, targets: Iterable[Path]) -> None:
    for target in targets:
        put_link(file, target, scratch=work / "scratch")


def _remove(file: Path) -> None:
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)


def _read_provenance(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / PROVENANCE_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _read_facts(path: Path) -> dict[int, dict[str, Any]]:
    """Who computed each shard, as far as provenance.json can be read."""
    shards = _read_provenance(path).get("shards")
    return {
        shard["index"]: {key: value for key, value in shard.items() if key != "index"}
        for shard in (shards if isinstance(shards, list) else [])
        if isinstance(shard, dict) and isinstance(shard.get("index"), int)
    }


def _compare_machines(
    path: Path, dropped: Sequence[int], machine: Mapping[str, Any]
) -> tuple[str, ...]:
    """Where this machine is not the one that computed the dropped shards."""
    versions = _read_provenance(path).get("versions")
    facts = _read_facts(path)
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
