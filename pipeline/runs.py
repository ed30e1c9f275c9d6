"""A run: SAEs trained from one store, in one folder. Making it, and reading it back."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import TrainConfig
from pipeline.errors import TrainError
from pipeline.train import StepReport, plan_steps, train
from store import ActivationStore, Manifest, count_rows, open_store, stream_batches


class TrainPlan(NamedTuple):
    """What training will read, decided before anything runs."""

    store: ActivationStore
    hook: str
    n_steps: int


class Run(NamedTuple):
    """A finished run, as its config.json tells."""

    folder: Path
    members: tuple[str, ...]  # folders of the SAEs, such as k32-beta1e5
    hook: str
    exclude_positions: tuple[int, ...]
    fingerprint: str  # of the store
    config: dict[str, Any]  # all of it

    def check_store(self, manifest: Manifest) -> None:
        """Raise TrainError unless this is the store that the SAEs were trained from."""
        if manifest.fingerprint != self.fingerprint:
            raise TrainError(
                f"store for the SAEs at {self.folder}: expected fingerprint "
                f"{self.fingerprint[:16]}, got {manifest.fingerprint[:16]}. "
                "Name theirs with --store, or train again."
            )


def plan_training(config: TrainConfig, store_folder: Path) -> TrainPlan:
    """Open the store and count its batches; raises TrainError for a foreign hook or few rows."""
    store = open_store(store_folder)
    hooks = store.manifest.hooks
    wanted = hooks if config.hook is None else (config.hook,)
    if len(wanted) != 1 or wanted[0] not in hooks:
        raise TrainError(
            f"train.hook for {store_folder}: expected one of {', '.join(hooks)}, "
            f"got {config.hook or 'none'}. Pass --hook."
        )
    return TrainPlan(
        store, wanted[0], plan_steps(config, count_rows(store, config.exclude_positions))
    )


def run_training(
    plan: TrainPlan,
    config: TrainConfig,
    out: Path,
    *,
    device: str,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
    on_step: Callable[[StepReport], None] | None = None,
) -> Run:
    """Train all members from one pass over the store.

    Raises TrainError if `out` holds another run.
    """
    _refuse_other_run(out, config, plan.store.manifest.fingerprint, overwrite=overwrite)
    batches = stream_batches(
        plan.store,
        hook=plan.hook,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.shuffle_seed,
        window=config.window_shards,
        exclude_positions=config.exclude_positions,
        tokens=plan.n_steps * config.batch_size,
    )
    train(
        config,
        batches,
        d_model=plan.store.manifest.d_model,
        n_steps=plan.n_steps,
        out=out,
        device=device,
        provenance={
            "hook": plan.hook,
            "store_fingerprint": plan.store.manifest.fingerprint,
            "store_identity": plan.store.manifest.identity,
            **provenance,
        },
        on_step=on_step,
    )
    return read_run(out)


def read_run(folder: Path) -> Run:
    """Read a run's config.json; raises TrainError if there is no finished run."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return Run(
            folder=folder,
            members=tuple(config["members"]),
            hook=config["hook"],
            exclude_positions=tuple(config["train"]["exclude_positions"]),
            fingerprint=config["store_fingerprint"],
            config=config,
        )
    except FileNotFoundError:
        raise TrainError(
            f"run at {folder}: expected trained SAEs, got none. Run `pipeline train`."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(
            f"run at {folder}: expected config.json as `pipeline train` writes it, got {error!r}."
        ) from None


def _refuse_other_run(out: Path, config: TrainConfig, fingerprint: str, *, overwrite: bool) -> None:
    if overwrite or not (out / "config.json").exists():
        return
    former = read_run(out)
    if former.fingerprint != fingerprint or former.config["train"] != config.model_dump(
        mode="json"
    ):
        raise TrainError(
            f"run at {out}: expected none or one with the same store and settings, got another. "
            "Choose another --out, or pass --overwrite."
        )
