"""dictionary_learning's folders: ae.pt, which is a pickle of plain tensors, and config.json."""

import torch
from torch import Tensor

from pipeline.export.facts import Facts, describe
from pipeline.export.folding import Packed, as_float32, fold_scale
from pipeline.sae import SparseAutoencoder

NAMES = {  # our architecture -> their class
    "topk": "AutoEncoderTopK",
    "batch_topk": "BatchTopKSAE",
    "relu": "AutoEncoder",
    "jumprelu": "JumpReluAutoEncoder",
    "gated": "GatedAutoEncoder",
}


def pack_dictionary_learning(sae: SparseAutoencoder, facts: Facts) -> Packed:
    """The SAE as `dictionary_learning.utils.load_dictionary` reads it.

    Differs: it selects without the gradient. A ReLU SAE's latents are multiplied by the norm of
    their decoder column, n = |W_dec| / s, for loading scales those columns to norm 1; every other
    latent is the same number as ours. JumpReLU there subtracts no b_dec from the input, so that
    b_enc takes it up.
    """
    weights = fold_scale(sae)
    name = NAMES[sae.architecture]
    if name == "JumpReluAutoEncoder":
        tensors = as_float32(_without_b_dec(weights))
    elif name == "GatedAutoEncoder":
        tensors = as_float32(_rename_gated(weights))
    elif name == "AutoEncoder":
        unit = _with_unit_norm(weights)
        tensors = as_float32(_rename_linear(unit)) | {"bias": unit["b_dec"].float()}
    else:
        threshold = weights["threshold"][0] if "threshold" in weights else torch.tensor(-1.0)
        tensors = as_float32(
            _rename_linear(weights) | {"b_dec": weights["b_dec"], "threshold": threshold}
        )
        tensors["k"] = torch.tensor(sae.k, dtype=torch.int)
    config = {
        "trainer": {
            "dict_class": name,
            "k": sae.k,
            "activation_dim": sae.d_model,
            "dict_size": sae.d_sae,
            "layer": facts.layer,
            "lm_name": facts.model,
            "submodule_name": facts.hook,
        },
        "buffer": {"ctx_len": facts.context_length},
        "gsae_pipeline": describe(facts),
    }
    return Packed("config.json", config, "ae.pt", tensors)


def _rename_linear(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "encoder.weight": weights["W_enc"].T,
        "encoder.bias": weights["b_enc"],
        "decoder.weight": weights["W_dec"].T,
    }


def _rename_gated(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "encoder.weight": weights["W_enc"].T,
        "decoder.weight": weights["W_dec"].T,
        "decoder_bias": weights["b_dec"],
        "gate_bias": weights["b_gate"],
        "mag_bias": weights["b_mag"],
        "r_mag": weights["r_mag"],
    }


def _without_b_dec(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """(x - b_dec) @ W_enc + b_enc = x @ W_enc + (b_enc - b_dec @ W_enc)."""
    return weights | {"b_enc": weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]}


def _with_unit_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Latents n z, for ReLU(n z) = n ReLU(z) where n > 0."""
    norms = torch.linalg.vector_norm(weights["W_dec"], dim=1)
    return weights | {
        "W_enc": weights["W_enc"] * norms,
        "b_enc": weights["b_enc"] * norms,
        "W_dec": weights["W_dec"] / norms[:, None],
    }
