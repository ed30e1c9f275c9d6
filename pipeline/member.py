"""One SAE in training: its place in the grid, its optimizer step, and what is measured of it."""

import math
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.errors import TrainError
from pipeline.paths import format_number
from pipeline.sae import Reconstruction, TopKSAE, init_weights, reconstruction_loss
from pipeline.sae.selection import measure_gradient_weight, measure_overlap

# "Does not activate for 5 consecutive batches" of 4096 tokens (Olmo et al. 2024, section 4.1),
# counted in tokens so that the batch size does not change what is dead.
DEAD_AFTER_TOKENS = 5 * 4096


class MemberSpec(NamedTuple):
    """One SAE of the grid."""

    name: str  # also its folder
    k: int
    beta: float
    seed: int


class Member(NamedTuple):
    """One SAE in training."""

    spec: MemberSpec
    sae: TopKSAE
    optimizer: torch.optim.Optimizer
    idle_tokens: Tensor  # int64 [d_sae], tokens since each latent was last positive


class StepMetrics(NamedTuple):
    """How one SAE did on one batch before it learned from it, with the gradient in its
    selection."""

    loss: float  # squared error of the scaled input, summed over d_model, averaged over the batch
    nmse: float  # mean over rows of ||x - x̂|| / ||x||, the ratio that the paper prints
    nmse_squared: float  # mean over rows of the squared ratio
    l0: float  # mean number of latents above zero per row
    dead_latents: int  # latents that were not above zero in the last DEAD_AFTER_TOKENS tokens
    overlap: float | None  # fraction of the selected latents that plain TopK selects too
    gradient_weight: float | None  # mean of beta / loss_tokens * |W_dec^T grad| on selected latents


def plan_members(config: TrainConfig) -> tuple[MemberSpec, ...]:
    """All combinations of ks, betas and seeds.

    Their names are k32-beta1e5, or k32-beta1e5-seed0 where there are several seeds. Raises
    TrainError where two of them are the same.
    """
    members = []
    for k, beta, seed in product(config.ks, config.betas, config.seeds):
        suffix = f"-seed{seed}" if len(config.seeds) > 1 else ""
        members.append(MemberSpec(f"k{k}-beta{format_number(beta)}{suffix}", k, beta, seed))
    return tuple(members)


def start_member(
    spec: MemberSpec, config: TrainConfig, acts: Float[Tensor, "batch d_model"]
) -> Member:
    """A fresh SAE and its optimizer, initialised from the first batch."""
    sae = TopKSAE(
        d_model=acts.shape[1],
        d_sae=config.d_sae,
        k=spec.k,
        beta=spec.beta,
        loss_tokens=config.loss_tokens,
    ).to(acts.device)
    init_weights(sae, acts, seed=spec.seed, scale_input=config.input_scaling == "mean_norm")
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr, betas=(0.9, 0.999), fused=True)
    idle_tokens = torch.zeros(config.d_sae, dtype=torch.int64, device=acts.device)
    return Member(spec, sae, optimizer, idle_tokens)


def step_member(
    member: Member,
    acts: Float[Tensor, "batch d_model"],
    grads: Float[Tensor, "batch d_model"],
    *,
    lr: float,
    decoder_norm: str,
    step: int,
    full: bool,
) -> StepMetrics:
    """Take one optimizer step.

    `full` measures overlap and gradient weight too, at the price of a second TopK. Raises
    TrainError, before the step is taken, where the loss is NaN or infinite.
    """
    sae, optimizer = member.sae, member.optimizer
    reconstruction = sae(acts, grads)
    loss = reconstruction_loss(acts, reconstruction.recon, input_scale=sae.input_scale)
    metrics = _measure(member, acts, grads, reconstruction, loss, full=full)
    if not math.isfinite(metrics.loss):
        raise TrainError(
            f"loss of {member.spec.name} at step {step}: expected a finite number, "
            f"got {metrics.loss}; nothing was saved. Run pipeline train with a lower train.lr."
        )
    optimizer.zero_grad()
    loss.backward()
    if decoder_norm == "unit":
        _remove_parallel_gradient(sae.W_dec)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    if decoder_norm == "unit":
        _normalise_rows(sae.W_dec)
    return metrics


@torch.no_grad()
def _measure(
    member: Member,
    acts: Tensor,
    grads: Tensor,
    reconstruction: Reconstruction,
    loss: Tensor,
    *,
    full: bool,
) -> StepMetrics:
    sae, (recon, latents) = member.sae, reconstruction
    active = latents.values > 0
    member.idle_tokens.add_(len(acts))
    member.idle_tokens[latents.indices[active]] = 0
    tiny = torch.finfo(acts.dtype).tiny
    ratio = (acts - recon).norm(dim=1) / acts.norm(dim=1).clamp_min(tiny)
    n_dead = (member.idle_tokens >= DEAD_AFTER_TOKENS).sum()
    figures = (loss, ratio.mean(), ratio.square().mean(), active.sum() / len(acts), n_dead)
    loss_, nmse, nmse_squared, l0, dead = torch.stack([f.double() for f in figures]).tolist()
    overlap = gradient_weight = None
    if full:
        plain = sae.encode(acts)
        overlap = measure_overlap(latents.indices, plain.indices, d_sae=sae.d_sae)
        gradient_weight = measure_gradient_weight(
            latents.indices, grads, sae.W_dec, beta_per_token=sae.beta_per_token
        )
    return StepMetrics(loss_, nmse, nmse_squared, l0, int(dead), overlap, gradient_weight)


@torch.no_grad()
def _remove_parallel_gradient(W_dec: Tensor) -> None:
    """Project each row's gradient onto the tangent of the unit sphere; rows have unit norm."""
    assert W_dec.grad is not None
    W_dec.grad -= (W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec


@torch.no_grad()
def _normalise_rows(W_dec: Tensor) -> None:
    W_dec /= W_dec.norm(dim=1, keepdim=True)
