"""SAEs to and from other libraries: `pipeline export` and `pipeline import`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.options import Invocation, takes

if TYPE_CHECKING:
    from pipeline.runs import Run

FOLDER = click.Path(path_type=Path)
FORMATS = ("saelens", "dictionary-learning", "sparsify", "safetensors")


@click.command()
@click.argument("run_path", metavar="RUN", type=FOLDER)
@click.option(
    "--sae", "names", multiple=True, help="An SAE of the run; repeat for several.  [default: all]"
)
@click.option("--to", type=click.Choice(FORMATS), required=True, help="Whose format.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the SAEs and their card.")
@click.option(
    "--results",
    "results_path",
    type=FOLDER,
    help="Measurements for the card.  [default: results/<run's name>, if they are of this run]",
)
@click.option(
    "--push",
    "repo",
    metavar="OWNER/NAME",
    help="Upload to this repository on the Hugging Face hub; made private if it is not there.",
)
def export(
    run_path: Path,
    names: tuple[str, ...],
    to: str,
    out: Path,
    results_path: Path | None,
    repo: str | None,
) -> None:
    """Write trained SAEs as other libraries read them, with a model card."""
    from pipeline.export import check_repo, plan_export, push_export, run_export
    from pipeline.runs import read_run

    if repo is not None:
        check_repo(repo)
    metrics = _find_metrics(read_run(run_path), results_path)
    plan = plan_export(run_path, names, to=to, metrics=metrics)
    run_export(plan, out, repo=repo)
    click.echo(f"exported {', '.join(facts.name for facts in plan.facts)} in {out}")
    if repo is not None:
        click.echo(f"pushed: {push_export(out, repo)}")


@click.command("import")
@takes()
@click.argument("folder", type=FOLDER)
@click.option(
    "--from", "source", type=click.Choice(["saelens"]), required=True, help="Whose format."
)
@click.option(
    "--store",
    metavar="PATH|URL",
    help="Store of the activations to measure them on.  [default: stores/<profile>]",
)
@click.option("--out", type=FOLDER, required=True, help="Folder of the run to write.")
@click.option("--hook", help="Which of the store's hooks.  [default: what the SAE says]")
@click.option(
    "--exclude-position",
    "exclude_positions",
    type=click.IntRange(min=0),
    multiple=True,
    help="Position that evaluation leaves alone; repeat for several.  [default: what the SAE says]",
)
def import_(
    run: Invocation,
    folder: Path,
    source: str,
    store: str | None,
    out: Path,
    hook: str | None,
    exclude_positions: tuple[int, ...],
) -> None:
    """Make a run of an SAELens folder, or of a folder of them, for `pipeline evaluate`."""
    from pipeline.export import import_saelens
    from store.reader import open_files, read_manifest

    del source  # there is one
    files = open_files(
        store or run.paths.store,
        cache_root=run.config.run.shard_cache,
        cache_bytes=int(run.config.run.shard_cache_gb * 1e9),
    )
    made = import_saelens(
        folder, read_manifest(files), out, hook=hook, exclude_positions=exclude_positions or None
    )
    click.echo(f"imported {', '.join(made.members)}; run in {out}")
    click.echo(f"next: pipeline evaluate --run {out}")


def _find_metrics(run: "Run", results_path: Path | None) -> dict | None:
    """The measurements that were named, or those at the usual place if they are of this run."""
    from pipeline.errors import TrainError
    from pipeline.export import read_metrics

    folder = results_path or Path("results") / run.folder.resolve().name
    try:
        return read_metrics(folder, run)
    except TrainError:
        if results_path is not None:
            raise
        click.echo(
            f"no measurements of this run in {folder}: the card has none "
            f"(pipeline evaluate --run {run.folder} makes them)",
            err=True,
        )
        return None
