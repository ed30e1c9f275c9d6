"""One SAE of the grid: its name and folder, and how the configuration starts it and steps it."""

from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.paths import format_number
from pipeline.sae import (
    ARCHITECTURES,
    Learner,
    StepMetrics,
    init_weights,
    start_learning,
    take_step,
)
from pipeline.sae.group import ALONE, Group


class MemberSpec(NamedTuple):
    """One SAE of the grid."""

    name: str  # also its folder
    architecture: str
    k: int
    beta: float
    seed: int


class Member(NamedTuple):
    """One SAE in training."""

    spec: MemberSpec
    learner: Learner


def plan_members(config: TrainConfig) -> tuple[MemberSpec, ...]:
    """All combinations of architectures, ks, betas and seeds.

    Their names are k32-beta1e5; jumprelu-k32-beta0 if not topk; k32-beta0-seed0 where there are
    several seeds. An architecture that selects nothing has one member for all betas.
    """
    members = []
    for architecture in config.architectures:
        betas = config.betas if ARCHITECTURES[architecture].selects else (0.0,)
        for k, beta, seed in product(config.ks, betas, config.seeds):
            prefix = "" if architecture == "topk" else f"{architecture}-"
            suffix = f"-seed{seed}" if len(config.seeds) > 1 else ""
            name = f"{prefix}k{k}-beta{format_number(beta)}{suffix}"
            members.append(MemberSpec(name, architecture, k, beta, seed))
    return tuple(members)


def start_member(
    spec: MemberSpec,
    config: TrainConfig,
    acts: Float[Tensor, "batch d_model"],
    *,
    n_tokens: int | None = None,
    group: Group = ALONE,
) -> Member:
    """A fresh SAE and its optimizer, initialised from the first batch of all processes.

    `n_tokens` is the size of the vocabulary, for a tokenized SAE.
    """
    cls = ARCHITECTURES[spec.architecture]
    options = {
        "n_experts": config.n_experts,
        "bandwidth": config.jumprelu_bandwidth,
        "n_tokens": n_tokens,
    }
    sae = cls(
        d_model=acts.shape[1],
        d_sae=config.d_sae,
        k=spec.k,
        beta=spec.beta,
        loss_tokens=config.loss_tokens,
        **{name: options[name] for name in cls.options},
    ).to(acts.device)
    sae.group = group
    init_weights(
        sae,
        group.gather(acts),
        seed=spec.seed,
        scale_input=config.input_scaling == "mean_norm",
        b_dec=config.b_dec_start,
    )
    if config.precision == "bfloat16":
        sae.product_dtype = torch.bfloat16
    return Member(spec, start_learning(sae, average=config.average_decay is not None))


def step_member(
    member: Member,
    acts: Float[Tensor, "batch d_model"],
    grads: Float[Tensor, "batch d_model"],
    tokens: Int[Tensor, " batch"] | None = None,
    *,
    config: TrainConfig,
    lr: float,
    full: bool,
) -> StepMetrics:
    """Take one optimizer step as the configuration says; see `take_step`."""
    return take_step(
        member.learner,
        acts,
        grads,
        tokens,
        lr=lr,
        decoder_norm=config.decoder_norm,
        aux_weight=config.aux_weight,
        aux_k=config.aux_k,
        max_grad_norm=config.max_grad_norm,
        average_decay=config.average_decay or 0.0,
        full=full,
    )
