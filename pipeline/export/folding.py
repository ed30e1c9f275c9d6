"""The parameters of an SAE as other libraries want them: without an input scale, and as files."""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.errors import TrainError
from pipeline.files import write_json
from pipeline.sae import SparseAutoencoder

_KEPT = ("b_enc", "b_gate", "b_mag", "r_mag")  # of the latents, which stay the same numbers


class Packed(NamedTuple):
    """One SAE in the form of a library."""

    config_name: str  # of the JSON file
    config: dict[str, Any]
    weights_name: str  # *.pt is written by torch.save, any other as safetensors
    tensors: dict[str, Tensor]


def fold_scale(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """The parameters, in float64, of the same SAE for an input scale of 1.

        z = (s x - b_dec) @ W_enc + b_enc = (x - b_dec / s) @ (s W_enc) + b_enc
        x̂ = (y @ W_dec + b_dec) / s       = y @ (W_dec / s) + b_dec / s

    so that W_enc becomes s W_enc, W_dec and b_dec are divided by s, and everything that is added to
    z or compared with it stays as it is: the latents are the same numbers. A threshold comes as one
    number per latent, `threshold` [d_sae].
    """
    state = {name: tensor.detach().cpu().double() for name, tensor in sae.state_dict().items()}
    scale = state["input_scale"]
    folded = {
        "W_enc": state["W_enc"] * scale,
        "W_dec": state["W_dec"] / scale,
        "b_dec": state["b_dec"] / scale,
    }
    folded |= {name: state[name] for name in _KEPT if name in state}
    threshold = state["log_threshold"].exp() if "log_threshold" in state else state.get("threshold")
    if threshold is not None:
        folded["threshold"] = threshold.expand(sae.d_sae).clone()
    return folded


def write_packed(packed: Packed, folder: Path) -> None:
    """Write both files, the tensors as they are in dtype and contiguous.

    Raises TrainError where a tensor is NaN or infinite.
    """
    tensors = {name: tensor.contiguous() for name, tensor in packed.tensors.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise TrainError(f"{name} for {folder}: expected finite values, got NaN or Inf.")
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / packed.weights_name)
    write_json(folder / packed.config_name, packed.config)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    if path.suffix == ".pt":  # the format of a library that knows no other; we never read it
        content = io.BytesIO()
        torch.save(dict(tensors), content)  # to a file, it would not tell why that fails
        path.write_bytes(content.getbuffer())
    else:
        save_file(dict(tensors), path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def as_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items()}


def read_json(path: Path, what: str) -> dict[str, Any]:
    """An object from a JSON file; raises TrainError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last: brackets without end
        raise TrainError(f"{what} at {path}: expected JSON, got: {error}.") from None
    if not isinstance(content, dict):
        raise TrainError(f"{what} at {path}: expected an object, got {content!r:.60}.")
    return content
