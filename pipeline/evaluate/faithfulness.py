"""How faithful a reconstruction is: to the activation (NMSE), to the model's loss (loss added, CE
recovered) and to what it predicts (KL).

The selection of a g-SAE uses the gradient of the very loss that is then measured, so it sees the
label. Every figure is therefore taken in two modes: with the gradient (the paper's protocol) and
without it (beta = 0 at inference, what an exported SAE does).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.evaluate.bootstrap import resample_ratio

MODES = ("with_gradient", "without_gradient")


class Sums(NamedTuple):
    """Sums over the rows of each held-out block, of one reconstruction; float64."""

    rows: Float[Tensor, " blocks"]  # how many have a target
    patched_rows: Float[Tensor, " blocks"]  # and a position that training did not leave out
    loss: Float[Tensor, " blocks"]  # nats, of the rows as they are
    patched_loss: Float[Tensor, " blocks"]  # nats, with x̂ patched in
    nmse: Float[Tensor, " blocks"]  # of the patched rows
    nmse_squared: Float[Tensor, " blocks"]  # likewise
    kl: Float[Tensor, " blocks"]  # nats, of the original's predictions from the patched run's
    loss_all_positions: Float[Tensor, " blocks"]  # nats, all rows patched; NaN: not measured


def nmse_per_row(
    acts: Float[Tensor, "batch d_model"], recon: Float[Tensor, "batch d_model"]
) -> Float[Tensor, " batch"]:
    """NMSE(x) = ||x - x̂||_2 / ||x||_2, unsquared as the paper prints it (Olmo et al. 2024, section
    4.1).
    """
    return torch.linalg.vector_norm(acts - recon, dim=-1) / torch.linalg.vector_norm(acts, dim=-1)


def loss_added(loss: float, patched_loss: float) -> float:
    """(L(x̂) - L(x)) / L(x), of mean losses over all held-out tokens (Olmo et al. 2024, section
    4.1).
    """
    return (patched_loss - loss) / loss


def ce_recovered(loss: float, patched_loss: float, ablated_loss: float) -> float:
    """(L_ablated - L(x̂)) / (L_ablated - L(x)): 1 is as good as the activation itself, 0 as bad as
    the ablation.
    """
    return (ablated_loss - patched_loss) / (ablated_loss - loss)


def _resample_loss_added(sums: Sums, weights: Tensor) -> Tensor:
    return resample_ratio(sums.patched_loss, sums.loss, weights) - 1


def _resample_nmse(sums: Sums, weights: Tensor) -> Tensor:
    return resample_ratio(sums.nmse, sums.patched_rows, weights)


def _resample_kl(sums: Sums, weights: Tensor) -> Tensor:
    return resample_ratio(sums.kl, sums.rows, weights)


# A figure in each resampling of the blocks, [draws_and_one], from weights [draws_and_one, blocks].
RESAMPLE: dict[str, Callable[[Sums, Tensor], Tensor]] = {
    "loss_added": _resample_loss_added,
    "nmse": _resample_nmse,
    "kl": _resample_kl,
}
