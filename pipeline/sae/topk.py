"""The TopK autoencoder (Gao et al. 2024), and with beta > 0 the gradient SAE (Olmo et al. 2024)."""

from jaxtyping import Float, Int
from torch import Tensor

from pipeline.sae.base import SparseAutoencoder
from pipeline.sae.selection import Latents
from pipeline.sae.sparse import encode_rows


class TopKSAE(SparseAutoencoder):
    """A k-sparse autoencoder whose selection may be steered by the loss gradient.

        z = (s x - b_dec) @ W_enc + b_enc                            [batch, d_sae]
        y = ReLU(z) on the k largest z + beta / loss_tokens * z * |grads @ W_dec^T|, else 0
        x̂ = (y @ W_dec + b_dec) / s                                  [batch, d_model]

    Olmo et al. 2024, section 3; beta = 0 is Gao et al. 2024. The gradient term needs no s: grads
    and W_dec's rows stay as they are, so that every score is s times that of the same SAE with s
    folded in, and the selection is the same.

    Differs: the paper has no input scale, and its beta is our beta / loss_tokens (see `select`).
    """

    architecture = "topk"
    selects = True

    def encode(
        self,
        acts: Float[Tensor, "batch d_model"],
        grads: Float[Tensor, "batch d_model"] | None = None,
        tokens: Int[Tensor, " batch"] | None = None,
    ) -> Latents:
        """The k latents of each row; without grads those of plain TopK, whatever beta is."""
        del tokens
        return encode_rows(
            self.scale_rows(acts),
            None if grads is None else grads.to(self.W_enc.dtype),
            self.W_enc,
            self.b_enc,
            self.W_dec,
            self.b_dec,
            k=self.k,
            beta_per_token=self.beta_per_token,
            product_dtype=self.product_dtype,
        )
