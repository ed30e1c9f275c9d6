"""Stage five: one self-contained HTML page that compares the SAEs of a run.

`build_report` is a pure function of what the other stages wrote; `write_report` reads that and
writes the page. The page holds no date and no path: the same results give the same bytes.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args
from urllib.parse import quote

import jinja2

from pipeline.config import Architecture
from pipeline.errors import PipelineError
from pipeline.files import write_text
from pipeline.report import facts, tables
from pipeline.report.charts import (
    History,
    block_charts,
    chart_betas,
    chart_modes,
    chart_training,
)
from pipeline.report.exhibits import read_tables, refuse_damage, show_exhibits
from pipeline.report.exhibits.claims import show_claims
from pipeline.report.exhibits.columns import check_tables
from pipeline.report.exhibits.exhibit import Rows, Tables
from pipeline.report.exhibits.scaling import format_models, relate_models
from pipeline.report.figures import draw_key
from pipeline.report.groups import group_saes, plan_styles
from pipeline.report.inputs import (
    check_fingerprint,
    check_models,
    check_runs,
    is_placed,
    link_tables,
    locate_members,
    read_history,
    read_json,
    read_manifest,
    read_metrics,
)


class _File(NamedTuple):
    """A file to write."""

    what: str  # as an error calls it
    path: Path
    text: str


class Summary(NamedTuple):
    """The page's first sentence."""

    n_saes: int
    hook: str | None
    model: str | None
    trained_tokens: str | None
    held_out_tokens: str | None


def build_report(
    *,
    profile: str,
    metrics: Mapping[str, Any],
    config: Mapping[str, Any],
    histories: Mapping[str, History],
    store: Mapping[str, Any] | None = None,
    corpus: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    evidence: Tables | None = None,
    links: Mapping[str, str] | None = None,
    results_folder: Path | None = None,
) -> str:
    """The page as HTML.

    `metrics` is what evaluation wrote, `config` the run's config.json, `histories` the columns of
    each SAE's history.parquet, `store` and `corpus` their manifests, or None where they are no
    longer there. `evidence` are evaluation's tables by name, and `links` where the page finds the
    files of some of them. All text is escaped; numbers that a table may lack are shown as a dash.

    Raises PipelineError, naming the table in `results_folder`, where its columns or values are not
    those that evaluation writes.
    """
    saes = _order(metrics["saes"])
    controls = _list_controls(metrics)
    check_tables(evidence or {}, results_folder)
    styles = plan_styles(saes, controls)
    with refuse_damage("claims", results_folder):
        claims = show_claims(evidence or {})
    return _load_template().render(
        title=f"gsae-pipeline report: {profile}",
        summary=_summarise(metrics, config, histories),
        headline=tables.build_table(saes, tables.HEADLINE, styles),
        more=tables.build_table(saes, tables.MORE, styles),
        scales=tables.build_table(saes, tables.scale_columns(list(saes.values())), styles),
        controls=tables.build_table(controls, tables.CONTROLS, styles),
        claims=claims,
        exhibits=show_exhibits(evidence or {}, styles, results_folder),
        links=dict(links or {}),
        training=[
            (words, chart_training({name: saes[name] for name in names}, histories, styles))
            for words, names in group_saes(saes)
        ],
        modes=chart_modes(saes, styles),
        betas=chart_betas(saes),
        model=tables.describe_model(metrics["model"]),
        corpus=corpus,
        corpus_facts=facts.describe_corpus(corpus or {}),
        splits=facts.describe_splits(corpus or {}),
        store=store,
        store_facts=facts.describe_store(store or {}),
        identity=facts.describe_settings((store or {}).get("identity") or {}),
        statistics=facts.describe_statistics(store or {}),
        sections=facts.describe_sections(config),
        config_text=json.dumps(config, indent=2, ensure_ascii=False),
        versions=dict(versions or {}),
    )


def write_report(
    *,
    profile: str,
    run_folder: Path,
    results_folder: Path,
    corpus_folder: Path,
    store_folder: Path,
    out: Path,
    more_runs: Sequence[Path] = (),
    beside: Sequence[Path] = (),
) -> None:
    """Read what the stages wrote and write the page to `out`, whole or not at all.

    `more_runs` are the runs that were measured together with the first one, in their order, and
    `beside` the results of other models, for the figure that compares them: its data are written
    beside the page, to <the page's name>-scaling.csv.

    Raises PipelineError, naming the file and the command that makes it, if measurements, the run's
    settings or a history are missing, unreadable or damaged, if they belong to different runs, if
    `beside` repeats a model's results, or if a file cannot be written. A store or corpus that is no
    longer there is left out of the page.
    """
    runs = [run_folder, *more_runs]
    configs = [read_json(folder / "config.json", "run", "pipeline train") for folder in runs]
    results = [read_metrics(folder) for folder in (results_folder, *beside)]
    metrics = results[0]
    check_models([results_folder, *beside], results)
    config = configs[0]
    store = read_manifest(store_folder, "store", "pipeline cache")
    corpus = read_manifest(corpus_folder, "corpus", "pipeline corpus")
    check_fingerprint(store, store_folder, "store", config.get("store_fingerprint"))
    identity = config.get("store_identity") or {}
    check_fingerprint(corpus, corpus_folder, "corpus", identity.get("corpus"))
    check_runs(metrics, runs, results_folder)
    folders = locate_members(metrics, configs, runs, results_folder)
    evidence = read_tables(results_folder)
    links = link_tables(evidence, results_folder, out)
    related = _relate(results, [results_folder, *beside])
    if related:
        evidence = {**evidence, "scaling": related}
    files: list[_File] = []
    if related and beside:  # the figures of one model are in its own tables
        data = out.parent / f"{out.stem}-scaling.csv"
        files.append(_File("table", data, format_models(related)))
        links["scaling"] = quote(data.name)
    page = build_report(
        profile=profile,
        metrics=metrics,
        config=config,
        histories={name: read_history(folders[name] / name) for name in metrics["saes"]},
        store=store,
        corpus=corpus,
        versions=config.get("versions"),
        evidence=evidence,
        links=links,
        results_folder=results_folder,
    )
    _write_files([*files, _File("page", out, page)])


def _relate(results: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> Rows:
    """For the figure over models; nothing where there is one alone that is not named."""
    if len(results) == 1 and not is_placed(results[0]["model"]):
        return []
    with refuse_damage("scaling", ", ".join(map(str, folders))):
        return relate_models(results)


def _write_files(files: Sequence[_File]) -> None:
    """In their order, or none of them where a folder is in the way of one."""
    for file in files:
        if file.path.is_dir():
            raise _blocked(file, "a folder")
    for file in files:
        try:
            file.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(file.path, file.text)
        except OSError as error:
            raise _blocked(file, error.strerror) from None


def _blocked(file: _File, problem: str | None) -> PipelineError:
    return PipelineError(
        f"{file.what} at {file.path}: expected a place where a file can be written, got {problem}. "
        "Choose another with `pipeline report --out`."
    )


def _order(saes: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """SAEs by k and d_sae, then architecture, beta, gradient and seed."""
    architectures = get_args(Architecture)

    def rank(item: tuple[str, Mapping[str, Any]]) -> tuple[Any, ...]:
        k, d_sae, beta, seed = (item[1].get(key) or 0 for key in ("k", "d_sae", "beta", "seed"))
        name = item[1].get("architecture", "topk")
        place = architectures.index(name) if name in architectures else len(architectures)
        return k, d_sae, place, beta, item[1].get("gradient") or "full", seed

    return dict(sorted(saes.items(), key=rank))


def _load_template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__name__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"draw_key": draw_key, "block_charts": block_charts}
    return environment.get_template("page.html")


def _summarise(
    metrics: Mapping[str, Any], config: Mapping[str, Any], histories: Mapping[str, History]
) -> Summary:
    profile = config.get("config")
    model = profile.get("model") if isinstance(profile, Mapping) else config.get("model")
    trained = max((max(h.get("tokens") or [0]) for h in histories.values()), default=0)
    held_out = metrics["model"].get("tokens")
    return Summary(
        n_saes=len(metrics["saes"]),
        hook=metrics.get("hook"),
        model=model.get("name") if isinstance(model, Mapping) else model,
        trained_tokens=tables.format_count(trained) if trained else None,
        held_out_tokens=tables.format_count(held_out) if held_out else None,
    )


def _list_controls(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the SAEs are compared with; a baseline has one set of figures, without a gradient."""
    baselines = metrics.get("baselines") or {}
    return {
        **{name: {**facts, "without_gradient": facts} for name, facts in baselines.items()},
        **(metrics.get("controls") or {}),
    }
