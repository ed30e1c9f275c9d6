"""SAELens folders (sae-lens 6): sae_weights.safetensors and cfg.json, written and read."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.errors import ConfigError, TrainError
from pipeline.export.facts import Facts, describe
from pipeline.export.folding import Packed, as_float32, fold_scale, read_json
from pipeline.sae import ARCHITECTURES, SparseAutoencoder

WEIGHTS_NAME, CONFIG_NAME = "sae_weights.safetensors", "cfg.json"
VERSION = "6.54.12"  # the format's, which is that of sae-lens; before 6.0.0 it was another
NAMES = {  # our architecture -> theirs; they save a trained BatchTopK as JumpReLU, too
    "topk": "topk",
    "batch_topk": "jumprelu",
    "relu": "standard",
    "jumprelu": "jumprelu",
    "gated": "gated",
}
_OURS = {"topk": "topk", "standard": "relu", "jumprelu": "jumprelu", "gated": "gated"}
_ONLY = {  # settings of theirs for which we have no counterpart -> what they must be
    "normalize_activations": "none",
    "reshape_activations": "none",
}
_SMALLEST_THRESHOLD = 1e-30  # ours are positive; a ReLU gives nothing between it and zero


def pack_saelens(sae: SparseAutoencoder, facts: Facts) -> Packed:
    """The SAE as `SAE.load_from_disk` of sae-lens reads it.

    Differs: it selects without the gradient. BatchTopK becomes JumpReLU with its one threshold for
    all latents, as it selects on single rows.
    """
    name = NAMES[sae.architecture]
    config = {
        "architecture": name,
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        **_ONLY,
        "metadata": {
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,
            "model_name": facts.model,
            "model_class_name": "HookedTransformer",
            "hook_name": facts.hook,
            "hook_head_index": None,
            "context_size": facts.context_length,
            "prepend_bos": facts.prepend_bos,
            "seqpos_slice": [None],
            "dataset_path": facts.dataset,
            "model_from_pretrained_kwargs": {},
            **describe(facts),
        },
    }
    if name == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    return Packed(CONFIG_NAME, config, WEIGHTS_NAME, as_float32(fold_scale(sae)))


def load_saelens(folder: Path) -> SparseAutoencoder:
    """Read a SAELens folder (topk, standard, jumprelu or gated) as one of our SAEs, in float32.

    Where they do not subtract b_dec from the input, or select by z times the norm of the decoder's
    row, that is folded into the weights; the latents are then the same numbers. `k` is theirs, else
    the one that an export of ours recorded, else d_sae, for the other architectures have none.

    Raises TrainError for another architecture, a normalisation or reshaping of the input, a folder
    of sae-lens before 6.0, and missing, damaged or foreign tensors.
    """
    config = read_json(folder / CONFIG_NAME, "SAELens configuration")
    _check_config(config, folder)
    name, d_model, d_sae = config["architecture"], config["d_in"], config["d_sae"]
    tensors = _read_tensors(folder / WEIGHTS_NAME, _list_shapes(name, d_model, d_sae))
    if not config.get("apply_b_dec_to_input", True):
        tensors = _subtract_b_dec(tensors)
    if name == "topk" and config.get("rescale_acts_by_decoder_norm"):  # no other has it
        tensors = _scale_by_norms(tensors)
    if name == "jumprelu":
        threshold = tensors.pop("threshold").clamp(min=_SMALLEST_THRESHOLD)
        tensors["log_threshold"] = threshold.log()
    try:
        sae = _start(_OURS[name], d_model=d_model, d_sae=d_sae, k=_choose_k(config))
    except ConfigError as error:  # k above d_sae
        raise TrainError(f"SAELens configuration at {folder / CONFIG_NAME}: {error}") from None
    sae.load_state_dict(sae.state_dict() | as_float32(tensors))
    return sae


def _start(architecture: str, **settings: Any) -> SparseAutoencoder:
    cls = ARCHITECTURES[architecture]
    options: dict[str, Any] = {"bandwidth": 1e-3}  # of gradients only
    return cls(**settings, **{name: options[name] for name in cls.options})


def _check_config(config: dict[str, Any], folder: Path) -> None:
    path, metadata = folder / CONFIG_NAME, config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise TrainError(f"metadata at {path}: expected an object, got {metadata!r:.40}.")
    version = str(metadata.get("sae_lens_version") or "")
    if version.split(".")[0] in ("", *"012345"):
        raise TrainError(
            f"SAELens configuration at {path}: expected sae_lens_version 6.0.0 or newer, got "
            f"{version or 'none'}. Load and save it with a newer sae-lens."
        )
    if config.get("architecture") not in list(_OURS):  # a list: it may be anything
        raise TrainError(
            f"architecture at {path}: expected one of {', '.join(_OURS)}, "
            f"got {config.get('architecture')!r:.40}."
        )
    for key, wanted in _ONLY.items():
        if config.get(key, wanted) != wanted:
            raise TrainError(f"{key} at {path}: expected {wanted!r}, got {config[key]!r:.40}.")
    sizes = {"d_in": config.get("d_in"), "d_sae": config.get("d_sae"), "k": _choose_k(config)}
    for key, size in sizes.items():
        if type(size) is not int or size < 1:
            raise TrainError(f"{key} at {path}: expected a positive integer, got {size!r:.40}.")


def _choose_k(config: dict[str, Any]) -> Any:
    if config["architecture"] == "topk":
        return config.get("k")
    recorded = config["metadata"].get("k")
    return config.get("d_sae") if recorded is None else recorded


def _list_shapes(name: str, d_model: int, d_sae: int) -> dict[str, list[int]]:
    per_latent = {
        "topk": ("b_enc",),
        "standard": ("b_enc",),
        "jumprelu": ("b_enc", "threshold"),
        "gated": ("b_gate", "b_mag", "r_mag"),
    }[name]
    matrices = {"W_enc": [d_model, d_sae], "W_dec": [d_sae, d_model], "b_dec": [d_model]}
    return matrices | {key: [d_sae] for key in per_latent}


def _read_tensors(path: Path, shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            got = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            for name in sorted(shapes.keys() | got.keys()):
                wanted, found = (each.get(name, "no such tensor") for each in (shapes, got))
                if wanted != found:
                    raise TrainError(
                        f"{name} at {path}: expected {wanted} by {CONFIG_NAME}, got {found}."
                    )
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in shapes}
    except (OSError, SafetensorError) as error:
        raise TrainError(f"SAE weights at {path}: expected safetensors, got: {error}.") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TrainError(f"{name} at {path}: expected floating point, got {tensor.dtype}.")
    return {name: tensor.double() for name, tensor in tensors.items()}


def _subtract_b_dec(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """x @ W_enc + b = (x - b_dec) @ W_enc + (b + b_dec @ W_enc), for every bias of z."""
    shift = tensors["b_dec"] @ tensors["W_enc"]
    if "b_enc" in tensors:
        return tensors | {"b_enc": tensors["b_enc"] + shift}
    magnitude = tensors["b_mag"] + shift * tensors["r_mag"].exp()
    return tensors | {"b_gate": tensors["b_gate"] + shift, "b_mag": magnitude}


def _scale_by_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Latents z |W_dec|, which are divided by |W_dec| again before they are decoded."""
    norms = torch.linalg.vector_norm(tensors["W_dec"], dim=1)
    divisors = norms.where(norms > 0, 1)  # a row of zeros stays one
    return tensors | {
        "W_enc": tensors["W_enc"] * norms,
        "b_enc": tensors["b_enc"] * norms,
        "W_dec": tensors["W_dec"] / divisors[:, None],
    }
