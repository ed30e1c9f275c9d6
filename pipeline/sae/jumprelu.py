"""The JumpReLU autoencoder (Rajamanoharan et al. 2024b): a learnt threshold for each latent."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pipeline.errors import ConfigError
from pipeline.sae.sparsity import Gains, SteeredSAE

# A threshold moves by a factor of about 1 + lr in a step, whatever the weight. So the weight is
# kept in bounds, or it grows by orders of magnitude while L0 is on its way, and the controller
# looks far ahead. Measured once each at d_model 64, d_sae 512, k 8, 1000 steps: the smoothed L0
# ended 1% under k with bound 30 and rate 0.1, 9% under it unbounded with rate 0.04.
JUMP_GAINS = Gains(start=0.1, bound=60, rate=0.1, look_ahead=100, start_l0=2)


class JumpReluSAE(SteeredSAE):
    """An autoencoder whose penalty counts the latents that fire.

        z       = (s x - b_dec) @ W_enc + b_enc                      [batch, d_sae]
        y       = z H(z - θ),  θ = exp(log_threshold)                [batch, d_sae]
        x̂       = (y @ W_dec + b_dec) / s                            [batch, d_model]
        penalty = λ Σ_i H(z_i - θ_i), averaged over the batch's rows

    Rajamanoharan et al. 2024b (2407.14435), sections 3 and 4; λ is `sparsity_weight`, H(u) is 1
    where u > 0 and else 0. The thresholds' gradients are straight-through estimates, with ε the
    `bandwidth`, in units of the scaled input, and K(u) = 1 where |u| < 1/2 and else 0:

        ∂y/∂θ = -θ/ε K((z - θ)/ε),   ∂H/∂θ = -1/ε K((z - θ)/ε),   ∂y/∂z = H(z - θ),   ∂H/∂z = 0

    Differs: the paper's thresholds start at ε; see `start_firing_at`.

    Raises ConfigError if the bandwidth is not positive.
    """

    architecture: ClassVar[str] = "jumprelu"
    options: ClassVar[tuple[str, ...]] = ("bandwidth",)
    gains: ClassVar[Gains] = JUMP_GAINS
    penalty_degree: ClassVar[int] = 2

    def __init__(self, *, bandwidth: float, **settings: Any) -> None:
        super().__init__(**settings)
        if not 0 < bandwidth < float("inf"):
            name = type(self).__name__
            raise ConfigError(f"bandwidth at {name}: expected a positive number, got {bandwidth}.")
        self.bandwidth = bandwidth
        self.log_threshold = nn.Parameter(torch.zeros(self.d_sae))

    @property
    def threshold(self) -> Float[Tensor, " d_sae"]:
        """θ, in units of the scaled input."""
        return self.log_threshold.exp()

    @torch.no_grad()
    def start_firing_at(
        self, levels: Float[Tensor, " d_sae"], centred: Float[Tensor, "batch d_model"]
    ) -> None:
        """Thresholds at the levels, W_enc and they times what reconstructs the batch best.

        Without the factor x̂ overshoots: at d_model 64, d_sae 1024, k 16 L0 fell to half of k and
        stayed there for 500 steps, though the weight went to 0. A threshold is at least ε.
        """
        y = centred @ self.W_enc
        y *= y > levels
        recon = y @ self.W_dec
        factor = (recon * centred).sum() / recon.square().sum().clamp_min(1e-12)
        if not factor > 0:  # a batch of equal rows
            factor = torch.ones_like(factor)
        self.W_enc *= factor
        threshold = (factor * levels).clamp_min(self.bandwidth)
        self.log_threshold.copy_(threshold.log())
        self.b_enc.copy_(threshold - factor * levels)

    def fire(self, projected: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        return jump(projected + self.b_enc, self.threshold, self.bandwidth)

    def penalise(
        self,
        acts: Float[Tensor, "batch d_model"],
        projected: Float[Tensor, "batch d_sae"],
        values: Float[Tensor, "batch d_sae"],
    ) -> Float[Tensor, ""]:
        del acts, values
        l0 = count_above(projected + self.b_enc, self.threshold, self.bandwidth)
        return self.sparsity_weight * l0


def jump(
    pre_acts: Float[Tensor, "batch d_sae"], threshold: Float[Tensor, " d_sae"], bandwidth: float
) -> Float[Tensor, "batch d_sae"]:
    """z H(z - θ), with the gradients of `JumpReluSAE`."""
    return _Jump.apply(pre_acts, threshold, bandwidth)


def count_above(
    pre_acts: Float[Tensor, "batch d_sae"], threshold: Float[Tensor, " d_sae"], bandwidth: float
) -> Float[Tensor, ""]:
    """Σ_i H(z_i - θ_i), averaged over the rows, with the gradient of `JumpReluSAE`."""
    return _CountAbove.apply(pre_acts, threshold, bandwidth)


def _is_near(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return (pre_acts - threshold).abs() < bandwidth / 2


class _Jump(Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return pre_acts * (pre_acts > threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        pre_acts, threshold = ctx.saved_tensors
        near = _is_near(pre_acts, threshold, ctx.bandwidth)
        grad_threshold = -threshold / ctx.bandwidth * (grad * near).sum(dim=0)
        return grad * (pre_acts > threshold), grad_threshold, None


class _CountAbove(Function):
    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        n_near = _is_near(pre_acts, threshold, bandwidth).sum(dim=0).to(pre_acts.dtype)
        ctx.save_for_backward(-n_near / (bandwidth * len(pre_acts)))
        return ((pre_acts > threshold).sum() / len(pre_acts)).to(pre_acts.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[None, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        (slope,) = ctx.saved_tensors
        return None, grad * slope, None
