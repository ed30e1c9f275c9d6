"""`pipeline steer`: one concept's latent, what steering with it does, and text before and after."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.cli.options import Invocation, takes
from pipeline.cli.results import SAME_RUN
from pipeline.cli.stages import FOLDER
from pipeline.errors import ConfigError, PipelineError

if TYPE_CHECKING:
    from pipeline.steer import Steering


@click.command()
@takes(**{name: key for name, key in SAME_RUN.items() if name != "tokens"}, device="device")
@click.option("--token", help="The latent that raises this token most, as ' self'.")
@click.option("--latent", type=int, help="The latent with this number.")
@click.option("--text", help="The latent that fires on this text more than elsewhere.")
@click.option("--run", "run_path", type=FOLDER, help="The SAEs.  [default: runs/<profile>]")
@click.option(
    "--corpus",
    "corpus_path",
    type=FOLDER,
    help="Text to steer.  [default: data/<profile>; built-in text if that is not there]",
)
@click.option(
    "--sae", "sae_name", metavar="NAME", help="Which SAE.  [default: that of the highest beta]"
)
@click.option(
    "--alpha",
    "alphas",
    type=float,
    multiple=True,
    help="Length of the push, in mean norms of the activations; repeat for several.  "
    "[default: evidence.steering_alphas]",
)
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Text to continue; repeat for several.  [default: beginnings of held-out text]",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(min=0, max=4096),
    default=40,
    show_default=True,
    help="Tokens to generate.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, max=100),
    default=0.7,
    show_default=True,
    help="Of the sampling; 0 takes the likeliest token.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0, max=2**32),
    default=0,
    show_default=True,
    help="Of the sampling.",
)
@click.option(
    "--out", type=FOLDER, help="The plot, .svg or .html.  [default: results/<run>-<latent>.svg]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def steer(
    run: Invocation,
    token: str | None,
    latent: int | None,
    text: str | None,
    run_path: Path | None,
    corpus_path: Path | None,
    sae_name: str | None,
    alphas: tuple[float, ...],
    prompts: tuple[str, ...],
    new_tokens: int,
    temperature: float,
    seed: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Find one concept's latent, steer with it, and show text before and after."""
    if sum(wish is not None for wish in (token, latent, text)) != 1:
        raise ConfigError("pipeline steer: expected one of --token, --latent and --text.")
    if math.isnan(temperature):  # which no range of click's keeps out
        raise ConfigError("--temperature: expected a number from 0 to 100, got nan.")
    if out is not None and out.suffix not in (".svg", ".html"):
        raise ConfigError(f"--out {out}: expected a name that ends in .svg or .html.")
    from pipeline.generate import Generation
    from pipeline.steer import Wish, steer_run

    folder = run_path or run.paths.run
    corpus = corpus_path or (run.paths.corpus if run.paths.corpus.exists() else None)
    found = steer_run(
        run.config,
        Wish(token, latent, text),
        Generation(prompts, new_tokens, temperature, seed),
        run_folder=folder,
        corpus_folder=corpus,
        sae_name=sae_name,
        alphas=alphas,
    )
    name = f"{folder.resolve().name}-{found.sae}-{found.latent}"
    out = out or run.paths.results.with_name(f"{name}.svg")
    write_plot(found, out, title=name)
    if as_json:
        click.echo(json.dumps(describe(found) | {"plot": str(out)}, ensure_ascii=False))
        return
    print_steering(found)
    click.echo(f"plot in {out}")


def write_plot(found: "Steering", out: Path, *, title: str) -> None:
    """The picture alone, or a page around it where `out` ends in .html."""
    from pipeline.files import write_text
    from pipeline.report.steered import draw_steering, wrap_page

    picture = draw_steering(found)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, wrap_page(picture, title) if out.suffix == ".html" else picture)
    except OSError as error:
        raise PipelineError(
            f"plot at {out}: expected a place that can be written, got {error.strerror}. Choose "
            "another --out."
        ) from None


def describe(found: "Steering") -> dict:
    """All of it, as JSON holds it."""
    lists = {
        name: [item._asdict() for item in getattr(found, name)]
        for name in ("tokens", "effects", "texts")
    }
    return found._asdict() | lists


def print_steering(found: "Steering") -> None:
    """Tables of tokens and effects, and the texts."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pipeline.report.steered import show_text

    console = Console(highlight=False)

    def show_table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)

    click.echo(f"latent {found.latent} of {found.sae} at {found.hook}: it {found.why}")
    click.echo(
        f"it fires on {100 * found.fires:.2g}% of tokens; effects are means over {found.reference},"
        f" alpha in units of the activations' mean norm, {found.norm:.4g}"
    )
    show_table(
        "tokens that it raises",
        ("token", "direct", f"change at alpha {found.alpha:g}"),
        [(repr(t.token), f"{t.direct:.3f}", f"{t.change:+.4f}") for t in found.tokens],
    )
    show_table(
        "change of probability",
        ("alpha", "these tokens", "all others", "all others, absolute"),
        [
            (f"{e.alpha:g}", f"{e.associated:+.4f}", f"{e.others:+.4f}", f"{e.others_absolute:.4f}")
            for e in found.effects
        ],
    )
    for text in found.texts:
        when = f"alpha {text.alpha:g}" if text.alpha else "before"
        console.print(Text(f"\n[{when}] {show_text(text.prompt)}", style="bold"))
        console.print(Text(text.text))
