"""Sparsify's folders (eai-sparsify): sae.safetensors and cfg.json."""

from pipeline.export.facts import Facts, describe
from pipeline.export.folding import Packed, as_float32, fold_scale
from pipeline.sae import SparseAutoencoder

NAMES = {"topk": "topk"}  # our architecture -> their activation


def pack_sparsify(sae: SparseAutoencoder, facts: Facts) -> Packed:
    """The SAE as `SparseCoder.load_from_disk` reads it.

    Differs: it selects without the gradient.
    """
    weights = fold_scale(sae)
    config = {
        "activation": NAMES[sae.architecture],
        "expansion_factor": max(1, sae.d_sae // sae.d_model),
        "normalize_decoder": False,  # 1 / s is in its rows
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_model,
        "gsae_pipeline": {"model": facts.model, "hook": facts.hook, **describe(facts)},
    }
    tensors = {
        "encoder.weight": weights["W_enc"].T,
        "encoder.bias": weights["b_enc"],
        "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"],
    }
    return Packed("cfg.json", config, "sae.safetensors", as_float32(tensors))
