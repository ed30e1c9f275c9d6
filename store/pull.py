"""Copy a store, or some of its shards for one hook, from anywhere to a folder.

Metadata and manifest come whole, so that the copy says what it is a part of; `open_store(folder,
hook=..., allow_partial=True)` reads it. Interrupted, it goes on where it stopped: files that are
there with the right content are kept. A file has its name only once it is whole, verified and
durable, and manifest.json comes last.

    .<name>.pull/source  the manifest's checksum: of which store there are files without a manifest
    .<name>.pull/lock    held by who pulls
    .<name>.pull/*       files without their final name yet
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from store.disk import check_room, disk_errors, make_folder, rename_durably, write_durably
from store.errors import ManifestError, ShardMissing, StoreError, StoreLocked, StoreMismatch
from store.files import LocalFiles, StoreFiles
from store.manifest import MANIFEST_NAME, PROVENANCE_NAME, FileRecord, Manifest, parse_manifest
from store.metadata import check_metadata, list_metadata
from store.publication import refuse_nested
from store.reader import ActivationStore, list_files, read_manifest_bytes

DOWNLOADS = 4  # at a time
_SOURCE, _LOCK = "source", "lock"
_COMMAND = "pipeline store pull"


class PullPlan(NamedTuple):
    """What to copy; decided before anything is written."""

    manifest_bytes: bytes  # of manifest.json, as the source has it
    manifest: Manifest
    shards: tuple[int, ...]
    hook: str | None  # None: all of them
    files: tuple[tuple[str, FileRecord], ...]  # by their path inside the store

    @property
    def bytes(self) -> int:
        return sum(record.bytes for _, record in self.files)


class Pulled(NamedTuple):
    """What `pull_store` did."""

    files: int  # copied
    bytes: int  # copied
    kept: int  # files that were there already


def plan_pull(
    source: StoreFiles,
    *,
    shards: tuple[int, int] | None = None,
    layer: int | None = None,
    hook: str | None = None,
) -> PullPlan:
    """Which files make shards first..stop of one hook, or all of them; reads the metadata only.

    `layer` stands for the one hook of `blocks.<layer>.`. Raises StoreNotFound, ManifestError, and
    StoreError for shards or a hook that the store lacks.
    """
    content = read_manifest_bytes(source)
    manifest = parse_manifest(content, source.locate(MANIFEST_NAME))
    check_metadata(source, manifest.spec)
    n_shards = len(manifest.shards)
    first, stop = shards or (0, n_shards)
    if not 0 <= first < stop <= n_shards:
        raise StoreError(
            f"shards of {source.where}: expected a range in 0:{n_shards}, got {first}:{stop}. "
            "Correct --shards."
        )
    store = ActivationStore(source, manifest, tuple(range(n_shards)))
    if layer is not None or hook is not None:
        hook = store.pick_hook(_find_hook(manifest.hooks, layer) if hook is None else hook)
    files = tuple(
        (file.path, file.record) for file in list_files(store, hook) if first <= file.shard < stop
    )
    return PullPlan(content, manifest, tuple(range(first, stop)), hook, files)


def pull_store(
    source: StoreFiles,
    out: Path,
    plan: PullPlan,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> Pulled:
    """Copy what is planned to the folder `out`; `on_progress` is told bytes as they are there.

    Raises StoreMismatch if `out` holds another store or is in one, StoreLocked while another
    process pulls into it, DiskFull, ShardMissing, ShardCorrupt, and what the source raises.
    """
    scratch = out.with_name(f".{out.name}.pull")
    with disk_errors(out, plan.bytes, _COMMAND):
        refuse_nested(out)
        _refuse_foreign(out, scratch, plan.manifest)  # before anything is written
        make_folder(scratch)
        lock = FileLock(scratch / _LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise StoreLocked(
                f"folder at {out}: expected no other process that pulls into it, got one. Wait for "
                "it or stop it, then run `pipeline store pull` again."
            ) from None
        try:
            _refuse_foreign(out, scratch, plan.manifest)  # what others pulled in between
            checksum = plan.manifest.checksum.encode()
            write_durably(scratch / _SOURCE, [checksum], scratch=scratch)
            pulled = _copy_files(source, out, plan, scratch, on_progress)
            for path in list_metadata(plan.manifest.spec):
                write_durably(out / path, [source.read_bytes(path)], scratch=scratch)
            check_metadata(LocalFiles(out), plan.manifest.spec)
            _copy_provenance(source, out, scratch)
            write_durably(out / MANIFEST_NAME, [plan.manifest_bytes], scratch=scratch)
            shutil.rmtree(scratch, ignore_errors=True)
        finally:
            lock.release()
    return pulled


def _find_hook(hooks: Sequence[str], layer: int | None) -> str | None:
    """The hook of a layer; None where it has none or several, which pick_hook then explains."""
    of_layer = [hook for hook in hooks if hook.startswith(f"blocks.{layer}.")]
    return of_layer[0] if len(of_layer) == 1 else f"blocks.{layer}."


def _copy_files(
    source: StoreFiles,
    out: Path,
    plan: PullPlan,
    scratch: Path,
    on_progress: Callable[[int], None] | None,
) -> Pulled:
    for leftover in scratch.iterdir():  # a killed pull's, which takes the room that is needed
        if leftover.name not in (_LOCK, _SOURCE):
            leftover.unlink()
    wanted = []
    for path, record in plan.files:
        if not _is_whole(out / path, record):
            wanted.append((path, record))
        elif on_progress:
            on_progress(record.bytes)
    check_room(out, sum(record.bytes for _, record in wanted), _COMMAND)
    with ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="store-pull") as threads:
        jobs = {
            threads.submit(_copy_file, source, out, path, record, scratch): record.bytes
            for path, record in wanted
        }
        try:
            for job in as_completed(jobs):
                job.result()
                if on_progress:
                    on_progress(jobs[job])
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)  # those in hand are finished
            raise
    return Pulled(
        len(wanted), sum(record.bytes for _, record in wanted), len(plan.files) - len(wanted)
    )


def _copy_file(source: StoreFiles, out: Path, path: str, record: FileRecord, scratch: Path) -> None:
    partial = scratch / path.replace("/", "+")
    try:
        try:
            source.copy(path, record, partial)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise ShardMissing(
                f"shard file at {source.locate(path)}: expected a file, got none. Pull other "
                "shards (--shards), or have it uploaded again."
            ) from None
        make_folder((out / path).parent)
        rename_durably(partial, out / path, kind="pulled")
    finally:
        partial.unlink(missing_ok=True)  # of no use where it is not whole


def _is_whole(path: Path, record: FileRecord) -> bool:
    try:
        with path.open("rb") as file:
            return (
                path.stat().st_size == record.bytes
                and hashlib.file_digest(file, "sha256").hexdigest() == record.sha256
            )
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return False


def _refuse_foreign(out: Path, scratch: Path, manifest: Manifest) -> None:
    """Shards of two stores, or of one store made twice with other bytes, are never mixed."""
    advice = "Choose another --out."
    try:
        found = parse_manifest((out / MANIFEST_NAME).read_bytes(), str(out / MANIFEST_NAME))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ManifestError):
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return
        if out.is_dir() and _list_others(out, manifest) == []:
            former = _read_source(scratch)
            if former == manifest.checksum:
                return  # an earlier pull that was cut before its manifest
            got = "files of another or an unknown store, without a manifest"
            advice = (
                f"Choose another --out, or mend it: `pipeline store repair {out} --from STORE`."
            )
            if former is not None:
                got = "an unfinished pull of another or an unknown store"
                advice = "Finish that one with its own URL, or choose another --out."
        else:
            got = "other files"
    else:
        if found == manifest:
            return
        got = f"the store {found.fingerprint[:16]}"
        got += ", made anew with other bytes" * (found.fingerprint == manifest.fingerprint)
    raise StoreMismatch(
        f"folder at {out}: expected nothing, or a part of the store {manifest.fingerprint[:16]}, "
        f"got {got}. {advice}"
    )


def _read_source(scratch: Path) -> str | None:
    """The checksum of the store that an unfinished pull is of."""
    try:
        return (scratch / _SOURCE).read_text()
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None


def _list_others(out: Path, manifest: Manifest) -> list[str]:
    """What is there besides the files and folders of such a store."""
    ours = {path.partition("/")[0] for path in manifest.spec.arrays()}
    ours |= {"zarr.json", MANIFEST_NAME, PROVENANCE_NAME}
    return sorted({entry.name for entry in out.iterdir()} - ours)


def _copy_provenance(source: StoreFiles, out: Path, scratch: Path) -> None:
    try:
        content = source.read_bytes(PROVENANCE_NAME)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return  # it decides nothing
    write_durably(out / PROVENANCE_NAME, [content], scratch=scratch)
