"""The ReLU autoencoder with an L1 penalty (Bricken et al. 2023)."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.sae.sparsity import SteeredSAE


class ReluSAE(SteeredSAE):
    """The standard sparse autoencoder.

        y       = ReLU((s x - b_dec) @ W_enc + b_enc)                [batch, d_sae]
        x̂       = (y @ W_dec + b_dec) / s                            [batch, d_model]
        penalty = λ Σ_i y_i ||W_dec_i||, averaged over the batch's rows

    Bricken et al. 2023 (Towards Monosemanticity), appendix on training; λ is `sparsity_weight`.

    Differs: the norms of the decoder's rows, from Conerly et al. 2024 (Anthropic, Circuits Updates,
    April 2024). They are 1 under decoder_norm "unit"; "free", a longer row would make the penalty
    smaller for nothing. Dead latents are not resampled.
    """

    architecture: ClassVar[str] = "relu"
    penalty_degree: ClassVar[int] = 1
    start_weight: ClassVar[float] = 0.5
    start_l0: ClassVar[float] = 4

    @torch.no_grad()
    def start_firing_at(
        self, levels: Float[Tensor, " d_sae"], centred: Float[Tensor, "batch d_model"]
    ) -> None:
        del centred
        self.b_enc.copy_(-levels)

    def fire(self, projected: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        return (projected + self.b_enc).relu()

    def penalise(
        self,
        acts: Float[Tensor, "batch d_model"],
        projected: Float[Tensor, "batch d_sae"],
        values: Float[Tensor, "batch d_sae"],
    ) -> Float[Tensor, ""]:
        del acts, projected
        return self.sparsity_weight * (values @ self.W_dec.norm(dim=1)).mean()
