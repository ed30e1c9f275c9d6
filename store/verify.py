"""Find all that is damaged in a store, however damaged it is.

Reading and opening stop at the first fault; these list every one, and need no more than a whole
manifest.json.
"""

import hashlib
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from store.errors import ManifestError, ShardCorrupt, ShardMissing
from store.files import LocalFiles, StoreFiles
from store.layout import ShardSpec
from store.manifest import MANIFEST_NAME, PROVENANCE_NAME, locate_scales, locate_shard
from store.metadata import check_node, list_metadata
from store.numbers import decode_numbers
from store.reader import ActivationStore, ListedFile, list_files, read_manifest

ASKED = 8  # sizes at a time: a remote answers each after a trip
_OTHER = "other content"


class DamagedFile(NamedTuple):
    shard: int | None  # None for a zarr.json
    path: str  # inside the store
    problem: str  # such as "missing", "cut to 12 of 96 bytes", "other content"
    as_recorded: bool = False  # its hash is the manifest's: no copy of it can be better


def verify_quick(files: StoreFiles) -> list[DamagedFile]:
    """What is missing or of another size, and every zarr.json that is not the manifest's.

    A remote is asked for every file; of a dvc+ URL, that is DVC's listing. Raises StoreNotFound or
    ManifestError where the manifest is missing or broken.
    """
    store = _open_unchecked(files)
    damage = _find_metadata_damage(store)
    listed = list(list_files(store))
    with ThreadPoolExecutor(ASKED, thread_name_prefix="store-verify") as threads:
        sizes = threads.map(lambda file: files.ask_size(file.path, file.record), listed)
        for file, found in zip(listed, sizes, strict=True):
            if problem := _describe_size(found, file.record.bytes):
                damage.append(DamagedFile(file.shard, file.path, problem))
    return damage


def verify_full(
    files: StoreFiles, on_progress: Callable[[int], None] | None = None
) -> list[DamagedFile]:
    """Every file whose content is not the manifest's, or holds numbers that no store may hold.

    Reads every byte; `on_progress` is told how many. Raises as verify_quick does.
    """
    store = _open_unchecked(files)
    damage = _find_metadata_damage(store) + find_damage(store, on_progress)
    damaged = {file.path for file in damage}
    for shard in store.shards:
        damage += _find_bad_numbers(store, shard, damaged)
    return damage


def find_damage(
    store: ActivationStore, on_progress: Callable[[int], None] | None = None
) -> list[DamagedFile]:
    """Every shard file whose sha256 is not the manifest's; `on_progress` is told the bytes read."""
    damage = []
    for file in list_files(store):
        if problem := describe_damage(store.files, file):
            damage.append(DamagedFile(file.shard, file.path, problem))
        if on_progress:
            on_progress(file.record.bytes)
    return damage


def describe_damage(files: StoreFiles, file: ListedFile) -> str | None:
    """What is wrong with a shard file, None if its sha256 is the recorded one.

    A bad copy in the shard cache is no fault of the remote: it is dropped, the file fetched anew.
    """
    problem = _find_problem(files, file)
    if problem and not isinstance(files, LocalFiles):
        problem = _find_problem(files, file)
    return problem


def _find_problem(files: StoreFiles, file: ListedFile) -> str | None:
    problem = _OTHER  # of a remote's file, which is hashed as it comes
    try:
        with (
            files.open(file.path, file.record) as descriptor,
            open(descriptor, "rb", closefd=False) as opened,
        ):
            found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found == file.record.sha256:
                return None
            problem = _describe_size(opened.tell(), file.record.bytes) or _OTHER
            raise ShardCorrupt(problem)  # to `files`, which may have a copy to drop
    except (FileNotFoundError, NotADirectoryError, ShardMissing):
        return "missing"
    except ShardCorrupt:
        return problem
    except OSError as error:
        return error.strerror or str(error)


def list_foreign(files: StoreFiles) -> list[str]:
    """Files in a store's folder that are no part of it; none of a remote, which is not listed."""
    if not isinstance(files, LocalFiles):
        return []
    store = _open_unchecked(files)
    ours = {MANIFEST_NAME, PROVENANCE_NAME, *list_metadata(store.spec)}
    ours |= {file.path for file in list_files(store)}
    found = (path for path in Path(files.folder).rglob("*") if not path.is_dir())
    return sorted({path.relative_to(files.folder).as_posix() for path in found} - ours)


def _open_unchecked(files: StoreFiles) -> ActivationStore:
    manifest = read_manifest(files)
    return ActivationStore(files, manifest, tuple(range(len(manifest.shards))))


def _find_metadata_damage(store: ActivationStore) -> list[DamagedFile]:
    damage = []
    for path, expected in list_metadata(store.spec).items():
        try:
            check_node(store.files, path, expected)
        except ManifestError:
            damage.append(DamagedFile(None, path, "missing, or not what the manifest asks for"))
    return damage


def _describe_size(found: int | None, expected: int) -> str | None:
    if found is None:
        return "missing"
    return None if found == expected else f"{found} bytes instead of {expected}"


def _find_bad_numbers(
    store: ActivationStore, shard: ShardSpec, damaged: Set[str]
) -> Iterator[DamagedFile]:
    """Columns of the recorded bytes whose numbers cannot be read or are not finite."""
    step = store.spec.layout.rows_per_chunk
    for path, column in store.spec.columns().items():
        arrays = (path, *locate_scales(path)) if column.numbers.scaled else (path,)
        if any(locate_shard(array, shard.index) in damaged for array in arrays):
            continue  # or not here, as in a part of a store
        problem = None
        try:
            for first in range(0, shard.n_rows, step):
                slots = range(first, min(first + step, shard.n_rows))
                values = decode_numbers(store.read_stored(shard.index, path, slots), column.numbers)
                if not values.isfinite().all():
                    problem = "numbers that are not finite"
        except ShardCorrupt:
            problem = "other checksums than the manifest's"
        if problem:
            yield DamagedFile(shard.index, locate_shard(path, shard.index), problem, True)
