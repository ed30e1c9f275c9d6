"""A run: SAEs trained from one store, in one folder, as its config.json tells."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import TrainError
from store.manifest import Manifest


class Run(NamedTuple):
    """A finished run, as its config.json tells."""

    folder: Path
    members: tuple[str, ...]  # folders of the SAEs, such as k32-beta1e5
    failed: dict[str, str]  # why members of the grid have none, by name
    hook: str
    exclude_positions: tuple[int, ...]
    fingerprint: str  # of the store
    config: dict[str, Any]  # all of it
    fingerprint_of_config: str  # sha256 of config.json: measurements say which run they are of

    def check_store(self, manifest: Manifest) -> None:
        """Raise TrainError unless this is the store that the SAEs were trained from."""
        if manifest.fingerprint != self.fingerprint:
            raise TrainError(
                f"store for the SAEs at {self.folder}: expected fingerprint "
                f"{self.fingerprint[:16]}, got {manifest.fingerprint[:16]}. "
                "Name theirs with --store, or train again."
            )


def read_run(folder: Path) -> Run:
    """Read a run's config.json; raises TrainError if there is no finished run."""
    try:
        content = (folder / "config.json").read_bytes()
        config = json.loads(content)
        return Run(
            folder=folder,
            members=tuple(config["members"]),
            failed=dict(config["failed"]),
            hook=config["hook"],
            exclude_positions=tuple(config["train"]["exclude_positions"]),
            fingerprint=config["store_fingerprint"],
            config=config,
            fingerprint_of_config=hashlib.sha256(content).hexdigest(),
        )
    except FileNotFoundError:
        others = ", ".join(sorted(str(path) for path in folder.parent.glob("[!.]*"))) or "none"
        raise TrainError(
            f"run at {folder}: expected trained SAEs, got none. Run `pipeline train`, or name "
            f"another (here: {others})."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(
            f"run at {folder}: expected config.json as `pipeline train` writes it, got {error!r}."
        ) from None
