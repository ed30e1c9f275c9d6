"""Give a finished store its public path, in one rename."""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from store.crash import crash_point
from store.disk import disk_errors, fsync_folder, link_tree, make_folder, write_durably
from store.errors import ShardCorrupt, ShardMissing, StoreError, StoreLocked, StoreMismatch
from store.identity import check_identity
from store.lock import lock_work
from store.manifest import (
    MANIFEST_NAME,
    PROVENANCE_NAME,
    Manifest,
    StoreSpec,
    build_manifest,
    encode_manifest,
)
from store.reader import open_store
from store.summary import count_bytes
from store.verify import find_damage
from store.work import Commit, forget_shard, read_commits, store_folder, sweep


def publish(
    work: Path,
    spec: StoreSpec,
    out: Path,
    *,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
) -> Manifest:
    """Make `out` the finished store, by hard links to the work folder, and return its manifest.

    Returns at once if `out` already is that store, by its manifest and the sizes of its files. One
    that is removed, or lacks or cuts a file, is made again from the work folder, with the same
    provenance.json, so that nothing downstream of it changes; every byte of that is checked first.

    Raises StoreMismatch if `out` is another store (unless `overwrite`) or no store; ShardMissing if
    shards are not committed; ShardCorrupt if the work folder's files are damaged, after dropping
    the commits of those shards, so that the next run recomputes them. Only for the holder of the
    work folder's lock.
    """
    if manifest := find_published(spec, out, overwrite=overwrite):
        _remove(_names_aside(spec, out))
        return manifest
    commits = read_commits(work, spec)
    if missing := [shard.index for shard in spec.layout.shards if shard.index not in commits]:
        raise ShardMissing(
            f"shards in {work}: expected {len(spec.layout.shards)} committed, got "
            f"{len(missing)} missing (the first is {missing[0]}). "
            "Run `pipeline cache` to compute them."
        )
    sweep(work)  # of workers that died while others went on
    manifest = build_manifest(spec, [commits[shard.index].record for shard in spec.layout.shards])
    crash_point("before-publish")
    # Of copies, which are made where the file system has no links.
    needed_bytes = count_bytes(manifest) + 4 * len(encode_manifest(manifest))
    with disk_errors(out, needed_bytes):
        _write_descriptions(work, manifest, commits, provenance)
        _check_bytes(work)
        _replace(store_folder(work), out, spec)
    return manifest


def find_published(spec: StoreSpec, out: Path, *, overwrite: bool = False) -> Manifest | None:
    """The manifest of `out` if it is the store asked for and whole; None if it is to be made.

    Raises as publish does if `out` must not be replaced, so a caller can find out beforehand.
    """
    refuse_nested(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST_NAME).is_file():
        raise StoreMismatch(
            f"output at {out}: expected a store or nothing, got something else. Move it away or "
            "choose another --out."
        )
    try:
        manifest = open_store(out).manifest
    except StoreError:
        fingerprint = _read_fingerprint(out)
        if overwrite or fingerprint == spec.fingerprint:
            return None
        raise
    if manifest.fingerprint == spec.fingerprint:
        return manifest
    if not overwrite:
        check_identity(
            spec.identity,
            manifest.identity,
            out,
            "Choose another --out, or replace it with --overwrite.",
        )
    return None


def refuse_nested(out: Path) -> None:
    """Raise StoreMismatch if `out` is inside a store, of which it would look like a part."""
    for parent in out.absolute().parents:
        if (parent / MANIFEST_NAME).is_file() and (parent / "zarr.json").is_file():
            raise StoreMismatch(
                f"output at {out}: expected a path outside of stores, got one in the store at "
                f"{parent}. Choose another --out."
            )


def _read_fingerprint(out: Path) -> str | None:
    """What a damaged store says that it is."""
    try:
        return json.loads((out / MANIFEST_NAME).read_bytes())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_descriptions(
    work: Path, manifest: Manifest, commits: Mapping[int, Commit], provenance: Mapping[str, Any]
) -> None:
    """manifest.json and provenance.json, which is kept if it tells of the same computation."""
    folder, scratch = store_folder(work), work / "scratch"
    shards = [{"index": index, **commits[index].facts} for index in sorted(commits)]
    try:
        kept = json.loads((folder / PROVENANCE_NAME).read_bytes())["shards"] == shards
    except (OSError, ValueError, KeyError, TypeError):
        kept = False
    if not kept:
        content = json.dumps({**provenance, "shards": shards}, indent=1).encode()
        write_durably(
            folder / PROVENANCE_NAME, [content + b"\n"], scratch=scratch, kind="provenance"
        )
    write_durably(
        folder / MANIFEST_NAME, [encode_manifest(manifest)], scratch=scratch, kind="manifest"
    )


def _check_bytes(work: Path) -> None:
    damage = find_damage(open_store(store_folder(work)))
    for file in damage:
        if file.shard is not None:
            forget_shard(work, file.shard)
    if damage:
        raise ShardCorrupt(
            f"{len(damage)} files in {store_folder(work)}: expected the bytes that were written, "
            f"got others (the first is {damage[0].path}). "
            "Run `pipeline cache` again: it recomputes their shards."
        )


def _replace(source: Path, out: Path, spec: StoreSpec) -> None:
    """Rename a linked copy of `source` to `out`; an old `out` is moved aside, and deleted last."""
    new, old = _names_aside(spec, out)
    make_folder(out.parent)
    _remove((new, old))
    crash_point("before-link")
    link_tree(source, new)
    crash_point("after-link")
    if out.exists():
        os.rename(out, old)
        crash_point("between-renames")
    os.rename(new, out)
    crash_point("after-publish")
    fsync_folder(out.parent)
    if old.exists():
        crash_point("before-delete")
        _remove((old,))
        crash_point("after-delete")


def sweep_aside(work: Path, spec: StoreSpec, out: Path) -> None:
    """Delete the copies beside `out` that a killed publication left, unless one is under way."""
    if any(folder.exists() for folder in _names_aside(spec, out)):
        with suppress(StoreLocked), lock_work(work):
            _remove(_names_aside(spec, out))


def _names_aside(spec: StoreSpec, out: Path) -> tuple[Path, Path]:
    """Of the new store before it is `out`, and of the old one after; this spec's alone."""
    new, old = (
        out.with_name(f".{out.name}.{spec.fingerprint[:16]}.{suffix}") for suffix in ("new", "old")
    )
    return new, old


def _remove(folders: tuple[Path, ...]) -> None:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder)
