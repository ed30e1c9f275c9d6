"""The SAEs of one or several runs, measured together.

A run has SAEs of one store. Those of another belong beside them if only the gradient differs: their
stores must be of the same model, text and hook.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.errors import TrainError
from pipeline.runs import Run, read_run
from pipeline.sae import SparseAutoencoder, load_sae, read_sae_config
from store.identity import diff_identities

_SAME = ("weights_hash", "weight_processing", "corpus")  # of the stores' identities


class Subjects(NamedTuple):
    """What is measured, by name."""

    runs: tuple[Run, ...]  # the first one's store is at hand
    saes: dict[str, SparseAutoencoder]
    facts: dict[str, dict[str, Any]]  # of each: architecture as trained, seed, gradient

    @property
    def of_own_loss(self) -> frozenset[str]:
        """Those that select with the gradient of each token's own loss."""
        return frozenset(
            name for name, facts in self.facts.items() if facts["gradient"].startswith("own")
        )


def load_subjects(folders: Sequence[Path], device: str | torch.device) -> Subjects:
    """Every SAE of the runs; raises TrainError if a run is not finished or the runs are not of the
    same model, text, hook and positions, or if two SAEs have one name.
    """
    runs = tuple(read_run(folder) for folder in folders)
    saes: dict[str, SparseAutoencoder] = {}
    facts: dict[str, dict[str, Any]] = {}
    for run in runs:
        _check_beside(run, runs[0])
        for name in run.members:
            if name in saes:
                raise TrainError(
                    f"SAE {name} at {run.folder}: expected a name that no other run has, got one "
                    "twice. Leave one --run out."
                )
            saes[name] = load_sae(run.folder / name, device=device)
            training = read_sae_config(run.folder / name).training
            facts[name] = {
                "architecture": name_architecture(saes[name].architecture, training),
                "seed": training["seed"],
                "gradient": training.get("gradient", "full"),
            }
    return Subjects(runs, saes, facts)


def name_architecture(architecture: str, training: Mapping[str, Any]) -> str:
    """As `train.architectures` has it: a TopK SAE trained end to end is called end_to_end."""
    return "end_to_end" if training.get("objective") == "end_to_end" else architecture


def _check_beside(run: Run, first: Run) -> None:
    different = diff_identities(_origin(first), _origin(run))
    if different:
        raise TrainError(
            f"run at {run.folder}: expected SAEs to measure beside those at {first.folder}, got "
            f"other ones: {'; '.join(different)}. Measure it alone with `pipeline evaluate --run`."
        )


def _origin(run: Run) -> dict[str, Any]:
    identity = run.config.get("store_identity") or {}
    return {
        "hook": run.hook,
        "exclude_positions": list(run.exclude_positions),
        **{name: identity.get(name) for name in _SAME},
    }
