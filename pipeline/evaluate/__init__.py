"""Stage three: measure trained SAEs on held-out text and write metrics and tables."""

import csv
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.baselines import fit_pca, read_rows, reconstruct_pca
from pipeline.config import Config
from pipeline.corpus.reader import Corpus, open_corpus
from pipeline.device import pick_device
from pipeline.errors import PipelineError
from pipeline.evaluate.activity import Activity
from pipeline.evaluate.measure import MODES, Baseline, evaluate_saes
from pipeline.files import write_json
from pipeline.model import hash_weights, load_model, locate_checkpoint
from pipeline.runs import read_run
from pipeline.sae import SparseAutoencoder, load_sae, read_sae_config
from store.errors import StoreMismatch
from store.files import StoreFiles
from store.identity import diff_identities
from store.reader import ActivationStore, open_files, open_store, read_manifest

_QUANTILES = 101  # points of each firing-frequency curve


def evaluate_run(
    config: Config,
    *,
    run_folder: Path,
    corpus_folder: Path,
    store: str | Path | StoreFiles,
    out: Path,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Measure every SAE of a run, and PCA at each of their ks, fitted on the store's rows.

    Writes metrics.json, saes.csv and firing.csv to `out`.

    Returns the metrics. Raises TrainError if the run is incomplete or was not trained from this
    store, StoreMismatch if model or corpus are not those that the store was made from.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / "saes.csv").is_file():
        raise PipelineError(
            f"results at {out}: expected measurements, an empty folder or nothing, got other "
            "files. Choose another --out."
        )
    run = read_run(run_folder)
    partial = run.config["train"]["allow_partial"]
    files = open_files(store) if isinstance(store, str | Path) else store
    run.check_store(read_manifest(files))
    opened = open_store(files, hook=run.hook, allow_partial=partial)
    checkpoint = locate_checkpoint(config.model.name, config.model.revision)
    corpus = open_corpus(corpus_folder)
    check_origin(opened, config, corpus, checkpoint)
    device = pick_device(config.run.device)
    model = load_model(checkpoint, weight_processing=config.model.weight_processing, device=device)
    saes = {name: load_sae(run_folder / name, device=device) for name in run.members}
    baselines, facts = fit_baselines(opened, run.hook, saes, run.exclude_positions)
    metrics, activities = evaluate_saes(
        model,
        corpus,
        saes,
        hook=run.hook,
        mean_act=mean_activation(opened, run.hook, run.exclude_positions).to(device),
        exclude_positions=run.exclude_positions,
        n_tokens=config.evaluate.tokens,
        batch_blocks=config.evaluate.batch_blocks,
        loss_tokens=config.evaluate.loss_tokens,
        baselines=baselines,
        on_progress=on_progress,
    )
    metrics["run"] = run.fingerprint_of_config
    for name, sae in metrics["saes"].items():
        training = read_sae_config(run_folder / name).training
        sae["seed"] = training["seed"]
        sae["architecture"] = name_architecture(sae["architecture"], training)
    for name, baseline in metrics["baselines"].items():
        baseline |= facts[name]
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "metrics.json", metrics)
    _write_csv(out / "saes.csv", _rows_by_sae(metrics["saes"]))
    _write_csv(out / "firing.csv", _firing_curves(activities))
    return metrics


def check_origin(store: ActivationStore, config: Config, corpus: Corpus, checkpoint: Path) -> None:
    """Raise StoreMismatch unless the store was made from this model and this corpus.

    Another corpus could hold out what the SAEs were trained on.
    """
    found = {
        "weights_hash": hash_weights(checkpoint),
        "weight_processing": config.model.weight_processing,
        "corpus": corpus.manifest.fingerprint,
    }
    wanted = {name: store.manifest.identity.get(name) for name in found}
    if different := diff_identities(wanted, found):
        raise StoreMismatch(
            f"model and corpus for the store at {store.where}: {'; '.join(different)}. "
            "Run `pipeline evaluate` with the profile and --corpus that the store was made from."
        )


def name_architecture(architecture: str, training: Mapping[str, Any]) -> str:
    """As `train.architectures` has it: a TopK SAE trained end to end is called end_to_end."""
    return "end_to_end" if training.get("objective") == "end_to_end" else architecture


def fit_baselines(
    store: ActivationStore,
    hook: str,
    saes: Mapping[str, SparseAutoencoder],
    exclude_positions: tuple[int, ...],
) -> tuple[dict[str, Baseline], dict[str, dict[str, Any]]]:
    """PCA with as many components as each SAE has k; by name, with what metrics.json says of it."""
    pca = fit_pca(read_rows(store, hook, exclude_positions=exclude_positions))
    ks = sorted({sae.k for sae in saes.values()})
    return (
        {f"pca-k{k}": partial(reconstruct_pca, pca, k=k) for k in ks},
        {f"pca-k{k}": {"kind": "pca", "k": k, "fitted_rows": pca.n_rows} for k in ks},
    )


def mean_activation(
    store: ActivationStore, hook: str, exclude_positions: tuple[int, ...]
) -> Tensor:
    """Mean activation [d_model] of the store's first shard, without the positions that training
    leaves out.
    """
    rows = store.read_shard(store.present[0], hook)
    kept = ~torch.isin(rows.position, torch.tensor(exclude_positions, dtype=rows.position.dtype))
    return rows.acts[kept].mean(0)


def _rows_by_sae(saes: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per SAE and mode, for `dvc plots` and spreadsheets."""
    return [
        {
            "sae": name,
            "architecture": sae["architecture"],
            "k": sae["k"],
            "beta": sae["beta"],
            "mode": mode,
            **sae[mode],
        }
        for name, sae in saes.items()
        for mode in MODES
    ]


def _firing_curves(activities: Mapping[str, Mapping[str, Activity]]) -> list[dict[str, Any]]:
    """Quantiles of each SAE's firing frequencies: fractions of tokens on which a latent fires."""
    fractions = torch.linspace(0, 1, _QUANTILES)
    rows = []
    for name, modes in activities.items():
        for mode, activity in modes.items():
            frequencies = torch.quantile(activity.firings.float() / activity.n_rows, fractions)
            rows += [
                {
                    "sae": name,
                    "mode": mode,
                    "fraction_of_latents": q.item(),
                    "firing_frequency": f.item(),
                }
                for q, f in zip(fractions, frequencies, strict=True)
            ]
    return rows


def _write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    rows = list(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


__all__ = ["evaluate_run", "evaluate_saes", "mean_activation"]
