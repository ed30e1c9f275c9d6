"""What every architecture has: an encoder, a decoder, an input scale, and one way to be trained."""

import math
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.sae.group import ALONE, Group
from pipeline.sae.selection import Latents
from pipeline.sae.sparse import decode_rows

DEFAULT_LOSS_TOKENS = 32 * 255  # of a batch of smol-sae, whose loss is a mean


class Reconstruction(NamedTuple):
    """What an SAE makes of a batch of activations."""

    recon: Float[Tensor, "batch d_model"]  # x̂, in the units of x
    latents: Latents


class TrainingPass(NamedTuple):
    """A forward pass in training."""

    recon: Float[Tensor, "batch d_model"]  # x̂, in the units of x
    latents: Latents
    penalty: Float[Tensor, ""]  # added to the squared error; averaged over the batch's rows


class SparseAutoencoder(nn.Module):
    """Base of all architectures.

    x, x̂ and grads are in the model's own units, the parameters in those of the scaled input s x,
    where s is `input_scale`. `k` is the L0 wanted: what a selecting architecture keeps, and what
    the others are steered to by their sparsity penalty. `beta` weighs the gradient in the
    selection, of selecting architectures only.

    The parameters are zero until `init_weights` or `load_sae` fills them. Raises ConfigError if k >
    d_sae, for a beta where nothing is selected, and for a beta or loss_tokens that weighs nothing.
    """

    architecture: ClassVar[str]  # its name in configurations and files
    selects: ClassVar[bool]  # keeps the latents with the largest scores, which beta may steer
    options: ClassVar[tuple[str, ...]] = ()  # further arguments of __init__, kept in config.json

    input_scale: Tensor  # scalar buffer

    def __init__(
        self,
        *,
        d_model: int,
        d_sae: int,
        k: int,
        beta: float = 0.0,
        loss_tokens: int = DEFAULT_LOSS_TOKENS,
    ) -> None:
        super().__init__()
        if not 0 < k <= d_sae:
            name = type(self).__name__
            raise ConfigError(f"k at {name}: expected 1 to d_sae = {d_sae}, got {k}.")
        if not 0 <= beta < math.inf or loss_tokens < 1:
            raise ConfigError(
                f"beta and loss_tokens at {type(self).__name__}: expected a finite weight from 0 "
                f"on and at least 1, got {beta:g} and {loss_tokens}."
            )
        if beta and not self.selects:
            raise ConfigError(
                f"beta at {type(self).__name__}: expected 0, for it selects nothing, got {beta:g}."
            )
        self.d_model, self.d_sae, self.k = d_model, d_sae, k
        self.beta, self.loss_tokens = beta, loss_tokens
        self.group: Group = ALONE  # of the processes that train it together
        self.product_dtype: torch.dtype | None = None  # of the encoder's products; None: as weights
        # Laid out by latents, as W_dec is: its sparse gradient is a sum of such rows.
        self.W_enc = nn.Parameter(torch.zeros(d_sae, d_model).T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_model))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("input_scale", torch.ones(()))

    @property
    def beta_per_token(self) -> float:
        """beta / loss_tokens, what the gradient of the summed loss is weighed with."""
        return self.beta / self.loss_tokens

    @property
    def encoder_bias(self) -> Float[Tensor, " d_sae"]:
        """What decides with W_enc whether a latent fires; AuxK revives dead ones through it."""
        return self.b_enc

    def reset_extra(self) -> None:
        """Called by `init_weights` once the common parameters are set; starts all others."""

    def fit_first_batch(self, acts: Float[Tensor, "batch d_model"]) -> None:
        """Called by `init_weights` last, with its batch; starts what depends on activations."""
        del acts

    def encode(
        self,
        acts: Float[Tensor, "batch d_model"],
        grads: Float[Tensor, "batch d_model"] | None = None,
        tokens: Int[Tensor, " batch"] | None = None,
    ) -> Latents:
        """The latents of each row; without grads those of beta 0, whatever beta is.

        `tokens` are the token ids at the rows; only TokenizedSAE needs them.
        """
        raise NotImplementedError

    def decode(
        self, latents: Latents, tokens: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch d_model"]:
        """x̂ in the units of x."""
        del tokens
        return (decode_rows(latents, self.W_dec) + self.b_dec) / self.input_scale

    def forward(
        self,
        acts: Float[Tensor, "batch d_model"],
        grads: Float[Tensor, "batch d_model"] | None = None,
        tokens: Int[Tensor, " batch"] | None = None,
    ) -> Reconstruction:
        """Encode, then decode."""
        latents = self.encode(acts, grads, tokens)
        return Reconstruction(self.decode(latents, tokens), latents)

    def train_forward(
        self,
        acts: Float[Tensor, "batch d_model"],
        grads: Float[Tensor, "batch d_model"] | None = None,
        tokens: Int[Tensor, " batch"] | None = None,
    ) -> TrainingPass:
        """As forward, with what the architecture adds to the squared error."""
        recon, latents = self(acts, grads, tokens)
        return TrainingPass(recon, latents, recon.new_zeros(()))

    def set_k(self, k: int) -> None:
        """Called before each step in training with its k, which annealing lowers."""
        self.k = k

    def after_loss(self) -> None:
        """Called once the loss of a `train_forward`, which changes nothing, is known and finite."""

    def after_step(self, l0: float) -> None:
        """Called after each optimizer step with the mean L0 of its batch, over all processes."""
        del l0

    def scale_rows(self, acts: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_model"]:
        """s x, in the parameters' dtype."""
        return acts.to(self.W_enc.dtype) * self.input_scale


def list_dense(values: Float[Tensor, "batch d_sae"]) -> Latents:
    """Latents of which any number may be positive; the indices take no memory."""
    indices = torch.arange(values.shape[1], device=values.device).expand_as(values)
    return Latents(values, indices)
