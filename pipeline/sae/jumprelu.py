"""The JumpReLU autoencoder (Rajamanoharan et al. 2024b): a learnt threshold for each latent."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from pipeline.errors import ConfigError
from pipeline.sae.sparsity import SteeredSAE

STIFFNESS = 50  # ρ / 2, in units of the scaled input's mean square
MULTIPLIER_RATE = 0.005  # per step
MULTIPLIER_REACH = 0.2  # of e: it must not grow while L0 is on its way from the start


class JumpReluSAE(SteeredSAE):
    """An autoencoder whose penalty is the distance of its L0 from the one wanted.

        z       = (s x - b_dec) @ W_enc + b_enc                      [batch, d_sae]
        y       = z H(z - θ),  θ = exp(log_threshold)                [batch, d_sae]
        x̂       = (y @ W_dec + b_dec) / s                            [batch, d_model]
        penalty = λ e + ρ/2 e²,   e = L0 / k - 1     λ' = λ + 0.005 ρ e  where |e| < 0.2
        L0      = Σ_i H(z_i - θ_i), averaged over the batch's rows

    Rajamanoharan et al. 2024b (2407.14435), sections 3 and 4; H(u) is 1 where u > 0 and else 0. The
    thresholds' gradients are straight-through estimates, with ε the `bandwidth`, in units of the
    scaled input, and K(u) = 1 where |u| < 1/2 and else 0:

        ∂y/∂θ = -θ/ε K((z - θ)/ε),   ∂H/∂θ = -1/ε K((z - θ)/ε),   ∂y/∂z = H(z - θ),   ∂H/∂z = 0

    Differs: the paper's penalty is λ L0 of a chosen λ, or for a target L0 the square alone. With
    both, as in the augmented Lagrangian of L0 = k, λ (`sparsity_weight`) ends at what L0 = k takes;
    it may be negative, where the reconstruction alone wants fewer latents. Measured once at d_model
    128, d_sae 2048, k 32, 1000 steps: the square alone ended 3% under k.
    The square is of the batch's mean L0, not of each row's, so that rows may use as many latents as
    they need. The paper's thresholds start at ε; see `start_firing_at`.

    Raises ConfigError if the bandwidth is not positive.
    """

    architecture: ClassVar[str] = "jumprelu"
    options: ClassVar[tuple[str, ...]] = ("bandwidth",)
    penalty_degree: ClassVar[int] = 2
    start_weight: ClassVar[float] = 0
    start_l0: ClassVar[float] = 2

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
        del values
        l0 = count_above(projected + self.b_enc, self.threshold, self.bandwidth)
        excess = self._find_excess(l0.detach(), len(acts))
        stiffness = STIFFNESS * self.weight_unit
        slope = self.sparsity_weight + 2 * stiffness * excess  # of the penalty, in e
        value = self.sparsity_weight * excess + stiffness * excess.square()
        return value + slope * (l0 - l0.detach()) / self.k

    def _find_excess(self, l0: Float[Tensor, ""], n_rows: int) -> Float[Tensor, ""]:
        """e of the batch of all processes, whose square is not the mean of their squares."""
        sums = self.group.sum(torch.stack([l0.double() * n_rows, l0.new_tensor(n_rows).double()]))
        return (sums[0] / sums[1] / self.k - 1).to(l0)

    @torch.no_grad()
    def after_step(self, l0: float) -> None:
        """Move the multiplier; the same in every process."""
        excess = l0 / self.k - 1
        if abs(excess) < MULTIPLIER_REACH:
            self.sparsity_weight += MULTIPLIER_RATE * 2 * STIFFNESS * self.weight_unit * excess


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
