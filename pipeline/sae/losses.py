"""What training minimises, beside each architecture's own penalty."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.sae.base import SparseAutoencoder
from pipeline.sae.selection import Latents
from pipeline.sae.sparse import decode_rows


def reconstruction_loss(
    acts: Float[Tensor, "batch d_model"],
    recon: Float[Tensor, "batch d_model"],
    *,
    input_scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """s^2 ||x - x̂||^2, summed over d_model and averaged over the batch.

    It is in units of the scaled input. The gradient of the language model's loss has no part in it
    (Olmo et al. 2024, section 3).
    """
    # By its norm, which takes half as many passes over the batch as the square of each element.
    return (recon - acts).norm(dim=1).square().mean() * input_scale.square()


def auxk_loss(
    sae: SparseAutoencoder,
    acts: Float[Tensor, "batch d_model"],
    recon: Float[Tensor, "batch d_model"],
    dead: Bool[Tensor, " d_sae"],
    *,
    aux_k: int,
) -> Float[Tensor, ""]:
    """How badly the dead latents explain what the living leave over.

        e = s (x - x̂), without a gradient
        ê = ReLU(z on the aux_k largest z of dead latents, else 0) @ W_dec
        ||e - ê||^2, summed over d_model and averaged over the batch        (Gao et al. 2024, A.2)

    Its gradient reaches the dead latents' rows of both encoder and decoder, and nothing else. 0
    where none is dead, or for no rows.
    """
    listed = dead.nonzero().flatten()
    if len(listed) == 0 or len(acts) == 0:
        return acts.new_zeros(())
    error = ((acts - recon) * sae.input_scale).detach()
    centred = (sae.scale_rows(acts) - sae.b_dec).detach()
    pre_acts = torch.addmm(sae.encoder_bias[listed], centred, sae.W_enc[:, listed])
    values, indices = pre_acts.topk(min(aux_k, len(listed)), dim=1, sorted=False)
    revived = decode_rows(Latents(values.relu(), indices), sae.W_dec[listed])
    return (error - revived).square().sum(dim=1).mean()
