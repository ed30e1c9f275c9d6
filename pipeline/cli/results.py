"""Evaluation and report as commands: what trained SAEs are worth, measured and shown."""

from pathlib import Path
from typing import Any

import click

from pipeline.cli.options import Invocation, takes
from pipeline.cli.progress import token_progress
from pipeline.cli.stages import FOLDER, find_store, store_url_option


class LocalStore(click.Path):
    """A store's folder; a URL, which may hold a secret, is not repeated."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        from store.errors import is_url

        if is_url(str(value)):
            self.fail(
                "expected a folder, got a URL. Copy the store with `pipeline store pull` and name "
                "the copy, or leave this out.",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


# Of evaluate and report: the flags by which they find what `train` with the same flags wrote.
SAME_RUN = {
    "beta": "beta",
    "k": "k",
    "d_sae": "d-sae",
    "layer": "store-layer",
    "hook": "store-hook",
    "model": "model",
    "tokens": "evaluate-tokens",
}
runs_option = click.option(
    "--run",
    "run_paths",
    type=FOLDER,
    multiple=True,
    help="Folder of the SAEs; repeat for several runs together.  [default: runs/<profile>]",
)
corpus_option = click.option(
    "--corpus", "corpus_path", type=FOLDER, help="Token blocks.  [default: data/<profile>]"
)
store_option = click.option(
    "--store",
    "store_path",
    type=LocalStore(path_type=Path),
    help="The store they were trained from.  [default: stores/<profile>]",
)


@click.command()
@takes(**SAME_RUN, device="device")
@runs_option
@corpus_option
@store_url_option
@click.option(
    "--out", type=FOLDER, help="Folder of the measurements.  [default: results/<profile>]"
)
def evaluate(
    run: Invocation,
    run_paths: tuple[Path, ...],
    corpus_path: Path | None,
    store: str | None,
    out: Path | None,
) -> None:
    """Repeat the paper's experiments on trained SAEs, with intervals and controls.

    Measured on held-out text. Whatever selects with the gradient sees the label; every such figure
    is also given without it. A run given after the first may be of another store if only its
    gradient differs (cache --loss).
    """
    from pipeline.evaluate import evaluate_runs

    out = out or _name_results(run, run_paths)
    with token_progress("evaluate", run.config.evaluate.tokens) as advance:
        evaluate_runs(
            run.config,
            run_folders=run_paths or (run.paths.run,),
            corpus_folder=corpus_path or run.paths.corpus,
            store=find_store(run, store),
            out=out,
            on_progress=advance,
            tell=lambda name: click.echo(f"evaluate: {name}", err=True),
        )
    click.echo(f"measurements in {out}")


@click.command()
@takes(**SAME_RUN)
@runs_option
@click.option(
    "--results",
    "results_path",
    type=FOLDER,
    help="Folder of the measurements.  [default: results/<profile>]",
)
@click.option(
    "--beside",
    "beside",
    type=FOLDER,
    multiple=True,
    help="Measurements of another model, for the figure that compares models; repeat for several.",
)
@corpus_option
@store_option
@click.option("--out", type=FOLDER, help="The page.  [default: results/<profile>.html]")
def report(
    run: Invocation,
    run_paths: tuple[Path, ...],
    results_path: Path | None,
    beside: tuple[Path, ...],
    corpus_path: Path | None,
    store_path: Path | None,
    out: Path | None,
) -> None:
    """Write one HTML page: which of the paper's claims hold here, and every figure."""
    from pipeline.report import write_report

    results_path = results_path or _name_results(run, run_paths)
    first, *more = run_paths or (run.paths.run,)
    out = out or results_path.with_name(results_path.name + ".html")
    write_report(
        profile=run.profile,
        run_folder=first,
        more_runs=more,
        results_folder=results_path,
        beside=beside,
        corpus_folder=corpus_path or run.paths.corpus,
        store_folder=store_path or run.paths.store,
        out=out,
    )
    click.echo(f"report in {out}")


def _name_results(run: Invocation, run_paths: tuple[Path, ...]) -> Path:
    """Results are called what the first run is called, where that is named."""
    return run.paths.results.with_name(run_paths[0].name) if run_paths else run.paths.results
