"""One SAE of a run, with the model and the text that it was trained on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config import Config
from pipeline.corpus.reader import Corpus, open_corpus
from pipeline.device import pick_device
from pipeline.errors import ConfigError, TrainError
from pipeline.model import (
    LanguageModel,
    hash_weights,
    load_model,
    load_tokenizer,
    locate_checkpoint,
)
from pipeline.runs import Run, read_run
from pipeline.sae import SaeConfig, SparseAutoencoder, load_sae, read_sae_config
from store.identity import diff_identities


class Subject(NamedTuple):
    """One SAE of a run, and the model that it was trained on."""

    run: Run
    name: str
    sae: SparseAutoencoder
    model: LanguageModel
    tokenizer: Any


def open_subject(config: Config, folder: Path, wanted: str | None) -> Subject:
    """Load the SAE and its model; raises TrainError for another model, or no such SAE."""
    run = read_run(folder)
    configs = {name: read_sae_config(folder / name) for name in run.members}
    name = choose_sae(configs, wanted, where=folder)
    checkpoint = locate_checkpoint(config.model.name, config.model.revision)
    identity = run.config.get("store_identity") or {}
    found = {
        "weights_hash": hash_weights(checkpoint),
        "weight_processing": config.model.weight_processing,
    }
    if different := diff_identities({key: identity.get(key) for key in found}, found):
        raise TrainError(
            f"model for the SAEs at {folder}: {'; '.join(different)}. Run `pipeline steer` with "
            "the profile or --model that they were trained with."
        )
    device = pick_device(config.run.device)
    model = load_model(checkpoint, weight_processing=config.model.weight_processing, device=device)
    sae = load_sae(folder / name, device=device)
    return Subject(run, name, sae, model, load_tokenizer(checkpoint))


def choose_sae(configs: Mapping[str, SaeConfig], wanted: str | None, *, where: Path) -> str:
    """The SAE that was named; else the first with the highest beta among those that were trained on
    their own gradients, or the first of all. Raises ConfigError, listing what exists.
    """
    if wanted is not None:
        if wanted not in configs:
            raise ConfigError(
                f"--sae {wanted}: expected one of {', '.join(configs)} (at {where}), got none of "
                "them."
            )
        return wanted
    unshuffled = [name for name, c in configs.items() if not _is_shuffled(c)]
    return max(unshuffled or configs, key=lambda name: configs[name].beta)


def open_own_corpus(run: Run, folder: Path | None) -> Corpus | None:
    """The corpus, checked to be the one that the SAEs were trained on; None without a folder."""
    if folder is None:
        return None
    corpus = open_corpus(folder)
    wanted = (run.config.get("store_identity") or {}).get("corpus")
    if corpus.manifest.fingerprint != wanted:
        raise TrainError(
            f"corpus at {folder}: expected the one that the SAEs at {run.folder} were trained on "
            f"({str(wanted)[:16]}), got {corpus.manifest.fingerprint[:16]}. Name theirs with "
            "--corpus."
        )
    return corpus


def _is_shuffled(config: SaeConfig) -> bool:
    return config.training.get("gradient", "full").endswith("shuffled")
