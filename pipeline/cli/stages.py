"""The stages up to trained SAEs as commands. Heavy libraries are imported by the command that needs
them, so that help is quick.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.options import Invocation, takes
from pipeline.cli.progress import token_progress
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.cache_plan import CachePlan
    from pipeline.corpus import Corpus
    from pipeline.runs import Run
    from store.files import StoreFiles

FOLDER = click.Path(path_type=Path)


store_url_option = click.option(
    "--store", metavar="PATH|URL", help="Store of activations.  [default: stores/<profile>]"
)


@click.command()
@takes(model="model", source="source", tokens="corpus-tokens")
@click.option("--out", type=FOLDER, help="Folder of the corpus.  [default: data/<profile>]")
@click.option("--overwrite", is_flag=True, help="Replace a corpus made with other settings.")
def corpus(run: Invocation, out: Path | None, overwrite: bool) -> None:
    """Turn text into packed token blocks, split into train and held-out."""
    made = _make_corpus(run, out or run.paths.corpus, overwrite=overwrite)
    for split in ("train", "held_out"):
        counts = made.manifest.splits[split]
        click.echo(
            f"{split}: {counts.documents:,} documents, {counts.tokens:,} tokens, "
            f"{counts.blocks:,} blocks"
        )
    click.echo(f"corpus in {made.folder}")


@click.command()
@takes(
    layer="layer",
    hook="hook",
    loss="loss",
    model="model",
    tokens="corpus-tokens",
    dtype="dtype",
    seed="cache-seed",
    workers="workers",
    scheduler="scheduler",
    device="device",
)
@click.option(
    "--corpus",
    "corpus_path",
    type=FOLDER,
    help="Token blocks; made first where missing.  [default: data/<profile>]",
)
@click.option("--out", type=FOLDER, help="Folder of the store.  [default: stores/<profile>]")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--overwrite", is_flag=True, help="Replace a store of another fingerprint.")
def cache(
    run: Invocation, corpus_path: Path | None, out: Path | None, dry_run: bool, overwrite: bool
) -> None:
    """Run the model once over the corpus; write activations and gradients as a Zarr store."""
    from pipeline.cache import run_cache
    from pipeline.cache_plan import plan_cache
    from pipeline.provenance import describe_run

    corpus_path, out = corpus_path or run.paths.corpus, out or run.paths.store
    if not corpus_path.exists() and not dry_run:
        _make_corpus(run, corpus_path, overwrite=False)
    plan = plan_cache(run.config, corpus_path, out, overwrite=overwrite)
    _print_plan(plan, run.config.run.scheduler)
    if dry_run:
        return
    settings, provenance = run.config.run, describe_run(run.profile, run.config)
    missing_rows = sum(shard.n_rows for shard in plan.missing)
    workers = None
    if settings.workers or settings.scheduler:
        from pipeline.cluster import open_workers

        workers = open_workers(settings, plan.settings, debug=bool(click.get_current_context().obj))
    computed: list[int] = []  # tokens of each shard: more than planned where files turn out bad
    with token_progress("cache", missing_rows) as advance:

        def count(n_tokens: int) -> None:
            computed.append(n_tokens)
            advance(n_tokens)

        manifest = run_cache(
            plan, workers, provenance=provenance, overwrite=overwrite, on_progress=count
        )
    click.echo(f"computed {len(computed)} of {len(manifest.shards)} shards; store in {out}")


@click.command()
@takes(
    architecture="architecture",
    beta="beta",
    k="k",
    d_sae="d-sae",
    seed="train-seed",
    layer="store-layer",
    hook="train-hook",
    allow_partial="allow-partial",
    tokens="train-tokens",
    steps="steps",
    epochs="epochs",
    batch_size="batch-size",
    lr="lr",
    precision="precision",
    device="device",
    logger="logger",
    workers="train-workers",
    scheduler="scheduler",
)
@store_url_option
@click.option("--out", type=FOLDER, help="Folder of the SAEs.  [default: runs/<profile>]")
@click.option("--overwrite", is_flag=True, help="Replace SAEs that are there.")
def train(run: Invocation, store: str | None, out: Path | None, overwrite: bool) -> None:
    """Train an SAE for every architecture, beta, gradient, k, d_sae and seed from one pass.

    Members that the run has already, of the same store and settings, are kept. Ctrl-C or SIGTERM
    saves a checkpoint; the same command goes on from the last one. A remote store (s3://, https://,
    ssh://, dvc+<git>@<rev>:<folder>) is read through a cache, from the first shards that arrive.

    With workers, each trains a share of the grid. With `torchrun --nproc-per-node N -m pipeline
    train`, N processes train each SAE together.
    """
    from pipeline.cli.training import ask_to_stop, step_progress, tell_stopped, train_on_workers
    from pipeline.device import pick_device
    from pipeline.distributed import open_group
    from pipeline.memory import keep_freed_memory
    from pipeline.provenance import describe_run
    from pipeline.training import plan_training, run_training

    config, out = run.config.train, out or run.paths.run
    if run.config.run.workers or run.config.run.scheduler:
        where = store or run.paths.store
        with tell_stopped():
            trained = train_on_workers(run, where, out, overwrite=overwrite)
        _tell_trained(trained, out)
        return
    plan = plan_training(config, find_store(run, store), run.config.cache.layers)
    keep_freed_memory()
    with (
        tell_stopped(),
        open_group(pick_device(run.config.run.device)) as (group, device),
        ask_to_stop() as asked,
        step_progress(shown=group.rank == 0) as show,
    ):
        trained = run_training(
            plan,
            config,
            out,
            device=device,
            model=run.config.model,
            provenance=describe_run(run.profile, run.config),
            group=group,
            overwrite=overwrite,
            on_step=show,
            tell=lambda text: click.echo(text, err=True),
            should_stop=asked,
        )
    if group.rank == 0:
        _tell_trained(trained, out)


def _tell_trained(trained: "Run", out: Path) -> None:
    click.echo(f"trained {', '.join(trained.members)}; SAEs in {out}")
    if trained.failed:
        raise PipelineError(
            f"{'; '.join(trained.failed.values())}. The other members are finished; for these, "
            "lower --lr or set train.max_grad_norm."
        )
    click.echo(f"next: pipeline evaluate --run {out}, then pipeline report --run {out}")


def find_store(run: Invocation, store: str | None) -> "StoreFiles":
    from store.reader import open_files

    return open_files(
        store or run.paths.store,
        cache_root=run.config.run.shard_cache,
        cache_bytes=int(run.config.run.shard_cache_gb * 1e9),
    )


def _make_corpus(run: Invocation, out: Path, *, overwrite: bool) -> "Corpus":
    from pipeline.corpus import write_corpus
    from pipeline.model import load_tokenizer, locate_checkpoint

    tokenizer = load_tokenizer(locate_checkpoint(run.config.model.name, run.config.model.revision))
    wanted = (run.config.corpus.train_tokens, run.config.corpus.held_out_tokens)
    total = sum(count for count in wanted if count) if all(wanted) else None
    with token_progress("corpus", total) as advance:
        return write_corpus(
            run.config.corpus, tokenizer, out, overwrite=overwrite, on_progress=advance
        )


def _print_plan(plan: "CachePlan", scheduler: str | None) -> None:
    from pipeline.cache import estimate_seconds

    if scheduler is None:
        duration = f"about {estimate_seconds(plan) / 60:.1f} min on {plan.settings.device}"
    else:
        duration = f"as long as the workers at {scheduler} take"
    layout, missing = plan.spec.layout, len(plan.missing)
    rows = sum(shard.n_rows for shard in plan.missing)
    for name, value in (
        ("model", plan.settings.checkpoint.name),
        ("hooks", ", ".join(plan.spec.hooks)),
        ("loss", plan.settings.loss),
        (
            "tokens",
            f"{layout.n_rows:,} in blocks of {plan.spec.context_length}",
        ),
        ("shards", f"{len(layout.shards)}, of which {missing} to compute ({rows:,} tokens)"),
        (
            "disk",
            f"{plan.store_bytes / 1e6:,.0f} MB, twice that where DVC cannot link; "
            f"{plan.free_bytes / 1e6:,.0f} MB free",
        ),
        ("time", duration),
        ("store", str(plan.out)),
    ):
        click.echo(f"{name:>8}  {value}")
    if plan.needed_bytes > plan.free_bytes:
        raise PipelineError(
            f"disk at {plan.out.parent}: expected {plan.needed_bytes:,} bytes free, "
            f"got {plan.free_bytes:,}. "
            "Make room, lower corpus.train_tokens, or choose another --out."
        )
