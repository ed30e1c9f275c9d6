"""One SAE learns from one batch: the losses, the optimizer step, and what is measured of it.

sae = TopKSAE(d_model=768, d_sae=15360, k=32, beta=1e5)
init_weights(sae, first_acts, seed=0, scale_input=True)
learner = start_learning(sae)
for acts, grads in batches:
    metrics = take_step(learner, acts, grads, lr=1e-3)
save_sae(sae, folder)
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.errors import ConfigError, TrainError
from pipeline.sae.base import SparseAutoencoder, TrainingPass
from pipeline.sae.group import Group
from pipeline.sae.losses import auxk_loss, reconstruction_loss
from pipeline.sae.selection import Latents, count_shared, sum_gradient_weight

# "Does not activate for 5 consecutive batches" of 4096 tokens (Olmo et al. 2024, section 4.1),
# counted in tokens so that the batch size does not change what is dead.
DEAD_AFTER_TOKENS = 5 * 4096

Objective = Callable[[Float[Tensor, "batch d_model"]], Float[Tensor, ""]]  # of x̂


class LossNotFinite(TrainError):
    """A step's loss was NaN or infinite; the step was not taken, and nothing is changed."""


class Learner(NamedTuple):
    """One SAE in training."""

    sae: SparseAutoencoder
    optimizer: torch.optim.Optimizer
    idle_tokens: Int[Tensor, " d_sae"]  # int64, tokens since each latent was last positive
    average: list[Tensor] | None  # exponential moving averages of the parameters, in their order


class StepMetrics(NamedTuple):
    """How one SAE did on one batch before it learned from it, with the gradient in its
    selection."""

    loss: float  # reconstruction_loss or the objective, averaged over the rows of all processes
    penalty: float  # all else that was minimised: AuxK, sparsity, load balance; likewise averaged
    nmse: float  # mean over rows of ||x - x̂|| / ||x||, as the paper prints; 0 where x is 0
    nmse_squared: float  # mean over rows of the squared ratio
    l0: float  # mean number of latents above zero per row
    dead_latents: int  # latents that were not above zero in the last DEAD_AFTER_TOKENS tokens
    overlap: float | None  # fraction of the selected latents that plain TopK selects too
    gradient_weight: float | None  # mean of beta / loss_tokens * |W_dec^T grad| on selected latents


def start_learning(
    sae: SparseAutoencoder, *, betas: tuple[float, float] = (0.9, 0.999), average: bool = False
) -> Learner:
    """A fresh Adam for an SAE whose weights are initialised."""
    idle_tokens = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.W_dec.device)
    optimizer = torch.optim.Adam(map(_as_it_lies, sae.parameters()), betas=betas, fused=True)
    averages = [p.detach().clone() for p in sae.parameters()] if average else None
    return Learner(sae, optimizer, idle_tokens, averages)


def take_step(
    learner: Learner,
    acts: Float[Tensor, "batch d_model"],
    grads: Float[Tensor, "batch d_model"] | None = None,
    tokens: Int[Tensor, " batch"] | None = None,
    *,
    lr: float,
    decoder_norm: Literal["unit", "free"] = "unit",
    aux_weight: float = 0.0,
    aux_k: int | None = None,
    max_grad_norm: float | None = None,
    average_decay: float = 0.999,
    objective: Objective | None = None,
    full: bool = False,
) -> StepMetrics:
    """Minimise, by one step of Adam,

        reconstruction_loss (or `objective`) + the architecture's penalty + aux_weight * auxk_loss

    averaged over the rows of all processes of `sae.group`, each of which gives its own rows. aux_k
    is d_model / 2 unless given (Gao et al. 2024). With decoder_norm "unit", the gradient along a
    decoder row is removed and rows are kept at norm 1. `full` measures overlap and gradient weight
    too, at the price of a second selection.

    Raises LossNotFinite, before anything of the SAE or the learner changes, where the loss is NaN
    or infinite; ConfigError for another decoder_norm or a rate that is negative or not finite.
    """
    if decoder_norm not in ("unit", "free") or not 0 <= lr < math.inf:
        raise ConfigError(
            "decoder_norm and lr at take_step: expected unit or free and a finite rate from 0 on, "
            f"got {decoder_norm} and {lr}."
        )
    sae, optimizer, idle_tokens, averages = learner
    passed = sae.train_forward(acts, grads, tokens)
    if objective is None:
        loss = reconstruction_loss(acts, passed.recon, input_scale=sae.input_scale)
    else:
        loss = objective(passed.recon)
    penalty = passed.penalty
    if aux_weight:
        dead = idle_tokens >= DEAD_AFTER_TOKENS
        aux_k = sae.d_model // 2 if aux_k is None else aux_k
        penalty = penalty + aux_weight * auxk_loss(sae, acts, passed.recon, dead, aux_k=aux_k)
    n_rows, means = _average(acts, passed, loss, penalty, sae.group)
    if not math.isfinite(means[0] + means[1]):
        raise LossNotFinite(f"expected a finite loss, got {means[0]} + {means[1]}")
    sae.after_loss()
    n_dead = _count_dead(learner, passed.latents, n_rows)
    overlap = gradient_weight = None
    if full and sae.selects and grads is not None:
        overlap, gradient_weight = _measure_steering(sae, acts, grads, tokens, passed.latents)
    metrics = StepMetrics(
        *means, dead_latents=n_dead, overlap=overlap, gradient_weight=gradient_weight
    )

    sae.zero_grad()
    ((loss + penalty) * (len(acts) / n_rows)).backward()
    for parameter in sae.parameters():
        if parameter.grad is None:  # every process has to send the same tensors
            parameter.grad = torch.zeros_like(parameter)
        sae.group.sum(parameter.grad)
    if decoder_norm == "unit":
        _remove_parallel_gradient(sae.W_dec)
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(sae.parameters(), max_grad_norm)
    _step_optimizer(sae, optimizer, lr=lr)
    if decoder_norm == "unit":
        _normalise_rows(sae.W_dec)
    sae.after_step(metrics.l0)
    if averages is not None:
        with torch.no_grad():
            torch._foreach_lerp_(averages, list(sae.parameters()), 1 - average_decay)  # pyright: ignore[reportPrivateImportUsage]
    return metrics


@torch.no_grad()
def _average(
    acts: Tensor, passed: TrainingPass, loss: Tensor, penalty: Tensor, group: Group
) -> tuple[int, list[float]]:
    """The rows of all processes, and over them the first five of StepMetrics."""
    norms = acts.norm(dim=1)
    ratio = ((acts - passed.recon).norm(dim=1) / norms).where(norms > 0, 0)
    n_active = (passed.latents.values > 0).sum()
    n_own = loss.new_tensor(len(acts), dtype=torch.float64)
    own = [n_own, loss * n_own, penalty * n_own, ratio.sum(), ratio.square().sum(), n_active]
    n_rows, *sums = group.sum(torch.stack([part.double() for part in own])).tolist()
    return int(n_rows), [total / n_rows if n_rows else math.nan for total in sums]


@torch.no_grad()
def _count_dead(learner: Learner, latents: Latents, n_rows: int) -> int:
    """Move the idle counts by the batch of n_rows, and count the dead after it."""
    sae, idle_tokens = learner.sae, learner.idle_tokens
    fired = torch.zeros_like(idle_tokens)
    fired[latents.indices[latents.values > 0]] = 1
    idle_tokens += n_rows
    idle_tokens[sae.group.sum(fired) > 0] = 0
    return int((idle_tokens >= DEAD_AFTER_TOKENS).sum())


@torch.no_grad()
def _measure_steering(
    sae: SparseAutoencoder, acts: Tensor, grads: Tensor, tokens: Tensor | None, selected: Latents
) -> tuple[float, float]:
    """Overlap and gradient weight, over the selected latents above zero of all processes."""
    plain = sae.encode(acts, None, tokens)
    weight = sum_gradient_weight(selected, grads, sae.W_dec, beta_per_token=sae.beta_per_token)
    own = (selected.values > 0).sum(), count_shared(selected, plain, d_sae=sae.d_sae), weight
    n_active, shared, total = sae.group.sum(torch.stack([part.double() for part in own])).tolist()
    return shared / max(n_active, 1), total / max(n_active, 1)


def _as_it_lies(tensor: Tensor) -> Tensor:
    """The same memory, contiguous: W_enc is laid out as its transpose."""
    return tensor.detach() if tensor.is_contiguous() else tensor.detach().T


def _step_optimizer(sae: SparseAutoencoder, optimizer: torch.optim.Optimizer, *, lr: float) -> None:
    # On a CPU, fused Adam goes through memory as it lies, whatever the strides: a parameter, its
    # gradient and its moments, which may come from a file, are paired wrongly where these differ.
    (group,) = optimizer.param_groups
    group["lr"] = lr
    for parameter, stepped in zip(sae.parameters(), group["params"], strict=True):
        assert parameter.grad is not None
        turned = not parameter.is_contiguous()
        stepped.grad = (parameter.grad.T if turned else parameter.grad).contiguous()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def _remove_parallel_gradient(W_dec: Tensor) -> None:
    """Project each row's gradient onto the tangent of the unit sphere; rows have unit norm."""
    assert W_dec.grad is not None
    # In pieces that stay in cache: 18 ms of one core for 15360 x 768, 69 ms in one piece.
    n_rows = len(W_dec) if W_dec.is_cuda else 128
    for rows, grads in zip(W_dec.split(n_rows), W_dec.grad.split(n_rows), strict=True):
        grads.addcmul_(rows, (grads * rows).sum(dim=1, keepdim=True), value=-1)


@torch.no_grad()
def _normalise_rows(W_dec: Tensor) -> None:
    W_dec /= W_dec.norm(dim=1, keepdim=True)
