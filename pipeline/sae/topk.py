"""The TopK autoencoder (Gao et al. 2024), and with beta > 0 the gradient SAE (Olmo et al. 2024)."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.sae.selection import Latents
from pipeline.sae.sparse import decode_rows, encode_rows


class Reconstruction(NamedTuple):
    """What an SAE makes of a batch of activations."""

    recon: Float[Tensor, "batch d_model"]  # x̂, in the units of x
    latents: Latents


class TopKSAE(nn.Module):
    """A k-sparse autoencoder whose selection may be steered by the loss gradient.

        z = (s x - b_dec) @ W_enc + b_enc                            [batch, d_sae]
        y = ReLU(z) on the k largest z + beta / loss_tokens * z * |grads @ W_dec^T|, else 0
        x̂ = (y @ W_dec + b_dec) / s                                  [batch, d_model]

    Olmo et al. 2024, section 3; beta = 0 is Gao et al. 2024. s is `input_scale`: x, x̂ and grads
    are in the model's own units, the parameters in those of the scaled input. The gradient term
    needs no s: grads and W_dec's rows stay as they are, so that every score is s times that of the
    same SAE with s folded in, and the selection is the same.

    Differs: the paper has no input scale, and its beta is our beta / loss_tokens (see `select`).

    The parameters are zero until `init_weights` or `load_sae` fills them. Raises ConfigError if k >
    d_sae.
    """

    input_scale: Tensor  # scalar buffer

    def __init__(
        self, *, d_model: int, d_sae: int, k: int, beta: float = 0.0, loss_tokens: int = 8160
    ) -> None:
        super().__init__()
        if not 0 < k <= d_sae:
            raise ConfigError(f"k at TopKSAE: expected 1 to d_sae = {d_sae}, got {k}.")
        self.d_model, self.d_sae, self.k = d_model, d_sae, k
        self.beta, self.loss_tokens = beta, loss_tokens
        self.W_enc = nn.Parameter(torch.zeros(d_model, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_model))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("input_scale", torch.ones(()))

    @property
    def beta_per_token(self) -> float:
        """beta / loss_tokens, what the gradient of the summed loss is weighed with."""
        return self.beta / self.loss_tokens

    def encode(
        self,
        acts: Float[Tensor, "batch d_model"],
        grads: Float[Tensor, "batch d_model"] | None = None,
    ) -> Latents:
        """The k latents of each row; without grads those of plain TopK, whatever beta is."""
        dtype = self.W_enc.dtype
        return encode_rows(
            acts.to(dtype) * self.input_scale,
            None if grads is None else grads.to(dtype),
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.b_dec,
            k=self.k,
            beta_per_token=self.beta_per_token,
        )

    def decode(self, latents: Latents) -> Float[Tensor, "batch d_model"]:
        """x̂ in the units of x."""
        return (decode_rows(latents, self.W_dec) + self.b_dec) / self.input_scale

    def forward(
        self,
        acts: Float[Tensor, "batch d_model"],
        grads: Float[Tensor, "batch d_model"] | None = None,
    ) -> Reconstruction:
        """Encode, then decode."""
        latents = self.encode(acts, grads)
        return Reconstruction(self.decode(latents), latents)


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
    return ((recon - acts) * input_scale).square().sum(dim=1).mean()


@torch.no_grad()
def init_weights(
    sae: TopKSAE, acts: Float[Tensor, "batch d_model"], *, seed: int, scale_input: bool
) -> None:
    """Random unit decoder rows, their transpose as encoder, b_enc zero, b_dec a first batch's mean.

    With scale_input, s = sqrt(d_model) / mean ||x||, so that a scaled row's norm is sqrt(d_model)
    on average. The same seed draws the same decoder on every device.

    Differs: smol-sae starts b_dec at zero.
    """
    rows = torch.randn(sae.d_sae, sae.d_model, generator=torch.Generator().manual_seed(seed))
    sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_enc.zero_()
    sae.input_scale.fill_(math.sqrt(sae.d_model) / acts.norm(dim=1).mean() if scale_input else 1.0)
    sae.b_dec.copy_(acts.mean(dim=0) * sae.input_scale)
