"""From runs, a corpus and a store to a folder of measurements.

<out>/metrics.json     every SAE's and control's figures, by mode
<out>/<table>.csv      what each measurement found, one file each
<out>/blocks.parquet   sums per held-out block, behind the intervals
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.baselines import fit_pca, read_rows
from pipeline.config import Config
from pipeline.corpus.reader import Corpus, open_corpus
from pipeline.device import pick_device
from pipeline.evaluate.controls import Control, make_controls
from pipeline.evaluate.evidence import Scene, list_tables
from pipeline.evaluate.measure import evaluate_saes, list_blocks
from pipeline.evaluate.results_folder import replace_results, write_results
from pipeline.evaluate.sizes import check_model, check_text
from pipeline.evaluate.subjects import Subjects, load_subjects
from pipeline.model import hash_weights, load_model, locate_checkpoint
from store.errors import StoreMismatch
from store.files import StoreFiles
from store.identity import diff_identities
from store.reader import ActivationStore, open_files, open_store, read_manifest


def evaluate_runs(
    config: Config,
    *,
    run_folders: Sequence[Path],
    corpus_folder: Path,
    store: str | Path | StoreFiles,
    out: Path,
    on_progress: Callable[[int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure every SAE of the runs, and the controls, which are fitted on the store's rows.

    `store` is the one that the first run was trained from; the others' differ in their gradients at
    most. `on_progress` is told of tokens, `tell` of each further measurement as it begins.

    Returns the metrics. Raises TrainError if a run is incomplete, was not trained from this store
    or does not belong beside the first, StoreMismatch if model or corpus are not those that the
    store was made from, ConfigError, ModelError or CorpusError if the model lacks or the corpus
    holds out too little of what the settings ask for, PipelineError if `out` cannot take the
    measurements.
    """
    with replace_results(out) as folder:
        scene = set_scene(
            config, run_folders, corpus_folder, store, on_progress=on_progress or _ignore
        )
        tables = list_tables(scene, config, tell=tell or _ignore)
        measured = scene.measured
        write_results(folder, measured.metrics, list_blocks(measured.sums), tables)
    return measured.metrics


def set_scene(
    config: Config,
    run_folders: Sequence[Path],
    corpus_folder: Path,
    store: str | Path | StoreFiles,
    *,
    on_progress: Callable[[int], None],
) -> Scene:
    """Load all that is measured, check that it belongs together, and measure faithfulness."""
    device = pick_device(config.run.device)
    subjects = load_subjects(run_folders, device=device)
    run = subjects.runs[0]
    files = open_files(store) if isinstance(store, str | Path) else store
    run.check_store(read_manifest(files))
    partial = run.config["train"]["allow_partial"]
    opened = open_store(files, hook=run.hook, allow_partial=partial)
    checkpoint = locate_checkpoint(config.model.name, config.model.revision)
    corpus = open_corpus(corpus_folder)
    check_origin(opened, config, corpus, checkpoint)
    model = load_model(checkpoint, weight_processing=config.model.weight_processing, device=device)
    check_model(config.evidence, model)
    check_text(config, corpus, model, run.exclude_positions)
    measured = evaluate_saes(
        model,
        corpus,
        subjects.saes,
        hook=run.hook,
        mean_act=mean_activation(opened, run.hook, run.exclude_positions).to(device),
        exclude_positions=run.exclude_positions,
        n_tokens=config.evaluate.tokens,
        batch_blocks=config.evaluate.batch_blocks,
        loss_tokens=config.evaluate.loss_tokens,
        bootstrap_draws=config.evidence.bootstrap_draws,
        controls=fit_controls(opened, run.hook, subjects, run.exclude_positions),
        own_loss=subjects.of_own_loss,
        on_progress=on_progress,
    )
    measured.metrics["runs"] = [run.fingerprint_of_config for run in subjects.runs]
    measured.metrics["model"]["name"] = config.model.name
    for name, sae in measured.metrics["saes"].items():
        sae |= subjects.facts[name]
    return Scene(model, corpus, subjects.saes, run.hook, run.exclude_positions, measured)


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


def fit_controls(
    store: ActivationStore, hook: str, subjects: Subjects, exclude_positions: tuple[int, ...]
) -> dict[str, Control]:
    """What the SAEs are compared with; PCA is fitted on the store's rows."""
    pca = fit_pca(read_rows(store, hook, exclude_positions=exclude_positions))
    architectures = {name: facts["architecture"] for name, facts in subjects.facts.items()}
    return make_controls(subjects.saes, architectures=architectures, pca=pca)


def mean_activation(
    store: ActivationStore, hook: str, exclude_positions: tuple[int, ...]
) -> Tensor:
    """Mean activation [d_model] of the store's first shard, without the positions that training
    leaves out.
    """
    rows = store.read_shard(store.present[0], hook)
    kept = ~torch.isin(rows.position, torch.tensor(exclude_positions, dtype=rows.position.dtype))
    return rows.acts[kept].mean(0)


def _ignore(*_: object) -> None:
    pass
