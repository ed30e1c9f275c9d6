"""Autoencoders of any number of latents: their start, and how a penalty is steered to an L0."""

import math
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.sae.base import SparseAutoencoder, TrainingPass, list_dense
from pipeline.sae.selection import Latents

# How `steer` moves the weight of an L1 penalty. Measured with ReLU at d_model 128, d_sae 2048, k
# 32: L0 is within 5% of k from step 450 on. At rate 0.04 it ended 9% off.
SMOOTHING = 0.9  # of log (L0 / k), per step
RATE = 0.01  # the most that log weight moves in a step
LOOK_AHEAD = 25  # steps
BOUND = 1e4  # the weight stays within start / BOUND and start * BOUND
_LATENT_BLOCK = 1024


class Steering(NamedTuple):
    """The state of the controller."""

    weight: Float[Tensor, ""]  # of the sparsity penalty
    error: Float[Tensor, ""]  # smoothed log (L0 / k)


def steer(state: Steering, *, l0: float, k: int, start: Float[Tensor, ""]) -> Steering:
    """Move the penalty's weight λ so that L0 approaches k.

        e' = 0.9 e + 0.1 log (L0 / k)
        λ' = λ exp(0.01 clip(e' + 25 (e' - e), -1, 1)),  kept within start / 10^4 and start * 10^4

    An integral controller of log λ, damped by where the error will be in 25 steps at its present
    pace; the clip bounds what it does while L0 is still far off. An L0 under k / 100 counts as
    that. `start` is the first λ.
    """
    error = math.log(max(l0, k / 100) / k)
    smoothed = SMOOTHING * state.error + (1 - SMOOTHING) * error
    expected = smoothed + LOOK_AHEAD * (smoothed - state.error)
    weight = state.weight * torch.exp(RATE * expected.clamp(-1, 1))
    return Steering(weight.clamp(start / BOUND, start * BOUND), smoothed)


class SteeredSAE(SparseAutoencoder):
    """Base of the architectures whose penalty decides how many latents fire; k is the L0 wanted.

    Its weight moves after every step, by `steer` unless the architecture says otherwise; then
    l0_error stays as it started. At the start every latent fires on the same share of a first
    batch's rows, half of them at most, so that L0 is a small multiple of k; a start with L0 =
    d_sae / 2 spends hundreds of steps on the way down.

    Differs from the papers of all three architectures: they choose a weight and see which L0 it
    gives, and start with half of the latents firing.
    """

    selects: ClassVar[bool] = False
    penalty_degree: ClassVar[int]  # the penalty's weight has the unit of activations to this power
    start_weight: ClassVar[float]  # of the penalty, in that unit
    start_l0: ClassVar[float]  # of the first batch, times k

    sparsity_weight: Tensor  # scalar buffers, so that files and checkpoints have them
    weight_unit: Tensor
    l0_error: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name in ("sparsity_weight", "weight_unit", "l0_error"):
            self.register_buffer(name, torch.zeros(()))

    @torch.no_grad()
    def fit_first_batch(self, acts: Float[Tensor, "batch d_model"]) -> None:
        """Start the weight, and the latents at levels that a few of the rows exceed.

        The weight's unit is the root mean square of s x - b_dec to the power of `penalty_degree`.
        """
        centred = self.scale_rows(acts) - self.b_dec
        unit = centred.square().mean().sqrt().clamp_min(1e-6) ** self.penalty_degree
        self.weight_unit.copy_(unit)
        self.sparsity_weight.copy_(self.start_weight * unit)
        self.l0_error.fill_(math.log(self.start_l0))
        fraction = self.start_l0 * self.k / self.d_sae
        self.start_firing_at(find_levels(centred, self.W_enc, fraction=fraction), centred)

    def start_firing_at(
        self, levels: Float[Tensor, " d_sae"], centred: Float[Tensor, "batch d_model"]
    ) -> None:
        """Make latent i fire where centred @ W_enc, now, is above levels[i]; W_enc may change."""
        raise NotImplementedError

    def fire(self, projected: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """The latents' values, of what `project` gives."""
        raise NotImplementedError

    def penalise(
        self,
        acts: Float[Tensor, "batch d_model"],
        projected: Float[Tensor, "batch d_sae"],
        values: Float[Tensor, "batch d_sae"],
    ) -> Float[Tensor, ""]:
        """The penalty, averaged over the batch's rows, of what `project` and `fire` give."""
        raise NotImplementedError

    def encode(
        self,
        acts: Float[Tensor, "batch d_model"],
        grads: Float[Tensor, "batch d_model"] | None = None,
        tokens: Int[Tensor, " batch"] | None = None,
    ) -> Latents:
        """All latents; grads play no part."""
        del grads, tokens
        return list_dense(self.fire(self.project(acts)))

    def train_forward(
        self,
        acts: Float[Tensor, "batch d_model"],
        grads: Float[Tensor, "batch d_model"] | None = None,
        tokens: Int[Tensor, " batch"] | None = None,
    ) -> TrainingPass:
        """As forward, with the penalty."""
        del grads, tokens
        projected = self.project(acts)
        latents = list_dense(self.fire(projected))
        penalty = self.penalise(acts, projected, latents.values)
        return TrainingPass(self.decode(latents), latents, penalty)

    def project(self, acts: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch d_sae"]:
        """(s x - b_dec) @ W_enc, rounded to `product_dtype` where there is one."""
        centred, dtype = self.scale_rows(acts) - self.b_dec, self.product_dtype
        if dtype is None:
            return centred @ self.W_enc
        return (centred.to(dtype) @ self.W_enc.to(dtype)).to(self.W_enc.dtype)

    def decode(
        self, latents: Latents, tokens: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch d_model"]:
        """x̂ of what `encode` gave, all d_sae latents in their order: one dense product."""
        del tokens
        return (latents.values @ self.W_dec + self.b_dec) / self.input_scale

    @torch.no_grad()
    def after_step(self, l0: float) -> None:
        """Steer the penalty's weight; the same in every process."""
        state = Steering(self.sparsity_weight, self.l0_error)
        state = steer(state, l0=l0, k=self.k, start=self.start_weight * self.weight_unit)
        self.sparsity_weight.copy_(state.weight)
        self.l0_error.copy_(state.error)


def find_levels(
    centred: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_model d_sae"],
    *,
    fraction: float,
) -> Float[Tensor, " d_sae"]:
    """What centred @ W_enc exceeds on this fraction of the rows, for each latent.

    At least one row exceeds it, if there are two, and half of them at most.
    """
    n_rows = len(centred)
    n_above = min(max(1, round(n_rows * fraction)), n_rows // 2)
    levels = [
        (centred @ block).kthvalue(n_rows - n_above, dim=0).values
        for block in W_enc.split(_LATENT_BLOCK, dim=1)
    ]
    return torch.cat(levels)
