"""SAEs of other libraries as a run, so that `pipeline evaluate` measures them like our own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import ConfigError, TrainError
from pipeline.export.folding import read_json
from pipeline.export.saelens import CONFIG_NAME, load_saelens
from pipeline.files import write_json
from pipeline.runs import Run, read_run
from pipeline.sae import save_sae
from store.manifest import Manifest


class Foreign(NamedTuple):
    """One SAELens folder."""

    name: str  # of the SAE in the run: the folder's
    folder: Path
    metadata: Mapping[str, Any]  # of its cfg.json


def import_saelens(
    folder: Path,
    manifest: Manifest,
    out: Path,
    *,
    hook: str | None = None,
    exclude_positions: tuple[int, ...] | None = None,
) -> Run:
    """Write a run with the SAE in a SAELens folder, or with those in its subfolders.

    `manifest` is that of the store whose model and corpus the SAEs are to be measured on, `hook`
    one of the store's (None: what their metadata say), `exclude_positions` those that evaluation
    leaves unpatched (None: what an export of ours recorded, else none). Such a run has no history,
    so no report. Raises ConfigError for a hook that the store lacks, TrainError for what
    `load_saelens` refuses, another width than the store's, and an `out` that has files.
    """
    found = find_saelens(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainError(
            f"run at {out}: expected an empty folder or nothing, got files. Choose another --out."
        )
    hook = _choose_hook(found, manifest, hook)
    if exclude_positions is None:
        exclude_positions = _read_excluded(found[0])
    saes = {each.name: load_saelens(each.folder) for each in found}
    for name, sae in saes.items():
        if sae.d_model != manifest.d_model:
            raise TrainError(
                f"{name} of {folder}: expected d_in = {manifest.d_model}, the width of the store, "
                f"got {sae.d_model}. Name the store of its model with --store."
            )
    for each in found:
        training = {"seed": None, "hook": hook, "imported_from": "saelens"}
        training["metadata"] = dict(each.metadata)
        save_sae(saes[each.name], out / each.name, training=training)
    write_json(  # last: without it this is no run
        out / "config.json",
        {
            "train": {"exclude_positions": list(exclude_positions), "allow_partial": False},
            "members": list(saes),
            "failed": {},
            "hook": hook,
            "d_model": manifest.d_model,
            "imported_from": "saelens",
            "store_fingerprint": manifest.fingerprint,
            "store_identity": manifest.identity,
        },
    )
    return read_run(out)


def find_saelens(folder: Path) -> tuple[Foreign, ...]:
    """The folder itself, or its subfolders that have a cfg.json; raises TrainError if none has."""
    folders = [folder] if (folder / CONFIG_NAME).is_file() else sorted(folder.glob("*/"))
    configs = [each / CONFIG_NAME for each in folders if (each / CONFIG_NAME).is_file()]
    if not configs:
        raise TrainError(
            f"SAELens folder at {folder}: expected {CONFIG_NAME} in it or in its subfolders, "
            "got none."
        )
    return tuple(
        Foreign(
            path.parent.resolve().name,
            path.parent,
            _read_metadata(path),
        )
        for path in configs
    )


def _read_metadata(path: Path) -> Mapping[str, Any]:
    metadata = read_json(path, "SAELens configuration").get("metadata") or {}
    if not isinstance(metadata, dict):
        raise TrainError(f"metadata at {path}: expected an object, got {metadata!r:.40}.")
    return metadata


def _read_excluded(foreign: Foreign) -> tuple[int, ...]:
    recorded = foreign.metadata.get("exclude_positions") or []
    if not isinstance(recorded, list) or any(type(p) is not int or p < 0 for p in recorded):
        raise TrainError(
            f"exclude_positions of {foreign.folder}: expected a list of positions, "
            f"got {recorded!r:.60}. Pass --exclude-position."
        )
    return tuple(recorded)


def _choose_hook(found: tuple[Foreign, ...], manifest: Manifest, hook: str | None) -> str:
    wanted = {hook} if hook else {str(each.metadata.get("hook_name")) for each in found}
    if len(wanted) != 1 or not wanted <= set(manifest.hooks):
        raise ConfigError(
            f"hook of {', '.join(each.name for each in found)}: expected one that the store has "
            f"({', '.join(manifest.hooks)}), got {', '.join(sorted(wanted))}. Pass --hook."
        )
    return wanted.pop()
