"""The gated autoencoder (Rajamanoharan et al. 2024a): which latents fire, apart from how much."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.sae.sparsity import SteeredSAE


class GatedSAE(SteeredSAE):
    """An autoencoder whose penalty does not shrink its latents.

        p       = (s x - b_dec) @ W_enc                              [batch, d_sae]
        π       = p + b_gate
        y       = 1[π > 0] ReLU(p exp(r_mag) + b_mag)                [batch, d_sae]
        x̂       = (y @ W_dec + b_dec) / s                            [batch, d_model]
        penalty = λ Σ_i ReLU(π_i) ||W_dec_i||
                  + ||s x - b_dec - ReLU(π) @ W_dec||^2              with W_dec, b_dec as constants
                    averaged over the batch's rows, the square summed over d_model

    Rajamanoharan et al. 2024a (2404.16014), section 3.2; λ is `sparsity_weight`. The gate learns
    from the penalty alone, for y has no gradient through 1[π > 0]. b_dec is constant where it is
    added to a reconstruction, not where it is subtracted from s x before W_enc.

    Differs: the norms of the decoder's rows, likewise constants, so that decoder_norm "free" gains
    nothing from longer rows; they are 1 under "unit", as in the paper.
    """

    architecture: ClassVar[str] = "gated"
    penalty_degree: ClassVar[int] = 1
    start_weight: ClassVar[float] = 0.5
    start_l0: ClassVar[float] = 4

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        del self.b_enc
        self.b_gate = nn.Parameter(torch.zeros(self.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(self.d_sae))
        self.r_mag = nn.Parameter(torch.zeros(self.d_sae))

    @property
    def encoder_bias(self) -> Float[Tensor, " d_sae"]:
        """b_gate."""
        return self.b_gate

    @torch.no_grad()
    def start_firing_at(
        self, levels: Float[Tensor, " d_sae"], centred: Float[Tensor, "batch d_model"]
    ) -> None:
        del centred
        self.b_gate.copy_(-levels)
        self.b_mag.copy_(-levels)
        self.r_mag.zero_()

    def fire(self, projected: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        magnitude = (projected * self.r_mag.exp() + self.b_mag).relu()
        return magnitude * (projected + self.b_gate > 0)

    def penalise(
        self,
        acts: Float[Tensor, "batch d_model"],
        projected: Float[Tensor, "batch d_sae"],
        values: Float[Tensor, "batch d_sae"],
    ) -> Float[Tensor, ""]:
        del values
        gate = (projected + self.b_gate).relu()
        W_dec, b_dec = self.W_dec.detach(), self.b_dec.detach()
        l1 = (gate @ W_dec.norm(dim=1)).mean()
        error = self.scale_rows(acts) - b_dec - gate @ W_dec
        return self.sparsity_weight * l1 + error.square().sum(dim=1).mean()
