"""What an export says of an SAE: from its run and its measurements, fit to be published."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import TrainError
from pipeline.export.folding import read_json
from pipeline.history import read_history
from pipeline.run_folder import HISTORY_NAME
from pipeline.runs import Run
from pipeline.sae import SaeConfig, read_sae_config

MODES = ("with_gradient", "without_gradient")
_PRIVATE = ("store",)  # a path or URL of the trainer's; the store's fingerprint identifies it


class Facts(NamedTuple):
    """One SAE, for its files and for the card. None: the run does not say."""

    name: str  # of the SAE in its run
    sae: SaeConfig
    hook: str
    model: str | None  # "demo", a name on the hub, or "<folder> (local)"
    model_processing: str | None  # raw, or folded: layer norms folded, weights centred
    dataset: str | None
    subset: str | None
    context_length: int | None
    prepend_bos: bool | None
    exclude_positions: tuple[int, ...]  # of a block, left out in training
    tokens: int | None  # rows that it trained on
    training: dict[str, Any]  # the SAE's own record, without its trainer's paths
    measured: dict[str, Any]  # evaluation's figures, empty where there are none

    @property
    def layer(self) -> int | None:
        match = re.match(r"blocks\.(\d+)\.", self.hook)
        return int(match[1]) if match else None


def read_facts(run: Run, name: str, metrics: Mapping[str, Any] | None) -> Facts:
    """Gather what the run and its measurements (metrics.json, or None) say of one SAE."""
    sae = read_sae_config(run.folder / name)
    settings = run.config.get("config") or {}
    model, corpus = settings.get("model") or {}, settings.get("corpus") or {}
    return Facts(
        name=name,
        sae=sae,
        hook=run.hook,
        model=publish_name(model.get("name")),
        model_processing=model.get("weight_processing"),
        dataset=publish_name(corpus.get("source")),
        subset=corpus.get("subset"),
        context_length=corpus.get("context_length"),
        prepend_bos=corpus.get("prepend_bos"),
        exclude_positions=run.exclude_positions,
        tokens=_find_tokens(run, name, sae),
        training=publish_settings(sae.training),
        measured=dict((metrics or {}).get("saes", {}).get(name, {})),
    )


def _find_tokens(run: Run, name: str, sae: SaeConfig) -> int | None:
    """The SAE's own record; an earlier run has its history, and without one the run's figure."""
    history = run.folder / name / HISTORY_NAME
    if "trained_tokens" in sae.training:
        return sae.training["trained_tokens"]
    return read_history(history)[-1]["tokens"] if history.is_file() else run.config.get("tokens")


def read_metrics(folder: Path, run: Run) -> dict[str, Any]:
    """metrics.json of a run; raises TrainError if it is missing or of another run."""
    metrics = read_json(folder / "metrics.json", "measurements")
    if metrics.get("run") != run.fingerprint_of_config:
        raise TrainError(
            f"measurements at {folder}: expected those of the run at {run.folder} "
            f"({run.fingerprint_of_config[:16]}), got another run's "
            f"({str(metrics.get('run'))[:16]}). Run `pipeline evaluate --run {run.folder}`."
        )
    return metrics


def publish_name(name: str | None) -> str | None:
    """A model's or data set's name; of a local one the last part of its path, marked as local."""
    if name is None:
        return None
    local = name.startswith((".", "/", "~")) or (name != "demo" and Path(name).exists())
    return f"{Path(name).name} (local)" if local else name


def publish_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without paths and addresses of the machine that they were used on."""
    kept = {key: value for key, value in settings.items() if key not in _PRIVATE}
    if isinstance(kept.get("config"), dict):
        config = json.loads(json.dumps(kept["config"]))
        config.pop("run", None)
        for section, key in (("model", "name"), ("corpus", "source")):
            if isinstance(config.get(section), dict) and key in config[section]:
                config[section][key] = publish_name(config[section][key])
        kept["config"] = config
    return kept


def describe(facts: Facts) -> dict[str, Any]:
    """What the files of every library say beside their own keys."""
    return {
        "trained_with": "gsae-pipeline",
        "training_architecture": facts.sae.architecture,
        "training_objective": facts.training.get("objective"),
        "k": facts.sae.k,
        "beta": facts.sae.beta,
        "loss_tokens": facts.sae.loss_tokens,
        "trained_tokens": facts.tokens,
        "selects_with_gradient": False,
        "exclude_positions": list(facts.exclude_positions),
        "weight_processing": facts.model_processing,
        **{f"metrics_{mode}": facts.measured[mode] for mode in MODES if mode in facts.measured},
    }
