"""What the report reads: whether it is there, readable, and of the run that it says."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import PipelineError
from pipeline.report.charts import History

_OBJECTS = (  # of an SAE or control in metrics.json
    *("with_gradient", "without_gradient"),
    *("selection_overlap_at", "gradient_weight", "latent_gradient"),
)
_NUMBERS = ("k", "beta", "d_sae", "seed")
_MODEL_NUMBERS = ("tokens", "n_layers", "layer", "d_model", "n_parameters")


def read_json(path: Path, what: str, command: str) -> dict[str, Any]:
    """A JSON object; raises PipelineError if it is missing or none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(what, path, command, error) from None
    if not isinstance(content, dict):
        raise _unreadable(what, path, command, f"a {type(content).__name__}")
    return content


def read_metrics(folder: Path) -> dict[str, Any]:
    """A folder's metrics.json; raises PipelineError unless it has the shape that evaluation gives
    it.
    """
    path = folder / "metrics.json"
    metrics = read_json(path, "measurements", "pipeline evaluate")
    fault = next(_list_faults(metrics), None)
    if fault:
        raise _unreadable("measurements", path, "pipeline evaluate", fault)
    return metrics


def _list_faults(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What is of another type than it should be; only the first is told for certain."""
    for key in ("model", "saes"):
        if not isinstance(metrics.get(key), dict):
            yield _name_fault(key, metrics.get(key))
    if not isinstance(metrics.get("runs") or [], list):
        yield _name_fault("runs", metrics["runs"])
    yield from _list_wrong(metrics["model"], _MODEL_NUMBERS, int | float, "model")
    for group in ("saes", "controls", "baselines"):
        members = metrics.get(group) or {}
        yield from _list_wrong({group: members}, (group,), dict)
        for name, facts in members.items():
            if not isinstance(facts, dict):
                yield _name_fault(f"{group}.{name}", facts)
            yield from _list_wrong(facts, _OBJECTS, dict, f"{group}.{name}")
            yield from _list_wrong(facts, _NUMBERS, int | float, f"{group}.{name}")
            for key in _OBJECTS:
                figures = facts.get(key) or {}
                yield from _list_wrong(figures, figures, int | float, f"{group}.{name}.{key}")


def _list_wrong(
    facts: Mapping[str, Any], keys: Iterable[str], wanted: Any, where: str = ""
) -> Iterator[str]:
    for key in keys:
        if facts.get(key) is not None and not isinstance(facts[key], wanted):
            yield _name_fault(f"{where}.{key}".lstrip("."), facts[key])


def _name_fault(key: str, value: Any) -> str:
    return f"no {key}" if value is None else f"{key} of type {type(value).__name__}"


def read_manifest(folder: Path, what: str, command: str) -> dict[str, Any] | None:
    """The manifest of a store or corpus; None if there is none."""
    path = folder / "manifest.json"
    return read_json(path, f"{what} manifest", command) if path.exists() else None


def _unreadable(what: str, path: Path, command: str, found: object) -> PipelineError:
    got = "no such file" if isinstance(found, FileNotFoundError) else str(found)
    return PipelineError(
        f"{what} at {path}: expected the file that `{command}` writes, got {got}. Run `{command}`."
    )


def check_runs(metrics: Mapping[str, Any], runs: Sequence[Path], results_folder: Path) -> None:
    """Raise PipelineError unless it is these runs that were measured, in this order."""
    measured = metrics.get("runs") or [metrics.get("run")]
    found = [hashlib.sha256((run / "config.json").read_bytes()).hexdigest() for run in runs]
    if measured != found:
        raise PipelineError(
            f"measurements at {results_folder}: expected those of the run at "
            f"{', '.join(map(str, runs))} ({_shorten(found)}), got another run's "
            f"({_shorten(measured)}). Run `pipeline evaluate`."
        )


def check_models(folders: Sequence[Path], results: Sequence[Mapping[str, Any]]) -> None:
    """Raise PipelineError if two results are the same ones, or measure the same runs."""
    seen: dict[str, Path] = {}
    for folder, metrics in zip(folders, results, strict=True):
        runs = metrics.get("runs") or [metrics.get("run")]
        measured = str((metrics["model"].get("name"), metrics.get("hook"), runs))
        if measured in seen:
            raise PipelineError(
                f"measurements at {folder}: expected others than those at {seen[measured]}, got "
                "the same model, hook and runs. Name each once with `pipeline report --beside`."
            )
        seen[measured] = folder


def _shorten(fingerprints: Sequence[str | None]) -> str:
    return ", ".join(str(fingerprint)[:16] for fingerprint in fingerprints)


def check_fingerprint(
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


def locate_members(
    metrics: Mapping[str, Any],
    configs: Sequence[Mapping[str, Any]],
    runs: Sequence[Path],
    results: Path,
) -> dict[str, Path]:
    """The run of each SAE; raises PipelineError unless exactly the runs' SAEs were measured."""
    folders = {
        name: run
        for run, config in zip(runs, configs, strict=True)
        for name in config.get("members") or metrics.get("saes") or ()
    }
    measured = set(metrics.get("saes") or {})
    if not measured or "model" not in metrics or measured != set(folders):
        raise PipelineError(
            f"measurements at {results / 'metrics.json'}: expected those of "
            f"{', '.join(sorted(folders)) or 'at least one SAE'}, got "
            f"{', '.join(sorted(measured)) or 'none'}. Run `pipeline evaluate`."
        )
    return folders


def read_history(folder: Path) -> History:
    """The columns of an SAE's history.parquet; raises PipelineError if it cannot be read."""
    path = folder / "history.parquet"
    try:
        return pq.read_table(path).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise _unreadable("training history", path, "pipeline train", error) from None


def link_tables(names: Iterable[str], results_folder: Path, page: Path) -> dict[str, str]:
    """Where a page beside the results folder, or above it, finds each table; otherwise nothing.

    So the links are the same on every machine that page and folder are moved to together.
    """
    try:
        folder = results_folder.resolve().relative_to(page.parent.resolve())
    except ValueError:
        return {}
    return {name: quote((folder / f"{name}.csv").as_posix()) for name in names}


def is_placed(model: Mapping[str, Any]) -> bool:
    """Whether measurements say of which model and layer they are."""
    return model.get("name") is not None and model.get("layer") is not None
