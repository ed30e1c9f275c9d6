"""One SAE of the grid: its name, how the configuration starts it and steps it, and its state."""

from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.config import TrainConfig
from pipeline.device import pick_precision
from pipeline.errors import TrainError
from pipeline.paths import format_number
from pipeline.sae import (
    ARCHITECTURES,
    Learner,
    SparseAutoencoder,
    StepMetrics,
    init_weights,
    start_learning,
    take_step,
)
from pipeline.sae.group import ALONE, Group
from pipeline.sae.learning import Objective

END_TO_END = "end_to_end"  # a TopK SAE, trained for another objective

# Settings that decide no weight of a member: the grid's lists, of which it is one combination; the
# lengths, of which its number of steps was made; and what is written on the way.
_NOT_OF_A_MEMBER = {
    *("hook", "architectures", "betas", "ks", "seeds"),
    *("epochs", "tokens", "steps", "allow_partial"),
    *("log_every", "checkpoint_every", "loggers"),
}
_OPTION_SETTINGS = {"n_experts": "n_experts", "bandwidth": "jumprelu_bandwidth"}


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
        betas = config.betas if _find_class(architecture).selects else (0.0,)
        for k, beta, seed in product(config.ks, betas, config.seeds):
            prefix = "" if architecture == "topk" else f"{architecture}-"
            suffix = f"-seed{seed}" if len(config.seeds) > 1 else ""
            name = f"{prefix}k{k}-beta{format_number(beta)}{suffix}"
            members.append(MemberSpec(name, architecture, k, beta, seed))
    return tuple(members)


def plan_recipe(
    spec: MemberSpec,
    config: TrainConfig,
    *,
    n_steps: int,
    order: str | None,
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """All that decides a member's weights; its config.json has the same keys under "training".

    `order` names the batches and their order. Of `provenance`, hook and store_fingerprint count.
    """
    cls = _find_class(spec.architecture)
    unused = {key for name, key in _OPTION_SETTINGS.items() if name not in cls.options}
    settings = config.model_dump(mode="json", exclude=_NOT_OF_A_MEMBER | unused)
    return settings | {
        "architecture": cls.architecture,
        "objective": END_TO_END if spec.architecture == END_TO_END else "reconstruction",
        "k": spec.k,
        "beta": spec.beta,
        "seed": spec.seed,
        "n_steps": n_steps,
        "order": order,
        "hook": provenance.get("hook"),
        "store_fingerprint": provenance.get("store_fingerprint"),
    }


def make_sae(
    spec: MemberSpec,
    config: TrainConfig,
    d_model: int,
    device: str | torch.device,
    *,
    n_tokens: int | None,
    group: Group,
) -> SparseAutoencoder:
    """A member's SAE, whose weights are still zero; a tokenized one needs `n_tokens`."""
    cls = _find_class(spec.architecture)
    if "n_tokens" in cls.options and n_tokens is None:
        raise TrainError(
            f"n_tokens of {spec.name}: expected the vocabulary's size, got none. Pass n_tokens=."
        )
    options = {"n_tokens": n_tokens} | {
        name: getattr(config, key) for name, key in _OPTION_SETTINGS.items()
    }
    sae = cls(
        d_model=d_model,
        d_sae=config.d_sae,
        k=spec.k,
        beta=spec.beta,
        loss_tokens=config.loss_tokens,
        **{name: options[name] for name in cls.options},
    )
    sae.group = group
    if pick_precision(config.precision, device) == "bfloat16":
        sae.product_dtype = torch.bfloat16
    return sae.to(device)


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
    sae = make_sae(spec, config, acts.shape[1], acts.device, n_tokens=n_tokens, group=group)
    init_weights(
        sae,
        group.gather(acts),
        seed=spec.seed,
        scale_input=config.input_scaling == "mean_norm",
        b_dec=config.b_dec_start,
    )
    return Member(spec, start_learning(sae, average=config.average_decay is not None))


def step_member(
    member: Member,
    acts: Float[Tensor, "batch d_model"],
    grads: Float[Tensor, "batch d_model"],
    tokens: Int[Tensor, " batch"] | None = None,
    *,
    config: TrainConfig,
    lr: float,
    k: int | None = None,
    objective: Objective | None = None,
    full: bool,
) -> StepMetrics:
    """Take one optimizer step as the configuration says, with `k` of this step; see `take_step`."""
    member.learner.sae.k = member.spec.k if k is None else k
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
        objective=objective,
        full=full,
    )


@torch.no_grad()
def finish_member(member: Member) -> SparseAutoencoder:
    """The SAE as it is saved: with its own k, and with the averages of its weights if it has any.

    Averages of unit decoder rows are a little shorter than 1 and are left so: what is
    reconstructed is what the averages reconstruct.
    """
    sae, averages = member.learner.sae, member.learner.average
    sae.k = member.spec.k
    for parameter, average in zip(sae.parameters(), averages or (), strict=averages is not None):
        parameter.copy_(average)
    return sae


def _find_class(architecture: str) -> type[SparseAutoencoder]:
    return ARCHITECTURES["topk" if architecture == END_TO_END else architecture]
