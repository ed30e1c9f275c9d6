"""The Switch autoencoder (Mudide et al. 2024): a router sends each row to one of its experts."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.sae.base import SparseAutoencoder, TrainingPass
from pipeline.sae.selection import Latents
from pipeline.sae.sparse import encode_rows

LOAD_BALANCE = 3.0  # α of Mudide et al. 2024


class SwitchSAE(SparseAutoencoder):
    """TopK autoencoders of d_sae / n_experts latents each, of which every row uses one.

        p = softmax((s x - b_router) @ W_router)                             [batch, n_experts]
        e = argmax p                                                         [batch]
        z = (s x - b_dec) @ W_enc + b_enc, of expert e's latents     [batch, d_sae / n_experts]
        y = p_e ReLU(z) on the k largest z + beta / loss_tokens * z * |grads @ W_dec^T|, else 0
        x̂ = (y @ W_dec + b_dec) / s                                          [batch, d_model]
        penalty = α d_model n_experts Σ_i f_i P_i

    f_i is the fraction of the rows (of all processes) that go to expert i, P_i the mean of p_i over
    them: α d_model where all experts have equal shares. Mudide et al. 2024 (2410.08201), section 3;
    the score is Olmo et al. 2024's, section 3. Expert i owns latents i d_sae / n_experts and up.

    Differs: b_enc, which the paper lacks; and α is in units of the scaled input, where the paper's
    is in those of GPT-2's activations. The factor d_model, with a squared error that is a sum over
    d_model, is in the authors' code.

    Raises ConfigError if n_experts does not divide d_sae, or an expert has fewer than k latents.
    """

    architecture: ClassVar[str] = "switch"
    selects: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("n_experts",)

    def __init__(self, *, n_experts: int, **settings: Any) -> None:
        super().__init__(**settings)
        if n_experts < 1 or self.d_sae % n_experts or self.k > self.d_sae // n_experts:
            raise ConfigError(
                f"n_experts at SwitchSAE: expected a divisor of d_sae = {self.d_sae} that leaves "
                f"each expert at least k = {self.k} latents, got {n_experts}."
            )
        self.n_experts = n_experts
        self.W_router = nn.Parameter(torch.zeros(self.d_model, n_experts))
        self.b_router = nn.Parameter(torch.zeros(self.d_model))

    @torch.no_grad()
    def reset_extra(self) -> None:
        """The router starts where each expert's decoder rows point on average, centred as b_dec."""
        directions = self.W_dec.view(self.n_experts, -1, self.d_model).sum(dim=1)
        self.W_router.copy_((directions / directions.norm(dim=1, keepdim=True)).T)
        self.b_router.copy_(self.b_dec)

    def encode(
        self,
        acts: Float[Tensor, "batch d_model"],
        grads: Float[Tensor, "batch d_model"] | None = None,
        tokens: Int[Tensor, " batch"] | None = None,
    ) -> Latents:
        """The k latents of each row, from its own expert; values are weighted by the router."""
        del tokens
        return self._encode_routed(acts, grads, self.route(acts))

    def train_forward(
        self,
        acts: Float[Tensor, "batch d_model"],
        grads: Float[Tensor, "batch d_model"] | None = None,
        tokens: Int[Tensor, " batch"] | None = None,
    ) -> TrainingPass:
        """As forward, with the load-balancing penalty."""
        del tokens
        probabilities = self.route(acts)
        latents = self._encode_routed(acts, grads, probabilities)
        return TrainingPass(self.decode(latents), latents, self._penalise(probabilities))

    def route(self, acts: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch n_experts"]:
        """p, of which each row's largest names its expert."""
        return ((self.scale_rows(acts) - self.b_router) @ self.W_router).softmax(dim=1)

    def _encode_routed(self, acts: Tensor, grads: Tensor | None, probabilities: Tensor) -> Latents:
        weights, experts = probabilities.max(dim=1)
        order = experts.argsort(stable=True)
        row_groups = order.split(experts.bincount(minlength=self.n_experts).tolist())
        x, size = self.scale_rows(acts), self.d_sae // self.n_experts
        # unbind, because its backward stacks the experts' gradients in one copy.
        W_encs = self.W_enc.T.unflatten(0, (self.n_experts, size)).unbind()
        b_encs, W_decs = self.b_enc.view(-1, size).unbind(), self.W_dec.detach().split(size)
        parts = {
            expert: encode_rows(
                x[rows],
                None if grads is None else grads[rows].to(x.dtype),
                W_encs[expert].T,
                b_encs[expert],
                W_decs[expert],
                self.b_dec,
                k=self.k,
                beta_per_token=self.beta_per_token,
                product_dtype=self.product_dtype,
            )
            for expert, rows in enumerate(row_groups)
            if len(rows) or not len(x)
        }
        back = order.argsort()
        values = torch.cat([part.values for part in parts.values()])[back]
        indices = torch.cat([part.indices + i * size for i, part in parts.items()])[back]
        return Latents(values * weights[:, None], indices)

    def _penalise(self, probabilities: Tensor) -> Float[Tensor, ""]:
        counts = probabilities.argmax(dim=1).bincount(minlength=self.n_experts)
        counts = self.group.sum(counts).to(probabilities.dtype)
        balance = self.n_experts * (counts / counts.sum() @ probabilities.mean(dim=0))
        return LOAD_BALANCE * self.d_model * balance
