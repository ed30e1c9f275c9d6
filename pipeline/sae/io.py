"""A trained SAE on disk: <folder>/sae.safetensors and <folder>/config.json; never a pickle."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.config import Count, Section, Weight
from pipeline.errors import ConfigError, TrainError
from pipeline.files import write_json
from pipeline.sae.architectures import ARCHITECTURES
from pipeline.sae.base import SparseAutoencoder

WEIGHTS_NAME = "sae.safetensors"
CONFIG_NAME = "config.json"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


def _known(architecture: str) -> str:
    if architecture not in ARCHITECTURES:
        raise ValueError(f"expected one of {', '.join(ARCHITECTURES)}, got {architecture!r:.40}")
    return architecture


class SaeConfig(Section):
    """What config.json says of an SAE."""

    architecture: Annotated[str, AfterValidator(_known)]
    d_model: Count
    d_sae: Count
    k: Count
    beta: Weight
    loss_tokens: Count
    options: dict[str, Any]  # the architecture's own, such as n_experts
    training: dict[str, Any]  # how it came about: hook, seed, store, settings, versions


def save_sae(
    sae: SparseAutoencoder, folder: Path, *, training: Mapping[str, Any] | None = None
) -> None:
    """Write an SAE, each file under a temporary name that is then renamed.

    `training` is any JSON that tells how the SAE came about. Raises TrainError, and leaves what is
    there alone, where a parameter is NaN or infinite.
    """
    tensors = {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise TrainError(
                f"{name} of the SAE for {folder}: expected finite values, got NaN or Inf."
            )
    config = SaeConfig(
        architecture=sae.architecture,
        d_model=sae.d_model,
        d_sae=sae.d_sae,
        k=sae.k,
        beta=sae.beta,
        loss_tokens=sae.loss_tokens,
        options={name: getattr(sae, name) for name in sae.options},
        training=dict(training or {}),
    )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{WEIGHTS_NAME}.part"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(folder / WEIGHTS_NAME)
    write_json(folder / CONFIG_NAME, config.model_dump(mode="json"))


def load_sae(folder: Path, *, device: str | torch.device = "cpu") -> SparseAutoencoder:
    """Read an SAE that `save_sae` wrote.

    Shapes are checked against config.json before a tensor is read. Raises TrainError for a pickle
    (never opened), a missing or damaged file, an unknown key in config.json, and tensors that are
    not the expected ones or not finite.
    """
    _refuse_pickles(folder)
    config = read_sae_config(folder)
    path = folder / WEIGHTS_NAME
    try:
        with torch.device("meta"):  # shapes only, whatever config.json claims
            arguments: dict[str, Any] = config.model_dump(
                exclude={"architecture", "options", "training"}
            )
            sae = ARCHITECTURES[config.architecture](**arguments, **config.options)
    except (ConfigError, TypeError, RuntimeError) as error:  # the last: no such shape
        raise TrainError(f"SAE configuration at {folder / CONFIG_NAME}: {error}") from None
    expected = {name: list(tensor.shape) for name, tensor in sae.state_dict().items()}
    try:
        with safe_open(path, framework="pt") as file:
            got = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            _compare_shapes(path, expected, got)
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in expected}
    except (OSError, SafetensorError) as error:
        raise TrainError(f"SAE weights at {path}: expected safetensors, got: {error}.") from None
    _check_dtypes(path, sae, tensors)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise TrainError(
                f"{name} at {path}: expected finite values, got NaN or Inf. Train it again, with a "
                "lower --lr."
            )
    sae.load_state_dict(tensors, assign=True)
    return sae.to(device)


def read_sae_config(folder: Path) -> SaeConfig:
    """Read <folder>/config.json; raises TrainError if it is missing, not JSON or has other keys."""
    path = folder / CONFIG_NAME
    try:
        return SaeConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        raise TrainError(f"SAE configuration at {path}: {key}: {message}.") from None
    except (OSError, ValueError, RecursionError) as error:  # the last: brackets without end
        raise TrainError(f"SAE configuration at {path}: expected JSON, got: {error}.") from None


def _refuse_pickles(folder: Path) -> None:
    if (folder / WEIGHTS_NAME).is_file():
        return
    found = [folder.name] if folder.is_file() else sorted(p.name for p in folder.glob("*"))
    pickles = [name for name in found if name.endswith(PICKLE_SUFFIXES)]
    got = f"the pickle {pickles[0]}, which is never loaded" if pickles else str(found or "nothing")
    raise TrainError(
        f"SAE at {folder}: expected a folder with {WEIGHTS_NAME}, got {got}. "
        f"Train one with pipeline train, or convert the weights to safetensors."
    )


def _compare_shapes(path: Path, expected: dict[str, list[int]], got: dict[str, list[int]]) -> None:
    for name in sorted(expected.keys() | got.keys()):
        wanted, found = expected.get(name, "no such tensor"), got.get(name, "no such tensor")
        if wanted != found:
            raise TrainError(f"{name} at {path}: expected {wanted} by {CONFIG_NAME}, got {found}.")


def _check_dtypes(path: Path, sae: SparseAutoencoder, tensors: Mapping[str, Tensor]) -> None:
    """All floating tensors have W_enc's dtype, which may be another than float32."""
    floating = tensors["W_enc"].dtype if tensors["W_enc"].is_floating_point() else torch.float32
    for name, tensor in sae.state_dict().items():
        wanted = floating if tensor.is_floating_point() else tensor.dtype
        if tensors[name].dtype != wanted:
            raise TrainError(f"{name} at {path}: expected {wanted}, got {tensors[name].dtype}.")
