"""From sums per held-out block to the figures of metrics.json."""

import math
from collections.abc import Mapping
from typing import Any

from jaxtyping import Int
from torch import Tensor

from pipeline.evaluate.activity import Activity
from pipeline.evaluate.bootstrap import draw_weights, find_interval, spread_interval
from pipeline.evaluate.faithfulness import RESAMPLE, Sums, ce_recovered, loss_added
from pipeline.model import LanguageModel
from pipeline.sae import SparseAutoencoder

_ACTIVITY = ("l0", "dead_fraction", "dead_fraction_held_out")


def describe_model(model: LanguageModel, hook: str) -> dict[str, Any]:
    """Its shape, and the hook's layer, None outside the blocks.

    Parameters as loaded: an unembedding that is the embedding counts once, but folding makes it
    another matrix.
    """
    block = hook.split(".")[1] if hook.startswith("blocks.") else None
    parameters = dict(model.bridge.original_model.named_parameters())
    return {
        "n_layers": model.facts.n_layers,
        "layer": None if block is None else int(block),
        "d_model": model.facts.d_model,
        # A bridge that splits a joint query, key and value keeps the joint one beside its parts.
        "n_parameters": sum(p.numel() for name, p in parameters.items() if ".qkv." not in name),
    }


def describe_sae(sae: SparseAutoencoder) -> dict[str, Any]:
    """What the SAE is; k is the L0 wanted where the architecture does not fix it."""
    return {
        "architecture": sae.architecture,
        "k": sae.k,
        "beta": sae.beta,
        "d_sae": sae.d_sae,
        "loss_tokens": sae.loss_tokens,
    }


def describe_text(
    ablations: Mapping[str, Sums], documents: Int[Tensor, " blocks"]
) -> dict[str, Any]:
    """How much text there is, of how many documents, and the model's mean loss on it as it is and
    under each ablation.
    """
    rows, own = ablations["zero"].rows, ablations["zero"].loss
    counts = {"tokens": int(rows.sum()), "documents": len(documents.unique())}
    return (
        counts
        | {"loss": _mean_per_row(own, rows)}
        | {
            f"loss_{name}_ablation": _mean_per_row(sums.patched_loss, rows)
            for name, sums in ablations.items()
        }
    )


def summarise_all(
    sums: Mapping[tuple[str, str], Sums],
    activities: Mapping[tuple[str, str], Activity],
    ablations: Mapping[str, Sums],
    *,
    draws: int,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures by name and mode; `sums` and `activities` are by both, `ablations` by their name."""
    ablated = {
        name: _mean_per_row(part.patched_loss, part.rows) for name, part in ablations.items()
    }
    weights = draw_weights(len(ablations["zero"].rows), draws=draws)
    figures: dict[str, dict[str, Any]] = {}
    for (name, mode), part in sums.items():
        activity = activities.get((name, mode))
        counts = {key: getattr(activity, key) if activity else None for key in _ACTIVITY}
        figures.setdefault(name, {})[mode] = _summarise(part, ablated, weights) | counts
    return figures


def _summarise(sums: Sums, ablated: Mapping[str, float], weights: Tensor) -> dict[str, Any]:
    own, patched = _mean_per_row(sums.loss, sums.rows), _mean_per_row(sums.patched_loss, sums.rows)
    everywhere = loss_added(own, _mean_per_row(sums.loss_all_positions, sums.rows))
    figures: dict[str, Any] = {}
    for name, resample in RESAMPLE.items():
        figures |= spread_interval(name, find_interval(resample(sums, weights)))
    return {
        **figures,
        "nmse_squared": _mean_per_row(sums.nmse_squared, sums.patched_rows),
        "loss": patched,
        "loss_added_all_positions": None if math.isnan(everywhere) else everywhere,
        "ce_recovered_zero": ce_recovered(own, patched, ablated["zero"]),
        "ce_recovered_mean": ce_recovered(own, patched, ablated["mean"]),
    }


def _mean_per_row(values: Tensor, rows: Tensor) -> float:
    return (values.sum() / rows.sum()).item()
