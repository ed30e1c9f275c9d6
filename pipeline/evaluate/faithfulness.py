"""How faithful a reconstruction is: to the activation (NMSE) and to the model's loss (loss added,
CE recovered).
"""

import torch
from jaxtyping import Float
from torch import Tensor


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
