"""Where training starts."""

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.errors import ConfigError, TrainError
from pipeline.sae.base import SparseAutoencoder

BiasStart = Literal["mean", "geometric_median", "zero"]


@torch.no_grad()
def init_weights(
    sae: SparseAutoencoder,
    acts: Float[Tensor, "batch d_model"],
    *,
    seed: int,
    scale_input: bool,
    b_dec: BiasStart = "mean",
) -> None:
    """Random unit decoder rows, their transpose as encoder, b_enc zero, b_dec a first batch's mean.

    With scale_input, s = sqrt(d_model) / mean ||x||, so that a scaled row's norm is sqrt(d_model)
    on average. The same seed draws the same decoder on every device. b_dec may start at the
    batch's geometric median or at zero instead.

    Differs: smol-sae starts b_dec at zero.

    Raises ConfigError for an unknown b_dec; TrainError for rows that are not finite, and with
    scale_input if all are zero: no scale gives them a norm.
    """
    if b_dec not in get_args(BiasStart):
        names = ", ".join(get_args(BiasStart))
        raise ConfigError(f"b_dec at init_weights: expected one of {names}, got {b_dec}.")
    if not acts.isfinite().all():
        raise TrainError("acts of the first batch: expected finite rows, got NaN or Inf in them.")
    scale = math.sqrt(sae.d_model) / acts.norm(dim=1).mean() if scale_input else torch.ones(())
    if not scale.isfinite():
        raise TrainError(
            "acts of the first batch: expected rows with a norm to scale, got zeros alone. Look at "
            "the store with `pipeline store info`, or set train.input_scaling=none."
        )
    rows = torch.randn(sae.d_sae, sae.d_model, generator=torch.Generator().manual_seed(seed))
    sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.encoder_bias.zero_()
    sae.input_scale.copy_(scale)
    if b_dec == "zero":
        sae.b_dec.zero_()
    else:
        centre = acts.mean(dim=0) if b_dec == "mean" else find_geometric_median(acts)
        sae.b_dec.copy_(centre * sae.input_scale)
    sae.reset_extra()
    sae.fit_first_batch(acts)


def find_geometric_median(
    points: Float[Tensor, "batch d_model"], *, n_iterations: int = 100, tolerance: float = 1e-6
) -> Float[Tensor, " d_model"]:
    """The point with the smallest summed distance to all points, by Weiszfeld's iteration.

        m <- Σ w_i x_i / Σ w_i,   w_i = 1 / sqrt(||x_i - m||^2 + ε^2)

    from the mean, until a step is shorter than ε, `tolerance` times the mean distance to the mean.
    The ε under the root lets m leave a point that it meets, where Weiszfeld's 1 / ||x_i - m|| is
    infinite.
    """
    median = points.mean(dim=0)
    shortest = tolerance * (points - median).norm(dim=1).mean()
    for _ in range(n_iterations):
        distances = torch.hypot((points - median).norm(dim=1), shortest)
        weights = (1 / distances).nan_to_num(posinf=1.0)  # where all points are one
        moved = (points * weights[:, None]).sum(dim=0) / weights.sum()
        short = (moved - median).norm() <= shortest
        median = moved
        if short:
            break
    return median
