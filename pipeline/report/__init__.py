"""Stage five: one self-contained HTML page that compares the SAEs of a run.

`build_report` is a pure function of what the other stages wrote; `write_report` reads that and
writes the page. The page holds no date and no path: the same results give the same bytes.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import Architecture
from pipeline.errors import PipelineError
from pipeline.files import write_text
from pipeline.report import facts, tables
from pipeline.report.charts import History, chart_betas, chart_modes, chart_training
from pipeline.report.figures import series_style


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
) -> str:
    """The page as HTML.

    `metrics` is what evaluation wrote, `config` the run's config.json, `histories` the columns of
    each SAE's history.parquet, `store` and `corpus` their manifests, or None where they are no
    longer there. All text in them is escaped; missing and non-finite numbers are shown as a dash.
    """
    saes = _order(metrics["saes"])
    baselines = metrics.get("baselines") or {}
    styles = {name: series_style(i) for i, name in enumerate([*saes, *baselines])}
    return _load_template().render(
        title=f"gsae-pipeline report: {profile}",
        summary=_summarise(metrics, config, histories),
        headline=tables.build_table(saes, tables.HEADLINE, styles),
        more=tables.build_table(saes, tables.MORE, styles),
        scales=tables.build_table(saes, tables.scale_columns(list(saes.values())), styles),
        baselines=tables.build_table(baselines, tables.BASELINES, styles),
        styles={name: styles[name] for name in saes},
        training=chart_training(saes, histories, styles),
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
) -> None:
    """Read what the stages wrote and write the page to `out`, whole or not at all.

    Raises PipelineError, naming the file and the command that makes it, if measurements, the run's
    settings or a history are missing or unreadable, or if they belong to different runs. A store
    or corpus that is no longer there is left out of the page.
    """
    metrics = _read_json(results_folder / "metrics.json", "measurements", "pipeline evaluate")
    config = _read_json(run_folder / "config.json", "run", "pipeline train")
    store = _read_manifest(store_folder, "store", "pipeline cache")
    corpus = _read_manifest(corpus_folder, "corpus", "pipeline corpus")
    _check_fingerprint(store, store_folder, "store", config.get("store_fingerprint"))
    identity = config.get("store_identity") or {}
    _check_fingerprint(corpus, corpus_folder, "corpus", identity.get("corpus"))
    _check_run(metrics, run_folder, results_folder)
    _check_members(metrics, config, results_folder)
    page = build_report(
        profile=profile,
        metrics=metrics,
        config=config,
        histories={name: read_history(run_folder / name) for name in metrics["saes"]},
        store=store,
        corpus=corpus,
        versions=config.get("versions"),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, page)


def read_history(folder: Path) -> History:
    """The columns of an SAE's history.parquet; raises PipelineError if it cannot be read."""
    path = folder / "history.parquet"
    try:
        return pq.read_table(path).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise _unreadable("training history", path, "pipeline train", error) from None


def _order(saes: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """SAEs by k, then architecture, beta and seed."""
    architectures = get_args(Architecture)

    def rank(item: tuple[str, Mapping[str, Any]]) -> tuple[Any, ...]:
        k, beta, seed = (item[1].get(key) or 0 for key in ("k", "beta", "seed"))
        name = item[1].get("architecture", "topk")
        place = architectures.index(name) if name in architectures else len(architectures)
        return k, place, beta, seed

    return dict(sorted(saes.items(), key=rank))


def _load_template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__name__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
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


def _read_json(path: Path, what: str, command: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(what, path, command, error) from None
    if not isinstance(content, dict):
        raise _unreadable(what, path, command, f"a {type(content).__name__}")
    return content


def _read_manifest(folder: Path, what: str, command: str) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    return _read_json(path, f"{what} manifest", command) if path.exists() else None


def _unreadable(what: str, path: Path, command: str, found: object) -> PipelineError:
    got = "no such file" if isinstance(found, FileNotFoundError) else str(found)
    return PipelineError(
        f"{what} at {path}: expected the file that `{command}` writes, got {got}. Run `{command}`."
    )


def _check_run(metrics: Mapping[str, Any], run_folder: Path, results_folder: Path) -> None:
    measured = metrics.get("run")
    found = hashlib.sha256((run_folder / "config.json").read_bytes()).hexdigest()
    if measured != found:
        raise PipelineError(
            f"measurements at {results_folder}: expected those of the run at {run_folder} "
            f"({found[:16]}), got another run's ({str(measured)[:16]}). Run `pipeline evaluate`."
        )


def _check_fingerprint(
    manifest: Mapping[str, Any] | None, folder: Path, what: str, expected: str | None
) -> None:
    """Raise PipelineError if a manifest is not that of what the SAEs were trained from."""
    found = (manifest or {}).get("fingerprint")
    if found and expected and found != expected:
        raise PipelineError(
            f"{what} at {folder}: expected the one that the SAEs were trained from, fingerprint "
            f"{expected[:16]}, got {found[:16]}. Name theirs with `pipeline report --{what}`, or "
            "train again with `pipeline train`."
        )


def _check_members(metrics: Mapping[str, Any], config: Mapping[str, Any], results: Path) -> None:
    """Raise PipelineError unless exactly the run's SAEs were measured."""
    measured, trained = set(metrics.get("saes") or {}), set(config.get("members") or ())
    if not measured or "model" not in metrics or (trained and measured != trained):
        raise PipelineError(
            f"measurements at {results / 'metrics.json'}: expected those of "
            f"{', '.join(sorted(trained)) or 'at least one SAE'}, got "
            f"{', '.join(sorted(measured)) or 'none'}. Run `pipeline evaluate`."
        )
