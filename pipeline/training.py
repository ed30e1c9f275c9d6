"""Train from a store: plan what to read, refuse to replace another run, and hand the stream on."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import TrainConfig
from pipeline.errors import TrainError
from pipeline.runs import Run, read_run
from pipeline.train import StepReport, plan_steps, train
from store.files import StoreFiles
from store.reader import ActivationStore, open_files, open_store, read_manifest
from store.stream import stream_batches
from store.stream_plan import StreamPlan, count_rows, plan_stream


class TrainPlan(NamedTuple):
    """What training will read, decided before anything runs."""

    store: ActivationStore
    stream: StreamPlan

    @property
    def n_steps(self) -> int:
        return self.stream.n_batches


def plan_training(
    config: TrainConfig, source: str | Path | StoreFiles, layers: Sequence[int] = ()
) -> TrainPlan:
    """Open the store and count its batches; raises TrainError for a foreign hook or few rows.

    One layer stands for the store's only hook of it where the store has several hooks and
    `config.hook` names none.
    """
    files = open_files(source) if isinstance(source, str | Path) else source
    hooks = read_manifest(files).hooks
    names = {config.hook, f"hook_{config.hook}"}
    wanted = [hook for hook in hooks if config.hook is None or names & {hook, hook.split(".")[-1]}]
    if config.hook is None and len(hooks) > 1 and len(layers) == 1:
        wanted = [hook for hook in hooks if hook.startswith(f"blocks.{layers[0]}.")]
    if len(wanted) != 1:
        raise TrainError(
            f"train.hook for {files.where}: expected one of {', '.join(hooks)}, "
            f"got {config.hook or 'none'}. Pass --hook, or --layer for its only hook."
        )
    store = open_store(files, hook=wanted[0], allow_partial=config.allow_partial)
    n_steps = plan_steps(config, count_rows(store, config.exclude_positions))
    stream = plan_stream(
        store,
        hook=wanted[0],
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.shuffle_seed,
        window=config.window_shards,
        exclude_positions=config.exclude_positions,
        tokens=n_steps * config.batch_size,
    )
    return TrainPlan(store, stream)


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
    train(
        config,
        stream_batches(plan.store, plan.stream),
        d_model=plan.store.manifest.d_model,
        n_steps=plan.n_steps,
        out=out,
        device=device,
        provenance={
            "hook": plan.stream.hook,
            "store": plan.store.where,
            "store_fingerprint": plan.store.manifest.fingerprint,
            "store_identity": plan.store.manifest.identity,
            **provenance,
        },
        on_step=on_step,
    )
    return read_run(out)


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
